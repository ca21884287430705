"""Calibration gives back the times it was made from, and comes near those between them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from slipstream.placement.calibration import Curve, MeasuredStep, Surface, calibrate, rising
from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.model_cut import Cut
from slipstream.placement.plan import Degrees
from slipstream.placement.replica_links import NO_LINKS
from slipstream.placement.step_cost import Efficiency, StepCost
from slipstream.tests.placement.planning_cases import tiny

DEVICE = DEVICE_TABLE["cpu-core"]
CUT = Cut(model=tiny(), degrees=Degrees())


def cost(efficiency: Efficiency) -> StepCost:
    return StepCost(cut=CUT, device=DEVICE, links=NO_LINKS, efficiency=efficiency)


def table(truth: Efficiency, noise: random.Random | None = None) -> list[MeasuredStep]:
    """Return a table as a device with these shares would give it."""
    points = [dict(tokens=tokens) for tokens in (16, 64, 256, 1024)]
    points += [dict(tokens=128, context=context) for context in (256, 2048)]
    points += [dict(batch=batch, context=context) for batch in (1, 4, 16, 64) for context in (16, 512, 4096)]
    steps = []
    for point in points:
        seconds = cost(truth).stage(0, MeasuredStep(**point, seconds=1.0).step).seconds
        steps.append(MeasuredStep(**point, seconds=seconds * (noise.uniform(0.97, 1.03) if noise else 1.0)))
    return steps


def predicted(efficiency: Efficiency, step: MeasuredStep) -> float:
    return cost(efficiency).stage(0, step.step).seconds


def test_measured_steps_are_given_back(seed: int) -> None:
    truth = replace(
        Efficiency(), compute=0.2, bandwidth=0.9, attention_bandwidth=0.1, attention_compute=0.05, step_s=2e-3
    )
    steps = table(truth, random.Random(seed))
    found = calibrate(steps, cut=CUT, device=DEVICE)
    for step in steps:
        assert predicted(found, step) == pytest.approx(step.seconds, rel=0.1), step


def test_steps_between_are_near_what_a_device_would_take() -> None:
    truth = replace(
        Efficiency(), compute=0.2, bandwidth=0.9, attention_bandwidth=0.1, attention_compute=0.05, step_s=2e-3
    )
    found = calibrate(table(truth), cut=CUT, device=DEVICE)
    uncalibrated = cost(Efficiency())
    for point in (
        dict(tokens=500), dict(tokens=100), dict(tokens=128, context=1000), dict(batch=8, context=2000),
        dict(batch=40, context=300), dict(batch=2, context=100),
    ):  # fmt: skip
        step = MeasuredStep(**point, seconds=1.0).step
        wanted = cost(truth).stage(0, step).seconds
        assert cost(found).stage(0, step).seconds == pytest.approx(wanted, rel=0.15), point
        assert abs(uncalibrated.stage(0, step).seconds / wanted - 1) > 0.1, "the device is unlike the table's"


def test_a_table_of_one_kind_says_something_about_the_other() -> None:
    truth = replace(Efficiency(), compute=0.1, bandwidth=0.1)
    steps = [step for step in table(truth) if step.batch]
    found = calibrate(steps, cut=CUT, device=DEVICE)
    step = MeasuredStep(tokens=64, seconds=1.0)
    slow, plain = predicted(found, step), predicted(Efficiency(), step)
    assert slow > 2 * plain


def test_curves_are_straight_between_points_and_level_outside() -> None:
    curve = Curve(((10.0, 1.0), (1000.0, 4.0)))
    assert [curve(size) for size in (1, 10, 1000, 1e6)] == pytest.approx([1, 1, 4, 4])
    assert curve(100) == pytest.approx(2.0)
    assert Curve(())(5) == 1.0
    assert Surface(((1.0, curve), (100.0, Curve(((10.0, 3.0),)))))(100, 7) == pytest.approx(3.0)


def test_noise_is_evened_out() -> None:
    assert rising([1.0, 3.0, 2.0, 2.5, 5.0]) == pytest.approx([1.0, 2.5, 2.5, 2.5, 5.0])
    truth = replace(Efficiency(), attention_bandwidth=0.1)
    steps = [
        replace(step, seconds=step.seconds * 0.9) if step.batch == 4 and step.context == 512 else step
        for step in table(truth)
    ]
    found = calibrate(steps, cut=CUT, device=DEVICE)
    wanted = cost(truth).stage(0, MeasuredStep(batch=4, context=512, seconds=1.0).step).seconds
    assert predicted(found, MeasuredStep(batch=4, context=512, seconds=1.0)) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("wrong", [{}, {"tokens": 1, "batch": 1}, {"tokens": 1, "context": -1}])
def test_steps_that_cannot_have_been_measured_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="measured step"):
        MeasuredStep(**wrong, seconds=1.0)
    with pytest.raises(ValueError, match="took some time"):
        MeasuredStep(tokens=1, seconds=0.0)
