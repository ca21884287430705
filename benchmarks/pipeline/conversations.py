"""Requests as people sent them: lengths and arrivals of Azure's conversation trace, the sample or the whole file."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[2] / "tests" / "data" / "azure_conversation_2000.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One request of the trace. Units: gap_s, seconds since the one before"""

    prompt_tokens: int
    output_tokens: int
    gap_s: float


def read_conversations(path: Path, *, at_most: int, stretch: int = 1) -> list[Conversation]:
    """Return the first requests of a file, with the sample's columns or the trace's; prompts times ``stretch``."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file), at_most))
    if rows and "gap_ms" in rows[0]:
        lengths = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in rows]
        gaps_s = [float(row["gap_ms"]) / 1e3 for row in rows]
    else:
        # Python's dates have microseconds, the trace has tenths of them.
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
        gaps_s = [0.0, *((b - a).total_seconds() for a, b in pairwise(times))]
    return [
        Conversation(prompt_tokens=prompt * stretch, output_tokens=output, gap_s=gap_s)
        for (prompt, output), gap_s in zip(lengths, gaps_s, strict=True)
    ]
