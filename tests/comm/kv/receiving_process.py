"""A process that receives the KV of one transfer: says where it listens, and later whether it has what it should."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from slipstream.comm.kv.transfer import OpenReceiving, RankDone, TransferId
from slipstream.placement.kv_routes import KvLayout
from slipstream.tests.comm.kv.kv_bytes import truth
from slipstream.tests.comm.kv.kv_ends import give_transport
from slipstream.tests.contracts.kv_transport import end_of

LAYOUT = KvLayout(layers=4, kv_heads=4, block_size=16)
TRANSFER = TransferId("prefill-0", 3, 1)
TOKENS = 2048
ROW_BYTES = 64
NUM_BLOCKS = TOKENS // 16
SEED = 5
BLOCKS = tuple(range(NUM_BLOCKS - 1, -1, -1))


def main(kind: str) -> None:
    """Receive one transfer, and go on to listen until standard input ends."""
    with ExitStack() as stack:
        end = end_of("decode-0", LAYOUT, 0, row_bytes=ROW_BYTES, num_blocks=NUM_BLOCKS)
        transport = give_transport(stack, kind, end)
        with end.gate.lock:
            grant = OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(TOKENS), blocks=BLOCKS)
            end.gate.incoming.open(grant, LAYOUT)
        print(transport.address, flush=True)
        while not any(isinstance(report, RankDone) for report in end.reports()):
            end.look()
        print(end.kv.holds(range(TOKENS), BLOCKS, truth(LAYOUT, TOKENS, ROW_BYTES, SEED)), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
