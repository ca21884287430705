"""What files with kernels promise: everything but the kernels is annotated, every kernel is in the catalogue.

mypy is told to let functions of ``kernels/`` go without annotations, because Triton takes those of a kernel's
parameters for constants. So that no other function goes without is held here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from slipstream.kernels.catalogue import MODULES

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_jitted(function: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "jit" for each in function.decorator_list)


def unannotated(function: ast.FunctionDef) -> list[str]:
    """Return the parameters without annotation, and "return" if that has none."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    every += [each for each in (function.args.vararg, function.args.kwarg) if each is not None]
    missing = [each.arg for each in every if each.annotation is None and each.arg not in ("self", "cls")]
    return missing if function.returns is not None else [*missing, "return"]


def problems(name: str, text: str) -> list[str]:
    tree = ast.parse(text)
    found = []
    launched = False
    for function in functions(tree):
        if not is_jitted(function):
            found += [f"{name}: {function.name} has no annotation of {each}" for each in unannotated(function)]
            continue
        launched |= function.name.endswith("_kernel")
        if ast.get_docstring(function) is None:
            found.append(f"{name}: {function.name} does not say what it computes")
        annotations = [each.annotation for each in function.args.args if each.annotation is not None]
        if any(ast.unparse(each) != "tl.constexpr" for each in annotations):
            found.append(f"{name}: {function.name} has annotations that are not tl.constexpr")
    if launched and name.removesuffix(".py") not in MODULES:
        found.append(f"{name} has kernels and is not in kernels/catalogue.py: nobody compiles them ahead of time")
    return found


def test_files_with_kernels() -> None:
    paths = sorted(KERNELS.rglob("*.py"))
    assert len(paths) > 30
    found = [each for path in paths for each in problems(path.relative_to(KERNELS).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


def test_what_is_refused() -> None:
    text = """
@jit
def _new_kernel(x_ptr, size: int):
    pass

def new(x, *, size: int):
    pass
"""
    assert problems("new.py", text) == [
        "new.py: _new_kernel does not say what it computes",
        "new.py: _new_kernel has annotations that are not tl.constexpr",
        "new.py: new has no annotation of x",
        "new.py: new has no annotation of return",
        "new.py has kernels and is not in kernels/catalogue.py: nobody compiles them ahead of time",
    ]
