"""What a sender keeps for receivers that had no room: bounded in blocks, each entry with a lease. Pure.

Knows counts, not blocks: whoever is refused here recomputes elsewhere, which costs time; keeping without a bound costs
every other prompt of the replica.
"""

from __future__ import annotations

from .transfer import TransferId


class ParkedStore:
    """Transfers that wait, and until when each may.

    Units: max_blocks, of all entries together; lease_s, from the last word of the receiver
    """

    def __init__(self, *, max_blocks: int, lease_s: float) -> None:
        self._max_blocks = max_blocks
        self._lease_s = lease_s
        self._blocks: dict[TransferId, int] = {}
        self._until_s: dict[TransferId, float] = {}
        self.blocks = 0
        """Blocks of all entries."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, transfer: TransferId) -> bool:
        return transfer in self._blocks

    def add(self, now_s: float, transfer: TransferId, blocks: int) -> bool:
        """Take a transfer in; False when there is no room, and nothing changed."""
        assert transfer not in self._blocks, f"{transfer} is parked already"
        if self.blocks + blocks > self._max_blocks:
            return False
        self._blocks[transfer] = blocks
        self._until_s[transfer] = now_s + self._lease_s
        self.blocks += blocks
        return True

    def renew(self, now_s: float, transfer: TransferId) -> None:
        """Note that the receiver still wants it; one that is not here stays away."""
        if transfer in self._until_s:
            self._until_s[transfer] = now_s + self._lease_s

    def remove(self, transfer: TransferId) -> None:
        """Give an entry's place back; one that is not here is none."""
        if transfer in self._blocks:
            self.blocks -= self._blocks.pop(transfer)
            del self._until_s[transfer]

    def expired(self, now_s: float) -> list[TransferId]:
        """Return the entries whose lease has run out; they stay until they are removed."""
        return [transfer for transfer, until_s in self._until_s.items() if now_s >= until_s]
