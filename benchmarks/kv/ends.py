"""The two ends of a movement that is measured: KV memory, gates and transports, and the receiving process.

The receiver is a process of its own. It reads commands, one JSON object a line, and answers each when it is done: a
movement when every byte is applied and checked, raw bytes when all are read.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.benchmarks.kv.raw import RawListener
from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.incoming import Incoming
from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.memory import KvMemory
from slipstream.comm.kv.outgoing import Outgoing
from slipstream.comm.kv.runs import KvShape
from slipstream.comm.kv.shm import Shm
from slipstream.comm.kv.streams import StreamTransport
from slipstream.comm.kv.tcp import Tcp
from slipstream.comm.kv.transfer import OpenReceiving, OpenSending, Peer, PeerRank, RankDone, TransferId
from slipstream.comm.kv.transport import LockedGate, Released
from slipstream.placement.kv_routes import KvLayout

LAYERS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, ITEM_BYTES = 8, 8, 16, 128, 2
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * ITEM_BYTES
SECRET = b"a secret of the benchmark"
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of moving: a transport, with checksums or without."""

    transport: str
    checksum: bool

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.transport}, checksum" if self.checksum else self.transport


WAYS = tuple(Way(transport=transport, checksum=checksum) for transport in ("tcp", "shm") for checksum in (False, True))


def layout(num_tokens: int, tp: int) -> tuple[KvLayout, int]:
    """Return the layout of a replica, and the blocks that a prompt needs."""
    return (
        KvLayout(layers=LAYERS, kv_heads=KV_HEADS, block_size=BLOCK_SIZE, tp=tp),
        -(-num_tokens // BLOCK_SIZE),
    )


def memory(num_tokens: int) -> tuple[KvMemory, list[memoryview]]:
    """Return the memory of a rank that holds everything, every page of it touched."""
    _, num_blocks = layout(num_tokens, 1)
    shape = KvShape(
        layers=range(LAYERS),
        heads=range(KV_HEADS),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        row_bytes=HEAD_DIM * ITEM_BYTES,
    )
    layers = []
    for layer in range(LAYERS):
        mapped = mmap.mmap(-1, shape.layer_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(mapped)
        for at in range(0, len(view), 1 << 20):
            piece = view[at : at + (1 << 20)]
            piece[:] = random.Random(layer).randbytes(len(piece)) if at == 0 else bytes(view[: len(piece)])
        layers.append(view)
    return KvMemory(shape, layers), layers


def blocks_of(num_tokens: int, most_tokens: int) -> list[int]:
    """Return blocks as a cache that has been in use hands them out: in no order."""
    blocks = list(range(-(-most_tokens // BLOCK_SIZE)))
    random.Random(7).shuffle(blocks)
    return blocks[: -(-num_tokens // BLOCK_SIZE)]


def end(
    way: Way, replica: str, kv: KvMemory, *, address: str, streams: int
) -> tuple[StreamTransport, LockedGate, KvOffer]:
    """Return one end of one way."""
    whole, _ = layout(1, 1)
    offer = KvOffer(
        replica=replica,
        incarnation=1,
        rank=0,
        layout=whole,
        model="bench",
        dtype="bfloat16",
        head_dim=HEAD_DIM,
        checksum="xxh3" if way.checksum else "none",
    )
    gate = LockedGate(
        Incoming(
            rank=0,
            incarnation=1,
            layout=whole,
            num_blocks=kv.shape.num_blocks,
            entry_bytes=kv.shape.entry_bytes,
        )
    )
    transport = StreamTransport(
        Tcp() if way.transport == "tcp" else Shm(),
        offer,
        gate,
        address=address,
        secret=SECRET,
        clock=time.monotonic,
        limits=StreamLimits(streams=streams),
    )
    transport.register(kv)
    return transport, gate, offer


class Sender:
    """The sending end of one way."""

    def __init__(self, way: Way, kv: KvMemory, to: str, *, streams: int, folder: str, most_tokens: int) -> None:
        address = "127.0.0.1:0" if way.transport == "tcp" else f"unix:{folder}/from-{way.checksum}"
        self.transport, _, self.offer = end(way, "prefill", kv, address=address, streams=streams)
        self._to = self.transport.connect(to, "decode", timeout_s=PATIENCE_S)
        self._kv = kv
        self._most_tokens = most_tokens

    def send(self, number: int, num_tokens: int, frame_bytes: int) -> None:
        """Send a prompt's KV, all of it computed."""
        outgoing = Outgoing(
            rank=0, layout=self.offer.layout, entry_bytes=self._kv.shape.entry_bytes, max_frame_bytes=frame_bytes
        )
        transfer = TransferId("prefill", 1, number)
        outgoing.track(transfer)
        outgoing.add_blocks(transfer, blocks_of(num_tokens, self._most_tokens))
        grant = OpenSending(transfer=transfer, generation=1, to=Peer("decode", 1), tokens=range(num_tokens), blocks=())
        outgoing.open(grant, self.offer.layout)
        for layer in range(LAYERS):
            outgoing.computed(transfer, layer, num_tokens)
            self._pump(outgoing)
        while not outgoing.take_reports():
            for event in self.transport.poll(PATIENCE_S):
                if isinstance(event, Released):
                    outgoing.released(event.frame, sent=event.sent)
            self._pump(outgoing)

    def _pump(self, outgoing: Outgoing) -> None:
        while (post := outgoing.next_post()) is not None and self.transport.post(post):
            assert post.to == PeerRank(Peer("decode", 1), 0) == self._to
            outgoing.posted()


def receive(folder: str, streams: int, most_tokens: int) -> None:
    """Be the receiving process until standard input ends."""
    kv, layers = memory(most_tokens)
    ends = {}
    for way in WAYS:
        address = "127.0.0.1:0" if way.transport == "tcp" else f"unix:{folder}/to-{way.checksum}"
        ends[way.name] = end(way, "decode", kv, address=address, streams=streams)
    raw = RawListener(layers)
    answer({"addresses": {name: each[0].address for name, each in ends.items()}, "raw": raw.port})
    for line in sys.stdin:
        command = json.loads(line)
        begin_s = time.process_time()
        if "raw_bytes" in command:
            raw.receive(command["streams"], command["raw_bytes"], walk=command["walk"])
            answer({"cpu_s": time.process_time() - begin_s})
            continue
        transport, gate, offer = ends[command["way"]]
        transfer = TransferId("prefill", 1, command["number"])
        blocks = tuple(blocks_of(command["tokens"], most_tokens))
        with gate.lock:
            gate.incoming.open(
                OpenReceiving(transfer=transfer, generation=1, tokens=range(command["tokens"]), blocks=blocks),
                offer.layout,
            )
            gate.incoming.take_reports()
        answer({"open": True})
        wait_until_done(transport, gate)
        answer({"cpu_s": time.process_time() - begin_s})
        with gate.lock:
            gate.incoming.close(transfer, 1)
            gate.incoming.take_reports()
    for transport, _, _ in ends.values():
        transport.close()


def wait_until_done(transport: StreamTransport, gate: LockedGate) -> None:
    """Wait until everything is applied and checked."""
    while True:
        transport.poll(PATIENCE_S)
        with gate.lock:
            reports: Sequence[object] = gate.incoming.take_reports()
        if any(isinstance(report, RankDone) for report in reports):
            return
        assert not reports, reports


def answer(values: dict[str, object]) -> None:
    """Say something to the sending process."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    receive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
