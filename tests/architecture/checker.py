"""Hold source files against the layer rules: text in, violations out.

Reads nothing and imports nothing of what it checks: the caller passes sources by path, so that planted violations can
be checked like real files.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from slipstream.tests.architecture import rules


@dataclass(frozen=True, slots=True, order=True)
class Violation:
    """One broken rule, at a line of a file."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name: ``target`` is the full dotted module, as near as the tree tells."""

    target: str
    line: int
    ours: bool
    absolute: bool
    in_function: bool
    typing_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    in_function: bool
    typing_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One parsed file of the package."""

    path: str
    name: str
    tree: ast.Module
    lines: int
    imports: tuple[Import, ...]

    @property
    def top(self) -> str:
        """The top folder, "" for the root's own file."""
        parts = PurePosixPath(self.path).parts
        return parts[0] if len(parts) > 1 else ""

    @property
    def runtime_part(self) -> str:
        """Inside ``runtime/`` the module or folder below it, "" elsewhere and for ``runtime/__init__.py``."""
        return _part_below_runtime(self.name)


def check(sources: Mapping[str, str]) -> list[Violation]:
    """Return every violation in a tree given as path (relative to the root, with slashes) → source text."""
    modules = parse(sources)
    found: list[Violation] = []
    for module in modules.values():
        found += check_file(module)
        for imported in module.imports:
            found += check_import(module, imported)
    found += check_pure_reach(modules)
    found += check_cycles(modules)
    # One statement may import several names and break a rule with each of them; it is one violation.
    return sorted(set(found))


# --- parsing


def parse(sources: Mapping[str, str]) -> dict[str, Module]:
    """Parse sources into modules by dotted name."""
    names = {module_name(path): path for path in sources}
    modules = {}
    for name, path in names.items():
        tree = ast.parse(sources[path], filename=path)
        is_package = PurePosixPath(path).name == "__init__.py"
        modules[name] = Module(
            path=path,
            name=name,
            tree=tree,
            lines=len(sources[path].splitlines()),
            imports=tuple(_imports(tree, name, is_package, names.keys())),
        )
    return modules


def module_name(path: str) -> str:
    """Return the dotted name of a file: ``runtime/engine/__init__.py`` is ``slipstream.runtime.engine``."""
    parts = [rules.ROOT, *PurePosixPath(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, name: str, is_package: bool, known: Iterable[str]) -> Iterator[Import]:
    names = set(known)
    for node, where in _walk(tree, _Where(in_function=False, typing_only=False)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                ours = _is_or_below(alias.name, rules.ROOT)
                yield Import(
                    target=alias.name,
                    line=node.lineno,
                    ours=ours,
                    absolute=True,
                    in_function=where.in_function,
                    typing_only=where.typing_only,
                )
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, is_package)
            for alias in node.names:
                # `from .a import b` means the module a.b where there is one, else something inside a.
                submodule = f"{base}.{alias.name}"
                ours = _is_or_below(base, rules.ROOT)
                target = submodule if submodule in names or not ours else base
                if base == rules.ROOT and alias.name == "__version__":
                    continue  # the version has one source, the root's file, and that is no dependency
                yield Import(
                    target=target,
                    line=node.lineno,
                    ours=ours,
                    absolute=node.level == 0,
                    in_function=where.in_function,
                    typing_only=where.typing_only,
                )


def _walk(node: ast.AST, where: _Where) -> Iterator[tuple[ast.AST, _Where]]:
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = replace(where, in_function=True)
        elif isinstance(child, ast.If) and ast.unparse(child.test).rpartition(".")[2] == "TYPE_CHECKING":
            inside = replace(where, typing_only=True)
        yield child, where
        yield from _walk(child, inside)


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    package = name.split(".") if is_package else name.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _is_or_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _part_below_runtime(name: str) -> str:
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "runtime" else ""


def _below_root(target: str) -> str:
    """Return the top folder of one of our modules: "" for the root itself."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else ""


# --- rules about one file


def check_file(module: Module) -> Iterator[Violation]:
    """Check names, sizes and what a file reaches for."""
    path = module.path
    if PurePosixPath(path).name in rules.FORBIDDEN_FILE_NAMES:
        yield Violation(path, 1, "file-name", "a file is named after the one idea it holds")
    if len(PurePosixPath(path).parts) > rules.MAX_FOLDERS_BELOW_TOP + 2:
        yield Violation(path, 1, "depth", f"at most {rules.MAX_FOLDERS_BELOW_TOP} folders below a top folder")
    if not ast.get_docstring(module.tree):
        yield Violation(path, 1, "docstring", "a module says what it owns, in its docstring")
    yield from check_sizes(path, module.tree, module.lines)
    yield from _check_expressions(module)


def check_sizes(path: str, tree: ast.Module, lines: int) -> Iterator[Violation]:
    """Check the length of a module and of its functions."""
    if lines > rules.MAX_MODULE_LINES:
        yield Violation(path, 1, "size", f"{lines} lines; a module has at most {rules.MAX_MODULE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A kernel has dozens of parameters, one on each line: its body alone counts.
            is_jitted = any(isinstance(each, ast.Name) and each.id == "jit" for each in node.decorator_list)
            first = node.body[0].lineno if is_jitted else node.lineno
            length = (node.end_lineno or node.lineno) - first + 1
            if length > rules.MAX_FUNCTION_LINES:
                message = f"{node.name} has {length} lines; a function has at most {rules.MAX_FUNCTION_LINES}"
                yield Violation(path, node.lineno, "size", message)


def _check_expressions(module: Module) -> Iterator[Violation]:
    """Find what is reached without an import statement: ``torch.distributed``, ``np.random``, ``import_module``."""
    path = module.path
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and path not in rules.MAY_IMPORT_IN_FUNCTIONS:
                yield Violation(path, node.lineno, "in-function", f"{called}: imports are statements, at the top")
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted == "torch.distributed" and not _owned(path, rules.OWNERS[dotted]):
                yield _owner_violation(path, node.lineno, dotted)
            if dotted in ("np.random", "numpy.random") and is_pure(path):
                message = "a pure core draws no random numbers; they are arguments"
                yield Violation(path, node.lineno, "pure", message)


def is_pure(path: str) -> bool:
    """Return whether a file belongs to a core that decides."""
    return path in rules.PURE or path.startswith(tuple(f"{folder}/" for folder in rules.PURE))


# --- rules about one import


def check_import(module: Module, imported: Import) -> Iterator[Violation]:
    """Check one import of one module."""
    path, line = module.path, imported.line
    if imported.in_function and path not in rules.MAY_IMPORT_IN_FUNCTIONS:
        message = f"{imported.target} is imported inside a function; imports stand at the top of the module"
        yield Violation(path, line, "in-function", message)
    if imported.ours:
        if imported.absolute:
            message = f"{imported.target}: inside the package imports are relative"
            yield Violation(path, line, "relative", message)
        yield from _check_layers(module, imported)
    else:
        yield from _check_outside(module, imported)


def _check_layers(module: Module, imported: Import) -> Iterator[Violation]:
    target_top = _below_root(imported.target)
    where = (module.path, imported.line, "layers")
    if module.top not in rules.TOP_MAY_IMPORT:
        yield Violation(
            module.path, 1, "layers", f"{module.top}/ is not a layer; name it in tests/architecture/rules.py"
        )
    elif not target_top:
        yield Violation(*where, "nothing imports the public face from inside, but for __version__")
    elif target_top != module.top and target_top not in rules.TOP_MAY_IMPORT[module.top]:
        allowed = ", ".join(sorted(rules.TOP_MAY_IMPORT[module.top])) or "nothing else of ours"
        yield Violation(*where, f"{module.top or 'the root'} imports {target_top}; it may import {allowed}")
    elif module.top == target_top == "runtime":
        yield from _check_runtime_layers(module, imported)


def _check_runtime_layers(module: Module, imported: Import) -> Iterator[Violation]:
    part, target = module.runtime_part, _part_below_runtime(imported.target)
    where = (module.path, imported.line, "layers")
    if part and part not in rules.RUNTIME_MAY_IMPORT:
        yield Violation(*where, f"runtime/{part} has no layer; name it in tests/architecture/rules.py")
    elif target != part and target not in rules.RUNTIME_MAY_IMPORT.get(part, frozenset()):
        allowed = ", ".join(sorted(rules.RUNTIME_MAY_IMPORT.get(part, frozenset()))) or "nothing"
        message = f"runtime/{part or '__init__.py'} imports runtime/{target or '__init__.py'}; it may import {allowed}"
        yield Violation(*where, message)


def _check_outside(module: Module, imported: Import) -> Iterator[Violation]:
    target, path, line = imported.target, module.path, imported.line
    package = target.partition(".")[0]
    if package in rules.FORBIDDEN:
        yield Violation(path, line, "forbidden", f"{package}: {rules.FORBIDDEN[package]}")
    for owned, owners in rules.OWNERS.items():
        if _is_or_below(target, owned) and not _owned(path, owners):
            yield _owner_violation(path, line, owned)
    allowed = rules.THIRD_PARTY.get(module.top)
    if allowed is not None and package not in sys.stdlib_module_names and package not in allowed:
        names = ", ".join(sorted(allowed)) or "nothing"
        message = f"{module.top or 'the root'} imports {package}; beyond the standard library it may import {names}"
        yield Violation(path, line, "third-party", message)
    if is_pure(path):
        for never in sorted(rules.PURE_NEVER):
            if _is_or_below(target, never):
                yield Violation(path, line, "pure", f"{target}: a pure core takes time and randomness as arguments")


def _owned(path: str, owners: Iterable[str]) -> bool:
    return any(path.startswith(owner) if owner.endswith("/") else path == owner for owner in owners)


def _owner_violation(path: str, line: int, owned: str) -> Violation:
    return Violation(path, line, "owner", f"{owned} is imported only in {', '.join(rules.OWNERS[owned])}")


# --- rules about the graph


def check_pure_reach(modules: Mapping[str, Module]) -> Iterator[Violation]:
    """Check that loading a pure core loads nothing heavy through other modules of ours."""
    for module in modules.values():
        if not is_pure(module.path):
            continue
        for reached in _closure(modules, module.name):
            for imported in modules[reached].imports:
                package = imported.target.partition(".")[0]
                if not _runs_on_load(imported) or reached == module.name:
                    continue
                if package in rules.PURE_NEVER_REACHES:
                    at = f"{modules[reached].path}:{imported.line}"
                    yield Violation(module.path, 1, "pure", f"loading it loads {package}, at {at}")


def check_cycles(modules: Mapping[str, Module]) -> Iterator[Violation]:
    """Check that no module imports itself through others."""
    for name, module in modules.items():
        for imported in module.imports:
            target = imported.target
            if imported.in_function or target not in modules or target == name:
                continue
            trail = _trail(modules, target, name)
            # Report each cycle once, at the module that sorts first.
            if trail and name == min(trail):
                way = " → ".join([name, *trail])
                yield Violation(module.path, imported.line, "cycle", way)


def _runs_on_load(imported: Import) -> bool:
    return not imported.in_function and not imported.typing_only


def _edges(modules: Mapping[str, Module], name: str) -> list[str]:
    found = {i.target for i in modules[name].imports if not i.in_function and i.target in modules}
    return sorted(found - {name})


def _closure(modules: Mapping[str, Module], start: str) -> list[str]:
    """Return every module that loading ``start`` loads, parent packages included."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        name = stack.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        stack += [i.target for i in modules[name].imports if _runs_on_load(i)]
        parent = name.rpartition(".")[0]
        if parent:
            stack.append(parent)
    return sorted(seen)


def _trail(modules: Mapping[str, Module], start: str, goal: str) -> list[str]:
    """Return the shortest way of imports from ``start`` to ``goal``, both included, or an empty list."""
    ways = {start: [start]}
    queue = [start]
    for name in queue:
        if name == goal:
            return ways[name]
        for target in _edges(modules, name):
            if target not in ways:
                ways[target] = [*ways[name], target]
                queue.append(target)
    return []
