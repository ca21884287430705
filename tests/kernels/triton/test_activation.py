"""The gated activation's kernel against its reference, and that against a float64 formula."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.activation import silu_and_mul, silu_and_mul_reference

CLOSE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 2), (0, 8), (2, 0), (5, 2066), (2, 3, 30), (14,)])
def test_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    gate_up_TI = 3 * torch.randn(shape, dtype=dtype)
    before = gate_up_TI.clone()
    expected = silu_and_mul_reference(gate_up_TI)
    torch.testing.assert_close(silu_and_mul(gate_up_TI), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert launches == (["_silu_and_mul_kernel"] if gate_up_TI.numel() else [])
    assert torch.equal(gate_up_TI, before)
    backends.use("auto")
    torch.testing.assert_close(silu_and_mul(gate_up_TI), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_reference_is_the_formula(seed: int) -> None:
    torch.manual_seed(seed)
    gate_up_TI = 4 * torch.randn(4, 50, dtype=torch.float64)
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=1)
    expected = gate_TI / (1 + torch.exp(-gate_TI)) * up_TI
    torch.testing.assert_close(silu_and_mul_reference(gate_up_TI.float()).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_extreme_gates_close_and_open() -> None:
    out_TI = silu_and_mul(torch.tensor([[-200.0, 200.0, float("nan"), 2.0, 2.0, 2.0]]))
    torch.testing.assert_close(out_TI, torch.tensor([[0.0, 400.0, float("nan")]]), equal_nan=True, rtol=0, atol=1e-30)


@pytest.mark.parametrize("view", ["columns", "rows", "turned"])
def test_views_are_read_where_they_are(view: str, seed: int) -> None:
    torch.manual_seed(seed)
    wide = torch.randn(8, 60)
    x_TI = {"columns": wide[:, 10:50], "rows": wide[::2], "turned": wide.T[:10]}[view]
    torch.testing.assert_close(silu_and_mul(x_TI), silu_and_mul_reference(x_TI), rtol=1e-6, atol=1e-6)


def test_a_row_is_the_same_in_any_batch(seed: int) -> None:
    torch.manual_seed(seed)
    gate_up_TI = torch.randn(9, 140).bfloat16()
    together = silu_and_mul(gate_up_TI)
    for row in (0, 4, 8):
        assert torch.equal(silu_and_mul(gate_up_TI[row : row + 1])[0], together[row])


def test_gate_and_up_are_of_one_size() -> None:
    with pytest.raises(ValueError, match="7 is not twice a size"):
        silu_and_mul(torch.ones(2, 7))
