"""What a desk needs of the lines between drivers: the protocol; ``talk_lines`` has it over ``KvTalk``."""

from __future__ import annotations

from typing import Protocol

from ...comm.kv.transfer import FromReceiver, FromSender, Peer
from ...placement.kv_routes import KvLayout
from .rank_orders import KvTarget


class LineEvents(Protocol):
    """Who is told what comes over the lines; called from any thread, and never waits."""

    def heard_sender(self, message: FromSender, peer: Peer) -> None:
        """A life of a replica that sends to this one says something."""
        ...

    def heard_receiver(self, message: FromReceiver, peer: Peer) -> None:
        """A life of a replica that this one sends to says something."""
        ...

    def receiver_refused(self, replica: str) -> None:
        """A replica that this one would send to has KV of another kind, or wants none of ours."""
        ...


class Lines(Protocol):
    """Lines to replicas that this one sends to, and from those that send to it. Nothing here waits."""

    def listen(self, events: LineEvents) -> None:
        """Tell somebody what comes; called once, before anything else."""
        ...

    def open(self, replica: str, address: str) -> bool:
        """Have a line to a replica's driver, which may be there already; return whether there can be one."""
        ...

    def say_to_receiver(self, replica: str, message: FromSender) -> bool:
        """Say something to a replica that this one sends to; False when there is no line, or too much waits on it."""
        ...

    def say_to_sender(self, replica: str, message: FromReceiver) -> bool:
        """Say something to the newest life of a replica that sends to this one; False as above."""
        ...

    def target(self, peer: Peer) -> KvTarget | None:
        """Return where the ranks of a life that this one sends to take KV in; None of one that was never met."""
        ...

    def source(self, peer: Peer) -> KvLayout | None:
        """Return the layout of a life that sends to this one; None of one that was never met."""
        ...

    def close(self) -> None:
        """Leave all lines. Idempotent."""
        ...
