"""Every kernel, in every way it can be launched, compiles for GPUs that are not there; what is found out is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.kernels.catalogue import MODULES, cases_of
from slipstream.kernels.compile_case import CompileCase, Resources
from slipstream.kernels.compile_report import BEGIN, END, write_table
from slipstream.kernels.launch import HAS_TRITON
from slipstream.tests.kernels.compiling_ahead import CompilingAhead

if HAS_TRITON:
    from slipstream.kernels.compile_ahead import compile_case, refuse_traps

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: pip install triton")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
FINE = Resources(
    kernel="_x_kernel",
    case="bf16",
    config="block=128 warps=4 stages=2",
    target="sm_90",
    registers=40,
    spilled=0,
    shared=2048,
    spill_bound=0,
)


@pytest.mark.timeout(1800)
@needs_triton
def test_every_kernel_compiles_for_every_target(compiling_ahead: CompilingAhead) -> None:
    """The last of all tests: the compiler has been at it since the first, whenever nobody else wanted the processor."""
    status, output, resources = compiling_ahead.wait(1700)
    bad = [line for line in output.splitlines() if line.startswith("BAD")]
    assert status == 0, "\n".join(bad) or output[-2000:]
    fields = ("kernel", "case", "config", "target")
    compiled = {tuple(each[field] for field in fields) for each in resources}
    asked = [case for module in MODULES for case in cases_of(module)]
    assert compiled == {
        (case.kernel.__name__, case.name, str(case.config), target) for case in asked for target in case.targets
    }


@pytest.mark.parametrize("module", list(MODULES))
def test_cases_differ_and_name_targets(module: str) -> None:
    cases = cases_of(module)
    assert cases
    names = [(case.kernel.__name__, case.name, str(case.config)) for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.targets for case in cases)


def test_document_names_every_kernel() -> None:
    text = DOCUMENT.read_text()
    told = text[text.index(BEGIN) : text.index(END)]
    for module in MODULES:
        for case in cases_of(module):
            assert f"`{case.kernel.__name__.strip('_')}`" in told, (
                "docs/kernels.md is behind: python -P -m slipstream.kernels.compile_ahead --document docs/kernels.md"
            )


@pytest.mark.parametrize(
    ("changed", "is_good"),
    [({}, True), ({"spilled": 8}, False), ({"shared": 1 << 20}, False), ({"error": "does not compile"}, False)],
)
def test_what_is_bad(changed: dict[str, int | str], is_good: bool) -> None:
    values = {name: getattr(FINE, name) for name in Resources.__slots__}
    assert Resources(**{**values, **changed}).is_good is is_good


@needs_triton
def test_a_kernel_that_the_compiler_has_made_a_trap_of_is_bad() -> None:
    refuse_traps({"ptx": ".visible .entry x()\n{\n\tret;\n}", "cubin": b"trap;"})
    refuse_traps({"amdgcn": "x:\n\ts_endpgm\n; s_trap"})
    for traps in ({"ptx": "{\n\ttrap;\n}"}, {"amdgcn": "x:\n\ts_trap 2\n"}):
        with pytest.raises(ValueError, match="trap"):
            refuse_traps(traps)


_ONES = """
import sys
import triton.language as tl
from slipstream.kernels.compile_ahead import problem_with_ones
from slipstream.kernels.compile_case import CompileCase
from slipstream.kernels.launch import KernelConfig, jit

@jit
def _kernel(out_ptr, count, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, place + {expression})

signature = {{"out_ptr": "*i64", "count": "i32", "factor": "fp32"}}
config = KernelConfig(tiles={{"BLOCK": 16}})
print(problem_with_ones(CompileCase(kernel=_kernel, name="x", config=config, signature=signature, constants={{}})))
"""


@needs_triton
@pytest.mark.parametrize(("expression", "problem"), [("count.to(tl.int64)", "no attribute 'to'"), ("count * 2", "")])
def test_sizes_that_are_one_are_no_tensors(tmp_path: Path, expression: str, problem: str) -> None:
    file = tmp_path / "one.py"
    file.write_text(_ONES.format(expression=expression))
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    told = subprocess.run(
        [sys.executable, "-P", str(file)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert problem in told.stdout if problem else told.stdout == "\n"


def test_the_table_takes_the_most_of_all_cases(tmp_path: Path) -> None:
    values = {name: getattr(FINE, name) for name in Resources.__slots__}
    larger = Resources(**{**values, "case": "fp32", "registers": 90, "shared": 1024})
    elsewhere = Resources(**{**values, "target": "gfx942"})
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(document, [FINE, larger, elsewhere])
    text = document.read_text()
    assert "| `x_kernel` | 2 | 90 / 0 / 2.0 | 40 / 0 / 2.0 |" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write_table(document, [FINE])


@needs_triton
def test_a_case_that_does_not_fit_its_kernel_is_refused() -> None:
    case = cases_of("norm")[0]
    wrong = CompileCase(kernel=case.kernel, name="wrong", config=case.config, signature={"nothing": "i32"})
    with pytest.raises(ValueError, match="'wrong' of _rms_norm_kernel does not fit its parameters"):
        compile_case(wrong, "sm_90")
