"""The table of what compiled kernels take, as docs/kernels.md has it: by kernel and target, the most of all cases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .compile_case import Resources

BEGIN, END = "<!-- compiled ahead of time: begin -->", "<!-- compiled ahead of time: end -->"


def table(resources: Iterable[Resources]) -> str:
    """Return the table: a row a kernel; registers, bytes spilled and KiB of shared memory for each target."""
    found = list(resources)
    targets = list(dict.fromkeys(each.target for each in found))
    lines = [
        f"| kernel | cases | {' | '.join(targets)} |",
        f"|---|---|{'---|' * len(targets)}",
    ]
    for kernel in sorted({each.kernel for each in found}):
        of_kernel = [each for each in found if each.kernel == kernel]
        cells = [_cell([each for each in of_kernel if each.target == target]) for target in targets]
        cases = len({(each.case, each.config) for each in of_kernel})
        lines.append(f"| `{kernel.strip('_')}` | {cases} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(resources: list[Resources]) -> str:
    if not resources:
        return "not for it"
    registers = max(each.registers for each in resources)
    shared = max(each.shared for each in resources) / 1024
    return f"{registers} / {max(each.spilled for each in resources)} / {shared:.1f}"


def write_table(path: Path, resources: Iterable[Resources]) -> None:
    """Put the table into a document, between its two marks. Raises: ValueError if they are not there"""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table(resources)}\n{END}{after}", encoding="utf-8")
