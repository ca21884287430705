"""``slipstream demo``: several prompts at once on the bundled model, streamed to the terminal, then a table of timings.

On a terminal each prompt has a panel that fills as tokens come; elsewhere complete lines are printed with the prompt's
number in front.
"""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..sdk.params import SamplingParams
from ..sdk.results import RequestOutput, StreamOutput
from .llm import LLM

# None ends with a space or a line break: the model's tokenizer joins those with what follows.
PROMPTS = (
    'def parse_version(text):\n    """Return a version string as',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):",
    "import os\nimport sys\nimport",
    "    def __repr__(self):\n        return",
    'def read_lines(path):\n    """Read a file and return its lines."""\n    with open(path',
    "    for key, value in",
)


class _Screen:
    """Shows the answers as they grow."""

    def __init__(self, console: Console, prompts: tuple[str, ...]) -> None:
        self._console = console
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._shown = [0] * len(prompts)
        self._live = Live(console=console, refresh_per_second=12) if console.is_terminal else None

    def __enter__(self) -> _Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, place: int, piece: StreamOutput) -> None:
        """Show what a prompt's answer has gained."""
        self._texts[place] += piece.text
        if self._live is not None:
            self._live.update(Group(*map(self._panel, range(len(self._prompts)))))
            return
        end = len(self._texts[place]) if piece.finish_reason else self._texts[place].rfind("\n") + 1
        for line in self._texts[place][self._shown[place] : end].splitlines():
            self._console.print(f"[{place + 1}] {line}", markup=False, highlight=False, soft_wrap=True)
        self._shown[place] = max(end, self._shown[place])

    def _panel(self, place: int) -> Panel:
        text = Text(self._prompts[place], style="dim") + Text(self._texts[place])
        return Panel(text, title=f"{place + 1}", title_align="left")


def run_demo(llm: LLM, params: SamplingParams) -> None:
    """Generate for the demo's prompts together, show the answers and then the timings."""
    console = Console()
    outputs: dict[str, RequestOutput] = {}
    with _Screen(console, PROMPTS) as screen:
        if not console.is_terminal:
            for place, prompt in enumerate(PROMPTS):
                console.print(f"prompt [{place + 1}] {prompt!r}", markup=False, highlight=False, soft_wrap=True)
        for piece in llm.stream(PROMPTS, params):
            outputs.setdefault(piece.request_id, piece.output)
            screen.add(PROMPTS.index(str(piece.output.prompt)), piece)
    console.print(_timings(list(outputs.values())))


def _timings(outputs: list[RequestOutput]) -> Table:
    ordered = sorted(outputs, key=lambda output: PROMPTS.index(str(output.prompt)))
    table = Table(title=f"{len(outputs)} prompts, answered together")
    for column in ("prompt", "prompt tokens", "new tokens", "first token ms", "per token ms", "tokens/s", "ended by"):
        table.add_column(column, justify="left" if column in ("prompt", "ended by") else "right")
    for place, output in enumerate(ordered):
        sample = output.outputs[0]
        tokens = len(sample.token_ids)
        metrics = output.metrics
        table.add_row(
            f"{place + 1}",
            f"{len(output.prompt_token_ids)}",
            f"{tokens}",
            _milliseconds(metrics.ttft_s),
            _milliseconds(metrics.tpot_s(tokens)),
            f"{tokens / metrics.latency_s:.1f}" if metrics.latency_s else "-",
            str(sample.finish_reason),
        )
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    start_s = min(output.metrics.arrival_time_s for output in outputs)
    end_s = max(output.metrics.finished_time_s or start_s for output in outputs)
    table.add_section()
    table.add_row("all", "", f"{total}", "", "", f"{total / (end_s - start_s):.1f}" if end_s > start_s else "-", "")
    return table


def _milliseconds(duration_s: float | None) -> str:
    return "-" if duration_s is None else f"{duration_s * 1e3:.1f}"
