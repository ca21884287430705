"""The kernel of other gated activations against its reference, and that against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.gate import SILU, Gate, GateKind
from slipstream.kernels.gated import gate_and_mul, gate_and_mul_reference

# Torch's GELU adds one to a tanh that is nearly minus one: what is left has few digits, and a large up shows it.
CLOSE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GELU = Gate(kind=GateKind.GELU_TANH)
CLAMPED = Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=2.5)
KERNELS = {GELU: "_gate_and_mul_kernel", CLAMPED: "_gate_and_mul_kernel", SILU: "_silu_and_mul_kernel"}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("gate", list(KERNELS), ids=lambda gate: str(gate.kind))
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 2), (0, 8), (2, 0), (5, 2066), (2, 3, 30), (14,)])
def test_kernel_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, gate: Gate, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    gate_up_TI = 3 * torch.randn(shape, dtype=dtype)
    before = gate_up_TI.clone()
    expected = gate_and_mul_reference(gate_up_TI, gate)
    torch.testing.assert_close(gate_and_mul(gate_up_TI, gate), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert launches == ([KERNELS[gate]] if gate_up_TI.numel() else [])
    assert torch.equal(gate_up_TI, before)
    backends.use("auto")
    torch.testing.assert_close(gate_and_mul(gate_up_TI, gate), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_references_are_the_formulas(seed: int) -> None:
    torch.manual_seed(seed)
    gate_up_TI = 4 * torch.randn(4, 50, dtype=torch.float64)
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=1)
    tanh_TI = torch.tanh(math.sqrt(2 / math.pi) * (gate_TI + 0.044715 * gate_TI**3))
    low_TI, both_TI = gate_TI.clamp(max=2.5), up_TI.clamp(-2.5, 2.5)
    for gate, expected in (
        (GELU, 0.5 * gate_TI * (1 + tanh_TI) * up_TI),
        (CLAMPED, low_TI / (1 + torch.exp(-1.702 * low_TI)) * (both_TI + 1)),
    ):
        found = gate_and_mul_reference(gate_up_TI.float(), gate).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("by", ["triton", "auto"])
def test_what_is_no_number_stays_so(by: str) -> None:
    backends.use(by)
    gate_up_TI = torch.tensor([[-300.0, 300.0, math.nan, 1.0, 2.0, 2.0, 2.0, math.nan]])
    assert gate_and_mul(gate_up_TI, CLAMPED).isnan().tolist() == [[False, False, True, True]]
    torch.testing.assert_close(
        gate_and_mul(gate_up_TI, GELU), torch.tensor([[0.0, 600.0, math.nan, math.nan]]), equal_nan=True
    )


@pytest.mark.parametrize("view", ["columns", "rows", "turned"])
def test_views_are_read_where_they_are(view: str, seed: int) -> None:
    torch.manual_seed(seed)
    wide = torch.randn(8, 60)
    x_TI = {"columns": wide[:, 10:50], "rows": wide[::2], "turned": wide.T[:10]}[view]
    for gate in (GELU, CLAMPED):
        expected = gate_and_mul_reference(x_TI, gate)
        torch.testing.assert_close(gate_and_mul(x_TI, gate), expected, rtol=1e-6, atol=1e-6)


def test_a_row_is_the_same_in_any_batch(seed: int) -> None:
    torch.manual_seed(seed)
    gate_up_TI = torch.randn(9, 140).bfloat16()
    for gate in (GELU, CLAMPED):
        together = gate_and_mul(gate_up_TI, gate)
        for row in (0, 4, 8):
            assert torch.equal(gate_and_mul(gate_up_TI[row : row + 1], gate)[0], together[row])


def test_gate_and_up_are_of_one_size() -> None:
    with pytest.raises(ValueError, match="7 is not twice a size"):
        gate_and_mul(torch.ones(2, 7), GELU)
