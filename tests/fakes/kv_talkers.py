"""Two drivers that note what they hear of one another, and what they may say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from slipstream.comm.errors import KvMismatch
from slipstream.comm.kv.layout import KvOffer, check_fit
from slipstream.comm.kv.transfer import (
    Acknowledged,
    Deferred,
    End,
    Ending,
    Finish,
    FromReceiver,
    FromSender,
    Granted,
    Heartbeat,
    Reserve,
    TransferId,
)
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.rpc.kv_talk import KvFacts, KvLine

LAYOUT = KvLayout(layers=4, kv_heads=2, block_size=16)
TRANSFER = TransferId("p-1", 7, 3)

FROM_SENDER: tuple[FromSender, ...] = (
    Reserve(transfer=TRANSFER, generation=1, tokens=99, timeout_s=2.5, hint=b"ticket"),
    Heartbeat(alive=((TRANSFER, 1), (TransferId("p-1", 7, 4), 2))),
    Finish(transfer=TRANSFER, generation=1, hand_off=b"token"),
    End(transfer=TRANSFER, generation=1, ending=Ending.CANCELLED),
)
FROM_RECEIVER: tuple[FromReceiver, ...] = (
    Deferred(transfer=TRANSFER, generation=1),
    Granted(transfer=TRANSFER, generation=1, blocks=(5, 1, 9), first_token=16),
    Heartbeat(alive=()),
    Acknowledged(transfer=TRANSFER, generation=1),
    End(transfer=TRANSFER, generation=1, ending=Ending.NO_ROOM),
)


def facts(replica: str, incarnation: int = 1, *, model: str = "m", layout: KvLayout = LAYOUT) -> KvFacts:
    offer = KvOffer(
        replica=replica,
        incarnation=incarnation,
        rank=0,
        layout=layout,
        model=model,
        dtype="bfloat16",
        head_dim=8,
    )
    return KvFacts(
        replica=replica,
        incarnation=incarnation,
        layout=layout,
        ends=tuple({"tcp": f"10.0.0.1:{rank + 1}", "shm": f"/run/{rank}"} for rank in range(layout.ranks)),
        host_id="host-a",
        offer=offer,
    )


def check(ours: KvFacts, theirs: KvFacts) -> None:
    if ours.offer is None or theirs.offer is None:
        raise KvMismatch("an offer is missing")
    check_fit(ours.offer, theirs.offer)


@dataclass
class NotingHost:
    """A ``KvHost``."""

    facts: KvFacts = field(default_factory=lambda: facts("d-1"))
    lines: list[KvLine] = field(default_factory=list)
    heard: list[tuple[KvLine, FromSender]] = field(default_factory=list)
    gone: list[KvLine] = field(default_factory=list)

    def greet(self, theirs: KvFacts, line: KvLine) -> None:
        check(self.facts, theirs)
        self.lines.append(line)

    def hear(self, line: KvLine, message: FromSender) -> None:
        self.heard.append((line, message))

    def left(self, line: KvLine) -> None:
        self.gone.append(line)

    @property
    def messages(self) -> list[FromSender]:
        return [message for _, message in self.heard]


@dataclass
class NotingEar:
    """A ``KvEar``."""

    ours: KvFacts = field(default_factory=lambda: facts("p-1", 7))
    lives: list[KvFacts] = field(default_factory=list)
    heard: list[FromReceiver] = field(default_factory=list)
    losses: list[Exception] = field(default_factory=list)

    def met(self, theirs: KvFacts) -> None:
        self.lives.append(theirs)
        check(self.ours, theirs)

    def hear(self, message: FromReceiver) -> None:
        assert self.lives, "words of somebody who was not met"
        self.heard.append(message)

    def lost(self, error: Exception) -> None:
        self.losses.append(error)


def other_model(known: KvFacts) -> KvFacts:
    assert known.offer is not None
    return replace(known, offer=replace(known.offer, model="another"))
