"""KV over a shaped link while a prompt is computed: how much of it is still to come when prefill ends, and how long.

Two processes on hosts of their own (network namespaces). Prefill is a clock: after so many milliseconds each, a layer
of a chunk is there, as from a device that is busy with nothing else; wire and copies are real. What decoding needs is
there when the receiver has applied and checked the last byte. *By layers*: each is posted as soon as it is computed.
*Serial*: all of them when the prompt is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from slipstream.benchmarks.kv.ends import (
    LAYERS,
    PATIENCE_S,
    TOKEN_BYTES,
    Way,
    answer,
    blocks_of,
    end,
    memory,
)
from slipstream.comm.kv.incoming import Incoming
from slipstream.comm.kv.outgoing import Outgoing
from slipstream.comm.kv.transfer import OpenReceiving, OpenSending, Peer, RankDone, TransferId
from slipstream.comm.kv.transport import KvTransport, LockedGate, Released, Written
from slipstream.tests.multinode.namespaces import Host, hosts

TOKENS = 2048
CHUNK = 512
STREAMS = 2
FRAME_BYTES = 8 << 20
WAY = Way(transport="tcp", checksum=True)
ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPoint:
    """Medians of rounds at one link and one length of prefill.

    ``wire_share``: time that the wire needs for the bytes, over prefill's. ``unsent_layers``: bytes that were not
    applied when prefill ended, in layers of a chunk. ``extra``: time from then on, over prefill's, with layers posted
    as they are computed, and ``extra_serial`` at the end. Units: mbit_per_s; seconds
    """

    mbit_per_s: int
    wire_share: float
    prefill_s: float
    unsent_mib: float
    unsent_layers: float
    extra_s: float
    extra: float
    extra_serial_s: float
    extra_serial: float


def measure_links(speeds: list[int], wire_shares: tuple[float, ...] = (0.25, 0.5, 0.9, 1.5)) -> Iterator[LinkPoint]:
    """Yield all points; needs root."""
    for mbit_per_s in speeds:
        with hosts(2) as (source, target):
            for host in (source, target):
                host.shape(mbit_per_s=mbit_per_s)
            with _process(target, "receive", target.address) as receiving:
                assert receiving.stdout is not None and receiving.stdin is not None
                address = json.loads(receiving.stdout.readline())["address"]
                with _process(source, "send", source.address, address) as sending:
                    for share in wire_shares:
                        yield _point(mbit_per_s, share, sending, receiving)
                    _end(sending)
                _end(receiving)


def _point(
    mbit_per_s: int, share: float, sending: subprocess.Popen[str], receiving: subprocess.Popen[str]
) -> LinkPoint:
    prefill_s = TOKENS * TOKEN_BYTES * 8 / (mbit_per_s * 1e6) / share
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for serial in (False, True):
            _say(receiving, {"open": True})
            _say(sending, {"prefill_s": prefill_s, "serial": serial})
            ended_s = _hear(sending)["ended_s"]
            written = _hear(receiving)["written"]
            unsent = TOKENS * TOKEN_BYTES - sum(count for at_s, count in written if at_s <= ended_s)
            found[serial].append((unsent, max(at_s for at_s, _ in written) - ended_s))
    unsent = median(each for each, _ in found[False])
    extra_s, serial_s = (median(each for _, each in found[serial]) for serial in (False, True))
    return LinkPoint(
        mbit_per_s=mbit_per_s,
        wire_share=share,
        prefill_s=prefill_s,
        unsent_mib=unsent / (1 << 20),
        unsent_layers=unsent / (CHUNK * TOKEN_BYTES / LAYERS),
        extra_s=extra_s,
        extra=extra_s / prefill_s,
        extra_serial_s=serial_s,
        extra_serial=serial_s / prefill_s,
    )


# ------------------------------------------------------------------ the two processes


def _process(host: Host, *arguments: str) -> subprocess.Popen[str]:
    command = host.command(sys.executable, "-P", "-m", "slipstream.benchmarks.kv.links", *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _say(process: subprocess.Popen[str], words: dict[str, object]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(words) + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "a process of the benchmark ended"
    words: dict[str, Any] = json.loads(line)
    return words


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(PATIENCE_S)


def receive(host: str) -> None:
    """Be the receiving process: grant a transfer for each line, and say when its frames were applied."""
    kv, _ = memory(TOKENS)
    transport, gate, offer = end(WAY, "decode", kv, address=f"{host}:0", streams=STREAMS)
    answer({"address": transport.address})
    for number, _ in enumerate(sys.stdin):
        transfer = TransferId("prefill", 1, number)
        grant = OpenReceiving(
            transfer=transfer, generation=1, tokens=range(TOKENS), blocks=tuple(blocks_of(TOKENS, TOKENS))
        )
        with gate.lock:
            gate.incoming.open(grant, offer.layout)
            gate.incoming.take_reports()
        written = []
        while not _is_done(gate.incoming, gate):
            for event in transport.poll(PATIENCE_S):
                if isinstance(event, Written):
                    written.append((time.monotonic(), event.frame.payload_bytes(kv.shape.entry_bytes)))
        with gate.lock:
            gate.incoming.close(transfer, 1)
            gate.incoming.take_reports()
        answer({"written": written})
    transport.close()


def _is_done(incoming: Incoming, gate: LockedGate) -> bool:
    with gate.lock:
        return any(isinstance(report, RankDone) for report in incoming.take_reports())


def send(host: str, address: str) -> None:
    """Be the sending process: compute and send a prompt for each line, and say when it was computed."""
    kv, _ = memory(TOKENS)
    transport, _, offer = end(WAY, "prefill", kv, address=f"{host}:0", streams=STREAMS)
    to = transport.connect(address, "decode", timeout_s=PATIENCE_S)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        outgoing = Outgoing(rank=0, layout=offer.layout, entry_bytes=kv.shape.entry_bytes, max_frame_bytes=FRAME_BYTES)
        transfer = TransferId("prefill", 1, number)
        outgoing.track(transfer)
        outgoing.add_blocks(transfer, blocks_of(TOKENS, TOKENS))
        grant = OpenSending(transfer=transfer, generation=1, to=Peer("decode", 1), tokens=range(TOKENS), blocks=())
        assert to.peer == grant.to
        outgoing.open(grant, offer.layout)
        answer({"ended_s": _prefill(outgoing, transport, transfer, asked["prefill_s"], serial=asked["serial"])})
        while not outgoing.take_reports():
            _pump(outgoing, transport, PATIENCE_S)
    transport.close()


def _prefill(
    outgoing: Outgoing, transport: KvTransport, transfer: TransferId, prefill_s: float, *, serial: bool
) -> float:
    """Have the layers of all chunks computed, one at a time; return when the last was."""
    layers = [(layer, stop) for stop in range(CHUNK, TOKENS + 1, CHUNK) for layer in range(LAYERS)]
    begin_s = time.monotonic()
    for index, (layer, stop) in enumerate(layers):
        at_s = begin_s + prefill_s * (index + 1) / len(layers)
        while (left_s := at_s - time.monotonic()) > 0:
            _pump(outgoing, transport, left_s)
        if not serial:
            outgoing.computed(transfer, layer, stop)
    for layer in range(LAYERS) if serial else ():
        outgoing.computed(transfer, layer, TOKENS)
    _pump(outgoing, transport, 0)
    return at_s


def _pump(outgoing: Outgoing, transport: KvTransport, timeout_s: float) -> None:
    while (post := outgoing.next_post()) is not None and transport.post(post):
        outgoing.posted()
    for event in transport.poll(timeout_s):
        if isinstance(event, Released):
            outgoing.released(event.frame, sent=event.sent)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], sys.argv[3])
