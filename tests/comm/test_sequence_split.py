"""How rows are divided: each token once, no block of the cache in two pieces, even work, short rows left alone."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from slipstream.comm.sequence_split import SequenceSplit, StepDivision, tokens_of


def divide(rows: list[tuple[int, int]], *, ranks: int, fewest: int = 1, grain: int = 4) -> list[StepDivision] | None:
    """Divide rows of (start, count), as each rank sees it."""
    starts, counts = np.array(rows, dtype=np.int32).T
    divisions = [
        SequenceSplit(rank=rank, ranks=ranks, fewest_tokens=fewest, grain=grain).divide(starts, counts)
        for rank in range(ranks)
    ]
    found = [division for division in divisions if division is not None]
    assert len(found) in (0, ranks), "all ranks divide, or none"
    return found or None


def test_short_rows_are_computed_by_all() -> None:
    assert divide([(0, 1), (7, 15), (100, 1)], ranks=2) is None
    assert divide([(0, 99), (5, 1)], ranks=2, fewest=100) is None
    divisions = divide([(3, 1), (0, 100), (9, 15)], ranks=2)
    assert divisions is not None
    for division in divisions:
        assert division.whole.tolist() == [0, 2]
        assert {piece.row for piece in division.own} == {1}
        assert tokens_of(division.computed).tolist()[:16] == [0, *range(101, 116)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tokens_are_divided_and_pieces_end_at_blocks(ranks: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(50):
        grain = draw.choice([1, 4, 16])
        rows = [(draw.randrange(100), draw.randrange(1, 300)) for _ in range(draw.randrange(1, 6))]
        divisions = divide(rows, ranks=ranks, grain=grain)
        if divisions is None:
            assert all(count < 2 * ranks * grain for _, count in rows)
            continue
        first_tokens = [0, *itertools.accumulate(count for _, count in rows)]
        whole = set(divisions[0].whole.tolist())
        assert whole == {row for row, (_, count) in enumerate(rows) if count < 2 * ranks * grain}
        tokens = np.concatenate([tokens_of(division.own) for division in divisions])
        expected = [
            token
            for row in range(len(rows))
            if row not in whole
            for token in range(first_tokens[row], first_tokens[row + 1])
        ]
        assert sorted(tokens.tolist()) == expected
        for division in divisions:
            assert division.pieces == divisions[0].pieces
            assert division.num_tokens == len(tokens_of(division.computed))
            for number, pieces in enumerate(division.pieces):
                assert [piece.row for piece in pieces] == [row for row in range(len(rows)) if row not in whole]
                for piece in pieces:
                    start, count = rows[piece.row]
                    assert piece.start < piece.end
                    assert piece.token == first_tokens[piece.row] + piece.start - start
                    assert piece.start == start if number == 0 else piece.start % grain == 0
                    assert piece.end == start + count if number == 2 * ranks - 1 else piece.end % grain == 0


def test_the_last_token_of_a_row_is_the_first_ranks() -> None:
    divisions = divide([(5, 77), (0, 64), (31, 40)], ranks=4)
    assert divisions is not None
    own = [set(tokens_of(division.own).tolist()) for division in divisions]
    assert {76, 77 + 63, 77 + 64 + 39} <= own[0]


def test_what_divides_is_divided_evenly() -> None:
    divisions = divide([(0, 2048)], ranks=4, fewest=512, grain=64)
    assert divisions is not None
    assert divisions[0].tokens_of_piece == [256] * 8
    assert [[piece.start for piece in division.own] for division in divisions] == [
        [0, 1792], [256, 1536], [512, 1280], [768, 1024],
    ]  # fmt: skip
