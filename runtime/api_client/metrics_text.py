"""Metrics as Prometheus reads them: a line for each figure, by name and labels."""

from __future__ import annotations

import contextlib


def figures(text: str) -> dict[str, float]:
    """Return each figure by its name and labels, as written, and what a name has over all labels by the name alone.

    What is no figure is left out.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        # Labels may have spaces in them: the figure is what follows the last of them.
        labelled, _, figure = line.rpartition("} ") if "{" in line else line.partition(" ")
        with contextlib.suppress(ValueError, IndexError):
            value = float(figure.split()[0])
            name = labelled.partition("{")[0].strip()
            found[name] = found.get(name, 0.0) + value
            if "{" in line:
                found[f"{labelled}}}"] = value
    return found
