"""One load test from its options to its report."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..api_client.client import ApiClient, read_api_key
from ..clock import monotonic_clock
from .generator import LoadGenerator, LoadResult
from .plan import LoadPlan
from .report import to_json, to_table, write_json
from .statistics import summarize


def run_load_test(
    base_url: str, plan: LoadPlan, *, model: str | None, api_key_file: Path | None, json_file: Path | None
) -> bool:
    """Run a load test, print its table and write its JSON; return whether any request was answered in full.

    Raises: ApiError when the server does not answer a first request; ConfigError
    """
    console = Console(highlight=False)
    key = None if api_key_file is None else read_api_key(api_key_file)
    chosen, result = asyncio.run(_run(base_url, plan, model, key, console))
    figures = summarize(result.records, start_s=result.start_s, end_s=result.end_s)
    console.print(to_table(figures))
    if json_file is not None:
        write_json(json_file, to_json(figures, plan, base_url=base_url, model=chosen))
    return figures.completed > 0


async def _run(
    base_url: str, plan: LoadPlan, model: str | None, api_key: str | None, console: Console
) -> tuple[str, LoadResult]:
    async with ApiClient(base_url, api_key=api_key, max_connections=plan.concurrency) as client:
        chosen = model or await client.first_model()
        how = f"{plan.concurrency} clients" if plan.request_rate is None else f"{plan.request_rate:g} requests/s"
        console.print(f"{plan.num_prompts} requests to {chosen} at {client.url}, {how}", markup=False)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("requests", total=plan.num_prompts)
            generator = LoadGenerator(
                client, chosen, plan, clock=monotonic_clock, on_end=lambda _: progress.advance(bar)
            )
            await generator.calibrate()
            return chosen, await generator.run()
