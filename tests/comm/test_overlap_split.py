"""Where a step is cut: the cost model against a simulation of it, the choice, rows, and tile waves on a GPU."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from slipstream.comm.overlap_cost import Curve, PassCost
from slipstream.comm.overlap_split import PIECES, Cuts, choose_cuts, cut_rows, part_sizes
from slipstream.comm.overlap_waves import Tiles, choose_wave_cut

COST = PassCost(
    compute_s=Curve.line(fixed_s=5e-3, per_unit_s=2e-4),
    collective_s=Curve.line(fixed_s=2e-4, per_unit_s=1e-8),
    collectives=8,
    bytes_per_token=1024,
)


def test_a_curve_is_straight_between_its_points_flat_before_and_goes_on_after() -> None:
    curve = Curve((10.0, 20.0, 40.0), (1.0, 3.0, 4.0))
    assert [curve(size) for size in (1, 10, 15, 20, 30, 40, 60)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    assert Curve((10.0,), (1.0,))(99) == 1.0
    assert Curve.rising([(20.0, 1.0), (10.0, 2.0)]) == Curve((10.0, 20.0), (2.0, 2.0)), "noise is not a gain"


@pytest.mark.parametrize(
    ("sizes", "seconds", "problem"),
    [((), (), "at least one"), ((1.0, 1.0), (1.0, 2.0), "must increase"), ((1.0,), (-1.0,), "negative")],
)
def test_a_curve_that_cannot_be_is_refused(sizes: tuple[float, ...], seconds: tuple[float, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Curve(sizes, seconds)


@pytest.mark.parametrize(
    ("parts", "work", "expected_s"),
    [
        # Two collectives; compute 1 s and wire 1 s a token.
        ([4], 0.0, 4 + 4 + 4 + 4),
        # a computes 0-2, b 2-4, a's sum is there at 4: nobody ever waits, and b's last sum takes 2.
        ([2, 2], 0.0, 2 + 2 + 2 + 2 + 2),
        # a computes 0-1, b 1-4; the wire has a until 2, b 4-7; a computes 4-5, its sum 7-8; b 7-10, its sum 10-13.
        ([1, 3], 0.0, 13),
        # Half of each transfer is the thread's work: a 0-2, works until 3, b 3-5, 6, a 6-8, 9, b 9-11 and its sum.
        ([2, 2], 0.5, 13),
        ([1, 1, 1, 1], 0.0, 4 + 4 + 1),
    ],
)
def test_parts_take_turns_on_one_thread_and_one_wire(parts: list[int], work: float, expected_s: float) -> None:
    cost = PassCost(
        compute_s=Curve.line(fixed_s=0.0, per_unit_s=2.0),
        collective_s=Curve.line(fixed_s=0.0, per_unit_s=1.0),
        collectives=2,
        bytes_per_token=1,
        wire_work=work,
    )
    assert cost.overlapped_s(parts) == pytest.approx(expected_s)


def test_even_parts_come_to_the_longer_of_compute_and_wire() -> None:
    for per_byte_s in (1e-9, 1e-8, 1e-7, 1e-6):
        cost = replace(
            COST,
            compute_s=Curve.line(fixed_s=0.0, per_unit_s=1e-4),
            collective_s=Curve.line(fixed_s=0.0, per_unit_s=per_byte_s),
            collectives=1000,
        )
        ideal_s = max(cost.compute_s(512), cost.wire_s(512))
        assert cost.overlapped_s([256, 256]) == pytest.approx(ideal_s, rel=2e-3)


def test_wire_work_is_never_hidden() -> None:
    cost = replace(COST, wire_work=1.0)
    assert cost.overlapped_s([256, 256]) >= cost.serial_s(512)


@given(
    tokens=st.integers(0, 5000),
    pieces=st.sampled_from(PIECES),
    unit=st.sampled_from([1, 16, 32, 128]),
    fewest=st.integers(0, 600),
)
def test_cuts_leave_all_parts_something_and_never_come_below_the_threshold(
    tokens: int, pieces: int, unit: int, fewest: int
) -> None:
    cuts = choose_cuts(COST, tokens, pieces=pieces, unit=unit, fewest_tokens=fewest)
    if cuts is not None:
        sizes = part_sizes(cuts, tokens)
        assert len(sizes) == pieces
        assert sum(sizes) == tokens
        assert min(sizes) >= unit
        assert not any(cut % unit for cut in cuts)
        assert max(sizes) - min(sizes) < (2 * unit if pieces > 2 else tokens)
        assert tokens >= fewest
        assert COST.overlapped_s(sizes) < COST.serial_s(tokens)


@given(
    fixed_s=st.floats(1e-4, 1e-1),
    per_token_s=st.floats(1e-6, 1e-3),
    per_byte_s=st.floats(1e-10, 1e-6),
    tokens=st.integers(2, 4000),
)
def test_what_is_cut_is_cut_with_more_tokens_too(
    fixed_s: float, per_token_s: float, per_byte_s: float, tokens: int
) -> None:
    cost = PassCost(
        compute_s=Curve.line(fixed_s=fixed_s, per_unit_s=per_token_s),
        collective_s=Curve.line(fixed_s=0.0, per_unit_s=per_byte_s),
        collectives=16,
        bytes_per_token=2048,
    )
    # A margin that is a share of the time asks for more with more tokens.
    if choose_cuts(cost, tokens, unit=1, margin=0.0) is not None:
        assert choose_cuts(cost, 2 * tokens, unit=1, margin=0.0) is not None


def test_few_tokens_a_dear_second_pass_or_a_wire_without_bytes_are_not_cut() -> None:
    assert choose_cuts(COST, 1024) is not None
    assert choose_cuts(COST, 63) is None, "less than two units"
    assert choose_cuts(COST, 1, unit=1) is None
    assert choose_cuts(replace(COST, compute_s=Curve.line(fixed_s=1.0, per_unit_s=2e-4)), 1024) is None
    assert choose_cuts(replace(COST, collective_s=Curve.line(fixed_s=0.0, per_unit_s=0.0)), 1024) is None
    assert choose_cuts(replace(COST, collectives=0), 1024) is None
    assert choose_cuts(replace(COST, wire_work=0.99), 1024) is None


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), data=st.data())
def test_cut_rows_cover_every_token_once_and_in_order(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    if total < 2:
        return
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, total - 1), min_size=1, max_size=3))))
    tokens = [(row, index) for row, length in enumerate(lengths) for index in range(length)]
    parts = cut_rows(lengths, cuts)
    found = [[(piece.row, piece.first + index) for piece in part for index in range(piece.tokens)] for part in parts]
    assert found == [tokens[begin:end] for begin, end in zip((0, *cuts), (*cuts, total), strict=True)]
    assert all(piece.tokens for part in parts for piece in part)


@pytest.mark.parametrize("cuts", [(0,), (7,), (8,), (3, 3), (4, 2)])
def test_an_empty_part_is_refused(cuts: Cuts) -> None:
    with pytest.raises(ValueError, match=f"cuts after {', '.join(map(str, cuts))} of 7 tokens"):
        cut_rows([3, 4], cuts)


TILES = Tiles(multiprocessors=132)


def test_waves_count_what_a_gpu_runs_at_once() -> None:
    assert TILES.waves(128, [132 * 128]) == 1
    assert TILES.waves(128, [132 * 128 + 1]) == 2
    assert TILES.waves(129, [132 * 128, 128]) == 3


def test_a_cut_at_full_waves_costs_none_where_the_middle_would() -> None:
    outputs = [4096]  # 32 tiles a row of tiles: 4 rows, and 4 tiles, fill a wave
    tokens = 128 * 12
    assert TILES.waves(tokens, outputs) == 3
    assert 2 * TILES.waves(tokens // 2, outputs) == 4
    cut = choose_wave_cut(TILES, tokens, outputs, fewest_tokens=0)
    assert cut == 512
    assert TILES.waves(512, outputs) + TILES.waves(1024, outputs) == 3


@given(
    tokens=st.integers(0, 9000),
    outputs=st.lists(st.integers(1, 30000), min_size=1, max_size=4),
    fewest=st.integers(0, 3000),
    extra=st.integers(0, 3),
)
def test_a_wave_cut_keeps_to_its_bounds(tokens: int, outputs: list[int], fewest: int, extra: int) -> None:
    cut = choose_wave_cut(TILES, tokens, outputs, fewest_tokens=fewest, most_extra_waves=extra)
    if cut is None:
        return
    assert tokens >= fewest
    assert 0 < cut < tokens
    assert cut % TILES.rows == 0
    assert TILES.waves(cut, outputs) + TILES.waves(tokens - cut, outputs) <= TILES.waves(tokens, outputs) + extra
