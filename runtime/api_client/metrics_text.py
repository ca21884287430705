"""Metrics as Prometheus reads them: a line for each figure, by name and labels."""

from __future__ import annotations

import contextlib


def sums_by_name(text: str) -> dict[str, float]:
    """Return each metric's figures added up over its labels. What is no figure is left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        # Labels may have spaces in them: the figure is what follows the last of them.
        labelled, _, figure = line.rpartition("} ") if "{" in line else line.partition(" ")
        name = labelled.partition("{")[0].strip()
        with contextlib.suppress(ValueError, IndexError):
            found[name] = found.get(name, 0.0) + float(figure.split()[0])
    return found
