"""The tree as it is, held against the layer rules; and the packaging, held against the tree."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from slipstream.tests.architecture import checker, rules

ROOT = Path(__file__).resolve().parents[2]


def python_files(*, package: bool) -> Iterator[str]:
    """Yield the Python files of the package, or those of the folders beside it, relative to the root."""
    for top in sorted(ROOT.iterdir()):
        if top.name.startswith(".") or top.name in ("build", "dist"):
            continue
        if top.suffix == ".py" and package:
            yield top.name
        elif top.is_dir() and (top.name not in rules.NOT_PACKAGES) == package:
            yield from sorted(path.relative_to(ROOT).as_posix() for path in top.rglob("*.py"))


def report(violations: list[checker.Violation]) -> str:
    return "\n".join(
        ["the layer rules (ARCHITECTURE.md, tests/architecture/rules.py) are broken:", *map(str, violations)]
    )


def test_layers() -> None:
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files(package=True)}
    assert "__init__.py" in sources
    violations = checker.check(sources)
    assert not violations, report(violations)


def test_sizes_of_benchmarks_and_examples() -> None:
    violations: list[checker.Violation] = []
    for path in python_files(package=False):
        if not path.startswith("tests/"):
            text = (ROOT / path).read_text(encoding="utf-8")
            violations += checker.check_sizes(path, ast.parse(text, filename=path), len(text.splitlines()))
    assert not violations, report(violations)


def test_packages_are_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    folders = {Path(path).parent for path in python_files(package=True)}
    in_tree = sorted(".".join([rules.ROOT, *folder.parts]) for folder in folders)
    assert sorted(listed) == in_tree, "pyproject.toml, tool.setuptools.packages: every folder with Python files, once"
    bare = [folder.as_posix() for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert not bare, f"folders of the package without __init__.py: {bare}"


def test_sources_of_compiled_kernels_are_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["slipstream.kernels"]
    shipped = {path for pattern in patterns for path in (ROOT / "kernels").glob(pattern)}
    assert shipped == {path for path in (ROOT / "kernels" / "native").iterdir() if path.is_file()}
    assert any(path.suffix == ".c" for path in shipped)


def test_tests_are_not_packages() -> None:
    """With an ``__init__.py`` pytest takes the root for their parent package, and imports all of ours a second time."""
    found = [path for path in python_files(package=False) if path.startswith("tests/") and "__init__" in path]
    assert not found, f"delete {found}: helpers are imported as slipstream.tests.<folder>.<module> without them"


def test_runtime_extra_covers_third_party_imports() -> None:
    """What the package imports is what its base and those extras install that serve it, no more and no less."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["runtime"], *extras["cluster"], *extras["nixl"]]
    names = {text.partition(">")[0].partition("[")[0].strip() for text in declared} - {project["name"]}
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files(package=True)}
    imported = {
        rules.DISTRIBUTIONS.get(package := found.target.partition(".")[0], package): f"{module.path}:{found.line}"
        for module in checker.parse(sources).values()
        for found in module.imports
        if not found.ours and found.target.partition(".")[0] not in sys.stdlib_module_names
    }
    # triton comes with torch where there is one for the platform; torch chooses its version.
    undeclared = {name: where for name, where in imported.items() if name not in names | {"triton"}}
    assert not undeclared, f"imported but not declared in pyproject.toml: {undeclared}"
    unused = names - imported.keys() - rules.LOADED_BY_OTHERS.keys()
    assert not unused, f"declared but imported nowhere: {sorted(unused)}"
