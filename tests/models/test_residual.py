"""The residual stream by itself: whole or in shares, and the order in which a ladder adds, waits and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.overlap import Parts, Steps, run_plain
from slipstream.comm.overlap_meter import OverlapMeter
from slipstream.kernels.norm import rms_norm
from slipstream.kernels.quantize_rows import ByteRows
from slipstream.runtime.models.parallel import Output
from slipstream.runtime.models.residual import open_residual
from slipstream.tests.fakes.scripted_work import HandClock, ScriptedWork

HIDDEN = 32
EPSILON = 1e-6
NORM_H = 1 + torch.arange(HIDDEN) / HIDDEN
END_NORM_H = 2 - torch.arange(HIDDEN) / HIDDEN


@dataclass(frozen=True, kw_only=True)
class Made:
    """An output of a module, as every rank has it: partial ones are to be summed."""

    by_rank: list[Tensor]
    partial: bool


def outputs(ranks: int, tokens: int, generator: torch.Generator, dtype: torch.dtype) -> list[Made]:
    def draw() -> Tensor:
        return torch.randn((tokens, HIDDEN), generator=generator).to(dtype)

    return [Made(by_rank=[draw() for _ in range(ranks)], partial=True) for _ in range(3)] + [
        Made(by_rank=[draw()] * ranks, partial=False),
        Made(by_rank=[draw() for _ in range(ranks)], partial=True),
    ]


def run_through(
    group: Collectives,
    x_TH: Tensor,
    made: Sequence[Made],
    *,
    shares: bool,
    to_next: bool,
    end_norm_H: Tensor | None = None,
) -> Steps[Any]:
    """Return all that is read on the way, and at last what the next stage gets or a final norm."""
    norm_H = NORM_H.to(x_TH.dtype)
    residual, _ = open_residual(x_TH, hidden_size=HIDDEN, epsilon=EPSILON, shares=group if shares else None)
    read: list[Any] = []
    for place, one in enumerate(made):
        output = Output(one.by_rank[group.rank].clone(), group if one.partial else None, end_norm_H)
        if to_next and place == len(made) - 1:
            read.append((yield from residual.end(output, ladder=False)))
        else:
            read.append((yield from residual.add(output, norm_H, ladder=False)))
    return read


@pytest.mark.parametrize("has_end_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to_next", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_give_the_bits_of_the_whole(
    ranks: int, tokens: int, to_next: bool, dtype: torch.dtype, has_end_norms: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn((tokens, HIDDEN), generator=generator).to(dtype)
    made = outputs(ranks, tokens, generator, dtype)
    # A stage may also end with an output that is whole.
    for some in (made, made[:-1]):

        def run(group: Collectives, some: Sequence[Made] = some) -> None:
            how: dict[str, Any] = {"to_next": to_next, "end_norm_H": END_NORM_H if has_end_norms else None}
            whole = run_plain(run_through(group, x_TH, some, shares=False, **how))
            shared = run_plain(run_through(group, x_TH, some, shares=True, **how))
            for mine, theirs in zip(shared, whole, strict=True):
                assert mine.shape == (tokens, HIDDEN)
                assert torch.equal(mine, theirs)

        run_ranks(local_group(ranks), run)


@pytest.mark.parametrize("has_end_norms", [False, True])
def test_the_whole_way_adds_and_normalizes(has_end_norms: bool, seed: int) -> None:
    end_norm_H = END_NORM_H if has_end_norms else None
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn((3, HIDDEN), generator=generator)
    made = outputs(2, 3, generator, torch.float32)

    def run(group: Collectives) -> None:
        read = run_plain(run_through(group, x_TH, made, shares=False, to_next=True, end_norm_H=end_norm_H))
        total_TH = x_TH
        for place, one in enumerate(made):
            added_TH = torch.stack(one.by_rank).sum(0) if one.partial else one.by_rank[0]
            total_TH = total_TH + (added_TH if end_norm_H is None else rms_norm(added_TH, end_norm_H, EPSILON))
            expected_TH = total_TH if place == len(made) - 1 else rms_norm(total_TH, NORM_H, EPSILON)
            torch.testing.assert_close(read[place], expected_TH)

    run_ranks(local_group(2), run)


@pytest.mark.parametrize("ladder", [False, True])
def test_who_takes_numbers_of_8_bits_gets_them_at_once(ladder: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TH, made_TH = torch.randn((2, 3, HIDDEN), generator=generator)
    for takes in (torch.int8, None):
        residual, _ = open_residual(x_TH, hidden_size=HIDDEN, epsilon=EPSILON, shares=None)
        read = run_plain(residual.add(Output(made_TH.clone()), NORM_H, ladder=ladder, takes=takes))
        plain_TH = rms_norm(x_TH if ladder else x_TH + made_TH, NORM_H, EPSILON)
        if takes is None:
            assert isinstance(read, Tensor)
            torch.testing.assert_close(read, plain_TH)
        else:
            assert isinstance(read, ByteRows) and read.dtype == x_TH.dtype and read.values_TH.dtype == takes
            # The nearest multiple of the row's scale.
            assert ((read.values_TH * read.scales_T1 - plain_TH).abs() <= 0.501 * read.scales_T1).all()
        end_TH = run_plain(residual.end(Output(made_TH.clone()), ladder=False))
        torch.testing.assert_close(end_TH, x_TH + 2 * made_TH)


# ------------------------------------------------------------------ ladders


@dataclass
class ScriptedGroup:
    """Stands in for a group whose sums take ``lasts_s``; notes when they begin and when they are waited for."""

    clock: HandClock
    lasts_s: float
    log: list[str] = field(default_factory=list)
    sums: int = 0

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> ScriptedWork:
        assert op == "sum"
        self.log.append(f"begin {self.sums}")
        self.sums += 1
        return ScriptedWork(self.clock, self.lasts_s, name=str(self.sums - 1), log=self.log)


def ladder_pass(group: Any, clock: HandClock, log: list[str], ladders: Sequence[bool]) -> Parts:
    """Modules that compute for a second each; ``ladders`` says of each what it reads."""
    x_TH = torch.zeros((2, HIDDEN))
    residual, normed_TH = open_residual(x_TH, hidden_size=HIDDEN, epsilon=EPSILON, shares=None)
    for module in range(len(ladders)):
        log.append(f"compute {module}")
        clock.advance(1.0)
        following = ladders[module + 1] if module + 1 < len(ladders) else False
        read = yield from residual.add(Output(normed_TH.clone(), group), NORM_H, ladder=following)
        assert isinstance(read, Tensor)
        normed_TH = read
    return normed_TH


def test_a_ladders_sum_is_on_the_wire_while_the_next_module_computes() -> None:
    clock = HandClock()
    group = ScriptedGroup(clock, lasts_s=1.0)
    meter = OverlapMeter(clock, wire_s=lambda _: 1.0)
    run_plain(ladder_pass(group, clock, group.log, [True] * 4), meter=meter)
    assert group.log == [
        *("compute 0", "begin 0"),
        *("compute 1", "begin 1", "wait 0"),
        *("compute 2", "begin 2", "wait 1"),
        *("compute 3", "begin 3", "wait 2", "wait 3"),
    ]
    # All but the last sum, behind which nothing is left to compute.
    assert clock() == 5.0
    assert (meter.totals.wire_s, meter.totals.hidden_s) == (4.0, 3.0)


def test_layers_without_a_ladder_wait_for_all() -> None:
    clock = HandClock()
    group = ScriptedGroup(clock, lasts_s=1.0)
    meter = OverlapMeter(clock, wire_s=lambda _: 1.0)
    run_plain(ladder_pass(group, clock, group.log, [False, False, True, True, False]), meter=meter)
    assert group.log == [
        *("compute 0", "begin 0", "wait 0"),
        *("compute 1", "begin 1"),
        *("compute 2", "begin 2", "wait 1"),
        *("compute 3", "begin 3", "wait 2", "wait 3"),
        *("compute 4", "begin 4", "wait 4"),
    ]
    assert (meter.totals.wire_s, meter.totals.hidden_s) == (5.0, 2.0)


def test_without_a_ladder_nothing_is_hidden() -> None:
    clock = HandClock()
    group = ScriptedGroup(clock, lasts_s=1.0)
    meter = OverlapMeter(clock, wire_s=lambda _: 1.0)
    run_plain(ladder_pass(group, clock, group.log, [False] * 4), meter=meter)
    assert (meter.totals.wire_s, meter.totals.hidden_s) == (4.0, 0.0)


@pytest.mark.parametrize("partial", [True, False])
def test_a_ladder_reads_all_but_the_last_output_also_across_stages(partial: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn((3, HIDDEN), generator=generator)
    made = [torch.randn((2, 3, HIDDEN), generator=generator) for _ in range(4)]
    sums = [one.sum(0) if partial else one[0] for one in made]

    def take(group: Collectives, place: int) -> Output:
        return Output(made[place][group.rank if partial else 0].clone(), group if partial else None)

    def first_stage(group: Collectives) -> Parts:
        residual, _ = open_residual(x_TH, hidden_size=HIDDEN, epsilon=EPSILON, shares=None)
        read_TH = yield from residual.add(take(group, 0), NORM_H, ladder=True)
        torch.testing.assert_close(read_TH, rms_norm(x_TH, NORM_H, EPSILON))
        return (yield from residual.end(take(group, 1), ladder=True))

    def second_stage(group: Collectives, hidden_TH: Tensor) -> Parts:
        residual, read_TH = open_residual(hidden_TH, hidden_size=HIDDEN, epsilon=EPSILON, shares=None)
        torch.testing.assert_close(read_TH, x_TH + sums[0])
        read = yield from residual.add(take(group, 2), NORM_H, ladder=True)
        torch.testing.assert_close(read, rms_norm(x_TH + sums[0] + sums[1], NORM_H, EPSILON))
        last = yield from residual.add(take(group, 3), NORM_H, ladder=False)
        assert isinstance(last, Tensor)
        return last

    def run(group: Collectives) -> None:
        passed_TH = run_plain(first_stage(group))
        assert passed_TH.shape == (3, 2 * HIDDEN)
        read_TH = run_plain(second_stage(group, passed_TH))
        torch.testing.assert_close(read_TH, rms_norm(x_TH + torch.stack(sums).sum(0), NORM_H, EPSILON))

    run_ranks(local_group(2), run)
