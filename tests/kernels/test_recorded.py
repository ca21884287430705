"""Recordings: the bits of calls made one by one, for inputs that change; what they do not hold is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.cpu.linear_int8 import linear_int8, pack_int8
from slipstream.kernels.cpu.linear_packed import linear_packed, pack_weight
from slipstream.kernels.cpu.recorded import SWITCH, Recording, StepMemory, record, switched_on
from slipstream.kernels.norm import add_rms_norm, normalize_heads_, rms_norm
from slipstream.tests.kernels.native_ways import compiled_or_skip

pytestmark = pytest.mark.usefixtures("compiled")

SIZE = 96
LAYERS = 6

Pass = Callable[[Tensor], Tensor]


def small_model(seed: int, dtype: torch.dtype) -> Pass:
    """Return a pass over rows of ``SIZE`` numbers, of compiled calls alone."""
    torch.manual_seed(seed)
    norms = torch.rand((LAYERS, SIZE)).to(dtype)
    heads = torch.rand((4, SIZE // 4)).to(dtype)
    ups = [pack_weight(torch.randn(2 * SIZE, SIZE).to(dtype)) for _ in range(LAYERS)]
    downs = [pack_int8(torch.randn(SIZE, SIZE).to(dtype)) for _ in range(LAYERS)]

    def run(x_TH: Tensor) -> Tensor:
        residual_TH, normed_TH = x_TH, rms_norm(x_TH, norms[0], 1e-5)
        for norm_H, up, down in zip(norms, ups, downs, strict=True):
            normalize_heads_(normed_TH.view(-1, 4, SIZE // 4), heads, 1e-5)
            added_TH = linear_int8(silu_and_mul(linear_packed(normed_TH, up)), down)
            normed_TH, residual_TH = add_rms_norm(added_TH, residual_TH, norm_H, 1e-5)
        return normed_TH

    return run


@torch.inference_mode()
def recorded(run: Pass, x_TH: Tensor, memory: StepMemory) -> Recording:
    result = record(compiled_or_skip(), lambda: run(x_TH), memory)
    assert result.recording is not None, result.refusal
    assert torch.equal(result.output, run(x_TH)), "the pass that is recorded counts too"
    return result.recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_a_replay_gives_the_bits_of_single_calls(seed: int, threads: int, dtype: torch.dtype, rows: int) -> None:
    run, inputs_TH = small_model(seed, dtype), torch.randn(rows, SIZE).to(dtype)
    recording = recorded(run, inputs_TH, StepMemory())
    for _ in range(5):
        with torch.inference_mode():
            inputs_TH.copy_(torch.randn(rows, SIZE))
            expected = run(inputs_TH.clone())
            assert torch.equal(recording.replay(), expected)


def test_more_threads_than_cores_change_no_bits(seed: int) -> None:
    run, inputs_TH = small_model(seed, torch.float32), torch.randn(60, SIZE)
    recording = recorded(run, inputs_TH, StepMemory())
    with torch.inference_mode():
        expected = run(inputs_TH.clone())
        before = torch.get_num_threads()
        torch.set_num_threads(5)
        try:
            assert all(torch.equal(recording.replay(), expected) for _ in range(50))
        finally:
            torch.set_num_threads(before)


def test_recordings_in_turns_share_their_memory(seed: int) -> None:
    run, memory = small_model(seed, torch.float32), StepMemory()
    inputs = {rows: torch.randn(rows, SIZE) for rows in (64, 5, 33, 40)}
    first = recorded(run, inputs[64], memory)
    taken = memory.bytes
    assert taken < 8 * inputs[64].nbytes * 2, "layers take turns in the same memory"
    recordings = {64: first, **{rows: recorded(run, inputs[rows], memory) for rows in (5, 33, 40)}}
    assert memory.bytes < taken + 3 * 2 * inputs[64].nbytes, "passes of fewer rows have only their outputs besides"
    for rows in (5, 64, 33, 64, 40, 5, 33):
        with torch.inference_mode():
            inputs[rows].copy_(torch.randn(rows, SIZE))
            expected = run(inputs[rows].clone())
            assert torch.equal(recordings[rows].replay(), expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (lambda x_TH: x_TH + 1, "aten.add"),
        (lambda x_TH: x_TH.mul_(2), "aten.mul_"),
        (lambda x_TH: x_TH.t().contiguous().view(x_TH.shape), "aten.contiguous"),
        (lambda x_TH: x_TH.to(torch.float64).to(torch.float32), "aten.to"),
        (lambda x_TH: x_TH.t().reshape(x_TH.shape), "aten.reshape"),
        (lambda x_TH: x_TH if x_TH.sum() > 0 else -x_TH, "aten.sum"),
    ],
)
def test_what_the_library_does_not_do_is_refused(seed: int, operation: Pass, named: str) -> None:
    run, x_TH = small_model(seed, torch.float32), torch.randn(3, SIZE)
    result = record(compiled_or_skip(), lambda: run(operation(run(x_TH))), StepMemory())
    assert result.recording is None and result.refusal is not None and named in result.refusal
    assert torch.equal(result.output, run(operation(run(x_TH))))


@torch.inference_mode()
def test_a_kernel_that_cannot_be_recorded_is_refused(seed: int) -> None:
    compiled, run, x_TH = compiled_or_skip(), small_model(seed, torch.float32), torch.randn(3, SIZE)

    def pass_with_another_kernel() -> Tensor:
        compiled.team_size(1)
        return run(x_TH)

    result = record(compiled, pass_with_another_kernel, StepMemory())
    assert result.recording is None and "kernel" in str(result.refusal)
    assert torch.equal(result.output, run(x_TH))


@torch.inference_mode()
def test_a_pass_without_calls_is_refused() -> None:
    assert record(compiled_or_skip(), lambda: torch.empty(3), StepMemory()).recording is None


def test_a_pass_that_fails_leaves_nothing_on(seed: int) -> None:
    run, x_TH = small_model(seed, torch.float32), torch.randn(3, SIZE)

    def fail() -> Tensor:
        run(x_TH)
        raise ValueError("as a pass may")

    with torch.inference_mode(), pytest.raises(ValueError, match="as a pass may"):
        record(compiled_or_skip(), fail, StepMemory())
    recording = recorded(run, x_TH, StepMemory())
    with torch.inference_mode():
        expected = run(x_TH + 0)  # not noted anywhere
        assert torch.equal(recording.replay(), expected)


def test_the_switch() -> None:
    assert switched_on({}) and switched_on({SWITCH: "1"})
    assert not switched_on({SWITCH: "0"}) and not switched_on({SWITCH: " OFF "})
