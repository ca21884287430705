"""Compile kernels for devices that are not there, and say what each takes of them: registers, shared memory, spills.

Every file with kernels has ``compile_cases``: one case for each dtype and tile configuration that its operation can
launch. Nothing runs: it takes no GPU and no driver. ``python -m slipstream.kernels.compile_ahead`` compiles all of
them, and ends with an error if one does not compile, spills more than its bound or does not fit a target's memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.compiler.compiler import make_backend

from .catalogue import MODULES, cases_of
from .compile_case import CompileCase, Resources
from .compile_report import write_table
from .launch import INTERPRETED

_AMD = "gfx"


def compile_case(case: CompileCase, target: str) -> Resources:
    """Compile a case for a target ("sm_90", "gfx942"), optimized as when it is launched."""
    constants = {**case.constants, **case.config.tiles}
    names = case.kernel.arg_names
    unknown = (case.signature.keys() | constants.keys()) ^ set(names) | (set(case.aligned) - case.signature.keys())
    if unknown:
        raise ValueError(f"case {case.name!r} of {case.kernel.__name__} does not fit its parameters: {sorted(unknown)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # Pointers are aligned, as torch's memory is.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    is_amd = target.startswith(_AMD)
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {
        "num_warps": case.config.num_warps,
        "num_stages": case.config.stages_on(amd=is_amd),
        "enable_fp_fusion": False,
    }
    about = {
        "kernel": case.kernel.__name__,
        "case": case.name,
        "config": str(case.config),
        "target": target,
        "spill_bound": case.spill_bytes,
    }
    try:
        compiled = triton.compile(source, target=gpu, options=options)
        refuse_traps(compiled.asm)
        registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if is_amd else _nvidia_usage(compiled.asm["cubin"])
    except Exception as error:  # whatever the compiler cannot do is a finding
        text = f"{type(error).__name__}: {error}".strip()
        return Resources(**about, registers=0, spilled=0, shared=0, error=text[-2000:])
    return Resources(**about, registers=registers, spilled=spilled, shared=compiled.metadata.shared)


def refuse_traps(asm: Mapping[str, str | bytes]) -> None:
    """Refuse a kernel that the compiler has turned into one that stops: what it calls undefined may end so, silently.

    Raises: ValueError
    """
    for kind, pattern in (("ptx", r"^\s*trap;"), ("amdgcn", r"^\s*s_trap\b")):
        if kind in asm and re.search(pattern, str(asm[kind]), re.MULTILINE):
            raise ValueError("the compiler made a trap of it")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    # What is on a thread's stack is what did not fit its registers: kernels have no arrays of their own.
    return _number(r"REG:(\d+)", listed), max(_number(r"STACK:(\d+)", listed), _number(r"LOCAL:(\d+)", listed))


def _amd_usage(assembly: str) -> tuple[int, int]:
    # Four bytes in each lane; scalar registers that are spilled go to lanes of vector registers.
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler says")
    return int(found[1])


def problem_with_ones(case: CompileCase) -> str:
    """Return why a kernel cannot be read where all its integers are one, "" where it can.

    A launch hands an integer that is one to the compiler as a constant, which has no methods of tensors; neither the
    interpreter nor a compilation for any size would show that. Nothing is made of it but Triton's own language.
    """
    ones = {name for name, kind in case.signature.items() if not kind.startswith("*") and kind != "fp32"}
    constants = {**case.constants, **case.config.tiles, **dict.fromkeys(ones, 1)}
    kinds = {**case.signature, **dict.fromkeys(ones, "constexpr")}
    signature = {name: kinds.get(name, "constexpr") for name in case.kernel.arg_names}
    target = GPUTarget("cuda", 90, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options({"num_warps": case.config.num_warps, "num_stages": case.config.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs={})
    try:
        codegen = backend.get_codegen_implementation(options)
        source.make_ir(target, options, codegen, backend.get_module_map(), context)
    except CompilationError as error:
        return f"with sizes of one: {error}"[-2000:]
    return ""


def _compile_nth(module: str, place: int, target: str) -> Resources:
    case = cases_of(module)[place]
    found = compile_case(case, target)
    if found.error or target != case.targets[0]:
        return found
    return replace(found, error=problem_with_ones(case))


def compile_modules(modules: Iterable[str], *, target: str | None = None) -> Iterator[Resources]:
    """Compile the cases of some files with kernels, as many side by side as there are cores."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(_compile_nth, module, place, each)
            for module in modules
            for place, case in enumerate(cases_of(module))
            for each in case.targets
            if target is None or each == target
        ]
        for done in running:
            yield done.result()


def main() -> int:
    """Compile everything; see the module. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile kernels ahead of time, for GPUs that are not there.")
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="files with kernels; all by default")
    parser.add_argument("--target", help="one target alone, as sm_90 or gfx942")
    parser.add_argument("--json", type=Path, help="write what each takes to this file")
    parser.add_argument("--document", type=Path, help="renew the table in this document (docs/kernels.md)")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    all_resources = []
    for each in compile_modules(arguments.modules, target=arguments.target):
        all_resources.append(each)
        verdict = each.error or f"{each.registers} registers, {each.spilled} bytes spilled, {each.shared} shared"
        print(f"{'' if each.is_good else 'BAD '}{each.kernel} [{each.case}] {each.config} {each.target}: {verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in all_resources], indent=1))
    if arguments.document:
        write_table(arguments.document, all_resources)
    bad = sum(not each.is_good for each in all_resources)
    print(f"{len(all_resources)} compiled, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
