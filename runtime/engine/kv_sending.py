"""What the scheduler does for sequences whose KV goes to another replica while it is computed.

Such a sequence is submitted with a *send* token, which means something to ``KvSending`` alone. When it begins to run, a
transfer is asked for; from then on the transfer owns the sequence's blocks too, old and new ones, until it is over.
Knows neither the transfers' machines nor how bytes travel.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from .loans import Loans
from .sequence import Sequence
from .slots import SlotTable


class KvSending(Protocol):
    """Who carries KV to other replicas. Called while a step is planned or a request aborted; must not wait."""

    def start(self, sequence: Sequence) -> int | None:
        """Begin a transfer for a sequence submitted with ``send`` that begins to run, its blocks and slot known; return
        its number, never used before in this life, or None: its KV is not sent.

        Called each time that it begins to run, so again after an interruption. Must not let go of the number's blocks
        before it has returned.
        """
        ...

    def stop(self, number: int) -> None:
        """End a transfer whose sequence was interrupted, aborted or failed before its token came.

        The blocks stay the transfer's until ``Scheduler.release_sent``, which may be called from in here.
        """
        ...


def sent_key(number: int) -> Hashable:
    """Return under which key ``Loans`` knows the blocks of a transfer that is sent."""
    return ("out", number)


class SentSequences:
    """The sequences of a scheduler that are sent. ``carrier``: None where nothing is."""

    def __init__(self, carrier: KvSending | None, loans: Loans, table: SlotTable) -> None:
        self.carrier = carrier
        self._loans = loans
        self._table = table
        # Those whose blocks are held, by number; a sequence may go on when its transfer is over.
        self._held: dict[int, Sequence] = {}

    def begin(self, sequence: Sequence) -> None:
        """Ask for a transfer for a sequence that has just got its slot and blocks, if it is to be sent."""
        if sequence.send is None or self.carrier is None:
            return
        number = self.carrier.start(sequence)
        if number is not None:
            sequence.transfer = number
            self._held[number] = sequence
            self._table.send(sequence.slot, number)
            self._loans.hold(sent_key(number), sequence.blocks)

    def add_blocks(self, sequence: Sequence, blocks: list[int]) -> None:
        """Let the transfer of a running sequence, if it has one, own the blocks that were added."""
        if sequence.transfer is not None and sequence.transfer in self._held:
            self._loans.hold(sent_key(sequence.transfer), blocks)

    def check(self) -> None:
        """Assert that the slots which are sent are those of running sequences whose transfer is not over."""
        sent = {one.slot: number for number, one in self._held.items() if one.transfer == number and one.slot >= 0}
        slots = self._table.sent_slots()
        assert slots == sent, f"slots {slots} are said to be sent, {sent} are"

    def stop(self, sequence: Sequence) -> None:
        """End the transfer of a sequence that leaves its slot before its token came, if it has one."""
        number, sequence.transfer = sequence.transfer, None
        if number is not None and self.carrier is not None:
            self.carrier.stop(number)

    def release(self, number: int) -> None:
        """Take a transfer that is over off its blocks; a sequence that still runs is sent no longer."""
        sequence = self._held.pop(number)
        if sequence.slot >= 0 and sequence.transfer == number:
            self._table.keep(sequence.slot)
        self._loans.release(sent_key(number))
