"""The demo on a terminal: answers that grow side by side, then tables of timings, of KV moved, of shards.

On a terminal each prompt has a panel that fills as tokens come; elsewhere complete lines are printed with the prompt's
number in front. Knows nothing of where the answers come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..local_cluster import Shard
from .asking import Answer
from .movement import Movement

_WIDE_COLUMNS = 100
"""From this width on, panels stand in two columns."""

_LEAST_PANEL_LINES = 4
_FRAME_COLUMNS = 4


class AnswerScreen:
    """Shows the answers as they grow, and in full when it is left."""

    def __init__(self, console: Console, prompts: Sequence[str]) -> None:
        self._console = console
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._shown = [0] * len(prompts)
        # Transient: while answers grow only their ends fit on the screen; afterwards they are printed in full.
        self._live = Live(console=console, refresh_per_second=12, transient=True) if console.is_terminal else None

    def __enter__(self) -> AnswerScreen:
        if self._live is not None:
            self._live.start()
        else:
            for index, prompt in enumerate(self._prompts):
                self._print(f"prompt [{index + 1}] {prompt!r}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(self._panels(None))

    def add(self, index: int, text: str, ended: bool) -> None:
        """Show what a prompt's answer has gained."""
        self._texts[index] += text
        if self._live is not None:
            self._live.update(self._panels(self._console.height - 1))
            return
        end = len(self._texts[index]) if ended else self._texts[index].rfind("\n") + 1
        for line in self._texts[index][self._shown[index] : end].splitlines():
            self._print(f"[{index + 1}] {line}")
        self._shown[index] = max(end, self._shown[index])

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _panels(self, height: int | None) -> RenderableType:
        """Return all panels, within ``height`` lines when it is given: each then shows the end of its text."""
        columns = 2 if self._console.width >= _WIDE_COLUMNS else 1
        rows = -(-len(self._prompts) // columns)
        panel_height = None if height is None else max(_LEAST_PANEL_LINES, height // rows)
        panel_width = self._console.width // columns
        panels = [self._panel(index, panel_width, panel_height) for index in range(len(self._prompts))]
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for row in range(rows):
            grid.add_row(*panels[row * columns : (row + 1) * columns])
        return grid

    def _panel(self, index: int, width: int, height: int | None) -> Panel:
        text = Text(self._prompts[index], style="dim") + Text(self._texts[index])
        if height is not None:
            lines = text.wrap(self._console, width - _FRAME_COLUMNS)
            text = Text("\n").join(lines[-(height - 2) :])
        return Panel(text, title=f"{index + 1}", title_align="left", height=height)


def timings(answers: Sequence[Answer]) -> Table:
    """Return a table of what each answer cost, and all together."""
    table = Table(title=f"{len(answers)} prompts, answered together")
    for column in (
        "prompt", "prompt tokens", "output tokens", "first token ms", "between tokens ms", "tokens/s", "ended by",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("prompt", "ended by") else "right")
    records = [answer.record for answer in answers]
    for answer in answers:
        record = answer.record
        table.add_row(
            f"{record.index + 1}",
            "-" if record.prompt_tokens is None else f"{record.prompt_tokens}",
            f"{record.tokens}",
            _milliseconds(record.ttft_s),
            _milliseconds(record.per_token_s),
            _rate(record.tokens, record.end_s - record.due_s),
            record.error or answer.finish_reason or "-",
        )
    prompt_tokens = sum(record.prompt_tokens or 0 for record in records)
    tokens = sum(record.tokens for record in records)
    duration_s = max(record.end_s for record in records) - min(record.due_s for record in records)
    table.add_section()
    table.add_row("all", f"{prompt_tokens}", f"{tokens}", "", "", _rate(tokens, duration_s), f"{duration_s:.2f} s")
    return table


def movements(moved: Movement) -> Table:
    """Return a table of what went from prefill to decode replicas."""
    table = Table(title="keys and values, from prefill to decode replicas")
    for column in ("hand-offs", "KV moved", "on the wire ms", "hidden behind prefill"):
        table.add_column(column, justify="right")
    share = moved.hidden_share
    table.add_row(
        f"{moved.hand_offs}",
        f"{moved.kv_bytes:,} bytes",
        _milliseconds(moved.wire_s),
        "-" if share is None else f"{share:.0%}",
    )
    return table


def places(shards: Sequence[Shard]) -> Table:
    """Return a table of where each rank's part of the model is."""
    table = Table(title="where each shard is")
    for column in ("replica", "role", "rank", "has", "device"):
        table.add_column(column, justify="right" if column == "rank" else "left")
    for shard in shards:
        table.add_row(Text(shard.replica), Text(shard.role), f"{shard.rank}", Text(shard.part), Text(shard.device))
    return table


def _milliseconds(duration_s: float | None) -> str:
    return "-" if duration_s is None else f"{duration_s * 1e3:.1f}"


def _rate(tokens: int, duration_s: float) -> str:
    return f"{tokens / duration_s:.1f}" if duration_s > 0 else "-"
