"""``slipstream profile`` on a small model: steps are really measured, and planning takes the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slipstream.kernels.cpu.row_buckets import LARGEST, bucket
from slipstream.placement.calibration import calibrate
from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.model_cut import Cut
from slipstream.placement.plan import Degrees
from slipstream.placement.replica_links import NO_LINKS
from slipstream.placement.step_cost import StepCost, filled_rows
from slipstream.runtime.cluster.plan_command import plan_command
from slipstream.runtime.cluster.profile_file import read_profile
from slipstream.runtime.profiler.main import run_profile
from slipstream.runtime.profiler.measure import MeasuredRank, ProfileOptions
from slipstream.runtime.profiler.points import PlanWriter, StepPoint, table_points

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples" / "demo_model")
CONFIG = ROOT / "cluster_configs" / "laptop.yaml"
OPTIONS = ProfileOptions(model=MODEL, device="cpu", num_threads=1, positions=320, most_batch=4)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    run_profile(OPTIONS, device_type="cpu-core", path=file, announce=lambda _: None)
    return file


def test_a_table_is_measured_and_read_back(table: Path) -> None:
    profile = read_profile(table)
    points = table_points(longest=320, positions=320, most_batch=4)
    assert len(profile.steps) == len(points) > 8
    assert {(step.tokens, step.context, step.batch) for step in profile.steps} == {
        (point.tokens, point.context, point.batch) for point in points
    }
    by_tokens = {step.tokens: step.seconds for step in profile.steps if step.tokens and not step.context}
    assert by_tokens[256] > by_tokens[8], "32 times the tokens take longer"
    assert profile.traits is not None and profile.traits.base_bytes > 0


def test_what_was_measured_is_predicted(table: Path) -> None:
    """The form of the model must be able to say the times that it was given."""
    profile = read_profile(table)
    device, cut = DEVICE_TABLE["cpu-core"], Cut(model=profile.sizes, degrees=Degrees())
    found = calibrate(profile.steps, cut=cut, device=device, start=profile.start)
    cost = StepCost(cut=cut, device=device, links=NO_LINKS, efficiency=found)
    for step in profile.steps:
        assert cost.stage(0, step.step).seconds == pytest.approx(step.seconds, rel=0.5)


def test_planning_goes_by_a_table(table: Path) -> None:
    plain, _ = plan_command(CONFIG, topology=None, as_json=True)
    measured, found = plan_command(CONFIG, topology=None, profiles=[table], as_json=True)
    assert found and measured != plain


def test_measured_steps_compute_what_an_engine_would() -> None:
    """The cache behind a step holds keys and values: with other blocks the model draws from other logits."""
    rank = MeasuredRank(OPTIONS)
    try:
        caches = rank._executor._cache.layers
        assert all(bool((layer != 0).any(dim=(0, 2, 3, 4)).all()) for layer in caches), "a block was never written"
        assert all(bool(torch.isfinite(layer).all()) for layer in caches)
        assert rank.seconds(StepPoint(batch=2, context=100)) > 0
    finally:
        rank.close()


def test_blocks_of_a_steps_sequences_are_their_own() -> None:
    writer = PlanWriter(block_size=16, num_blocks=64)
    plan = writer.plan(StepPoint(batch=4, context=100), first=True)
    blocks = [block for admitted in plan.admitted for block in admitted.block_ids.tolist()]
    assert len(set(blocks)) == len(blocks) == 4 * 7
    assert not writer.plan(StepPoint(batch=4, context=100), first=False).admitted


def test_rows_are_filled_up_as_the_kernels_do() -> None:
    for rows in range(1, 3 * LARGEST):
        pieces, rest = divmod(rows, LARGEST)
        assert filled_rows(rows) == pieces * LARGEST + (bucket(rest) if rest else 0)
