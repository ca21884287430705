"""What the exchange of ``experts`` sends, from the choice of experts alone: to compare placements, and to hold it to.

Pure counting, written apart from the exchange: nothing here is on a request's way. A token goes once to each rank of a
level that leads to one of its experts; what stays on a rank is not moved. One row comes back for each entry: for each
of its experts, or for all of them where they are on one rank.

Shapes: N ranks over all levels, T tokens, A chosen experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .expert_hop import ENTRY_BYTES, HEADER
from .expert_map import ExpertMap
from .whole_tokens import choice_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelTraffic:
    """What passes between ranks on one level, there and, the other way round, back.

    Shapes: all [ranks, ranks] int64, sender first, what stays on a rank included: rows that go there; entries, each of
    which is listed on the way there and returns as a row; 1 where two ranks share a group
    """

    rows_NN: Tensor
    entries_NN: Tensor
    joined_NN: Tensor
    choice_bytes: int
    """Bytes that travel with each row."""

    @property
    def moved_rows(self) -> int:
        """The rows that leave their rank on the way there."""
        return int(self.rows_NN.sum() - self.rows_NN.trace())

    def rows_between_hosts(self, ranks_per_host: int) -> int:
        """Return those of them that leave their host."""
        host_N = torch.arange(len(self.rows_NN)) // ranks_per_host
        return int(self.rows_NN[host_N[:, None] != host_N].sum())

    def bytes_there(self, row_bytes: int) -> Tensor:
        """Return the bytes of a dispatch: counts, lists and rows. [ranks, ranks] int64, sender first."""
        return (
            self.joined_NN * HEADER * 8 + self.entries_NN * ENTRY_BYTES + self.rows_NN * (row_bytes + self.choice_bytes)
        )

    def bytes_back(self, result_bytes: int) -> Tensor:
        """Return the bytes of a combine: a row for each entry. [ranks, ranks] int64, sender first."""
        return self.entries_NN.T * result_bytes


def traffic(choices: Sequence[Tensor], placed: ExpertMap, *, sizes: Sequence[int]) -> tuple[LevelTraffic, ...]:
    """Return what each level sends, outermost first, when rank r's tokens choose the experts ``choices[r]``.

    ``sizes`` are the sizes of the levels' groups: one for a flat exchange, hosts and ranks of a host for two levels.

    Shapes: choices [tokens, chosen] int64, for each rank
    Raises: ValueError when sizes, map and choices are for different numbers of ranks
    """
    ranks = math.prod(sizes)
    if not ranks == placed.ranks == len(choices):
        raise ValueError(f"levels have {ranks} ranks, the map {placed.ranks}, and {len(choices)} choices are given")
    token_K, holder_K, target_K = _entries(choices, placed)
    beside = choice_bytes(choices[0].shape[1])
    levels = []
    behind = ranks
    for size in sizes:
        behind //= size
        # A level moves a row along its own digit of the rank's number.
        next_K = holder_K + (torch.div(target_K, behind, rounding_mode="floor") % size) * behind
        next_K -= (torch.div(holder_K, behind, rounding_mode="floor") % size) * behind
        levels.append(_level(token_K, holder_K, next_K, _joined(ranks, size, behind), beside))
        holder_K = next_K
    return tuple(levels)


def _entries(choices: Sequence[Tensor], placed: ExpertMap) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each entry: the token's number among all, its rank, the rank that it goes to.

    A token's choices that are all on one rank are one entry.
    """
    tokens, holders, targets = [], [], []
    first = 0
    for rank, experts_TA in enumerate(choices):
        count, chosen = experts_TA.shape
        target_TA = placed.slots_NE[rank].cpu()[experts_TA.cpu()] // placed.slots_per_rank
        entry_TA = (target_TA != target_TA[:, :1]).any(1, keepdim=True).expand(count, chosen).clone()
        entry_TA[:, :1] = True
        tokens.append(torch.arange(first, first + count)[:, None].expand(count, chosen)[entry_TA])
        holders.append(torch.full((int(entry_TA.sum()),), rank))
        targets.append(target_TA[entry_TA])
        first += count
    return torch.cat(tokens), torch.cat(holders), torch.cat(targets)


def _level(token_K: Tensor, holder_K: Tensor, next_K: Tensor, joined_NN: Tensor, beside: int) -> LevelTraffic:
    ranks = len(joined_NN)
    pair_K = holder_K * ranks + next_K
    pair_of_row = torch.unique(torch.stack([token_K, pair_K]), dim=1)[1]
    rows, entries = (torch.bincount(pairs, minlength=ranks * ranks) for pairs in (pair_of_row, pair_K))
    return LevelTraffic(
        rows_NN=rows.view(ranks, ranks),
        entries_NN=entries.view(ranks, ranks),
        joined_NN=joined_NN,
        choice_bytes=beside,
    )


def _joined(ranks: int, size: int, behind: int) -> Tensor:
    """Return 1 where two ranks differ in this level's digit alone."""
    rank_N = torch.arange(ranks)
    others_N = rank_N - (torch.div(rank_N, behind, rounding_mode="floor") % size) * behind
    return (others_N[:, None] == others_N).to(torch.int64)
