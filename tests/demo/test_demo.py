"""The demo's parts: asking several prompts together, showing how the answers grow, and what they have cost."""

from __future__ import annotations

import asyncio
import io
import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.runtime.api_client.client import ApiClient
from slipstream.runtime.demo.asking import Answer, ask_together
from slipstream.runtime.demo.movement import Movement, movement
from slipstream.runtime.demo.screen import AnswerScreen, movements, places, timings
from slipstream.runtime.load_test.statistics import RequestRecord
from slipstream.runtime.local_cluster import Shard
from slipstream.tests.fakes.api_server import HEAD, api_server, end, event, whole
from slipstream.tests.fakes.api_server import Answer as Reply

PROMPTS = ["one", "two", "fail"]


def piece(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"text": text, "finish_reason": finish_reason}]})


def ask(reply: Reply, *, timeout_s: float = 60.0) -> tuple[list[Answer], list[tuple[int, str, bool]], int]:
    """Ask a server the prompts; return the answers, what was shown, and how many requests met there."""
    shown: list[tuple[int, str, bool]] = []
    ticks = itertools.count()

    async def run() -> tuple[list[Answer], int]:
        async with api_server(reply) as server, ApiClient(server.url) as client:
            answers = await ask_together(
                client, PROMPTS, {"model": "first", "seed": 7}, show=lambda *what: shown.append(what),
                clock=lambda: float(next(ticks)), timeout_s=timeout_s,
            )  # fmt: skip
            assert all(body["seed"] == 7 and body["model"] == "first" for body in server.bodies)
            return answers, server.most_at_once

    answers, most = asyncio.run(run())
    return answers, shown, most


def test_prompts_are_asked_together_and_a_failure_is_one_answers_own() -> None:
    met, everyone = [0], asyncio.Event()

    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        met[0] += 1
        if met[0] == len(PROMPTS):
            everyone.set()
        # Nobody is answered before all have asked.
        await everyone.wait()
        if body["prompt"] == "fail":
            writer.write(whole(400, {"error": {"message": "not this one"}}))
            return
        writer.write(HEAD + piece("a") + piece("") + piece(f"b{body['prompt']}") + piece("", "length"))
        writer.write(end(prompt_tokens=4, output_tokens=3))

    answers, shown, most = ask(reply)
    assert most == len(PROMPTS)
    good, bad = answers[:2], answers[2]
    assert all(answer.record.prompt_tokens == 4 and answer.record.tokens == 3 for answer in good)
    # The piece without text brought no time of its own.
    assert all(len(answer.record.pieces_s) == 2 and answer.finish_reason == "length" for answer in good)
    assert (bad.record.error, bad.record.detail, bad.finish_reason) == ("http 400", "not this one", None)
    assert ["".join(text for index, text, _ in shown if index == each) for each in (0, 1, 2)] == [
        "abone",
        "abtwo",
        "",
    ]
    assert [ended for index, _, ended in shown if index == 0] == [False, False, False, True]


def test_an_answer_that_does_not_come_ends_at_its_deadline() -> None:
    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await writer.wait_closed()

    answers, shown, _ = ask(reply, timeout_s=0.05)
    assert {answer.record.error for answer in answers} == {"deadline"} and not shown


def console(*, terminal: bool, width: int = 120, height: int = 20) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=height, color_system=None)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_without_a_terminal_complete_lines_are_printed() -> None:
    target = console(terminal=False)
    with AnswerScreen(target, ["x =", "y ="]) as screen:
        screen.add(0, " 1\nz", False)
        screen.add(1, " [bold]", True)
        screen.add(0, " = 2", True)
    assert printed(target) == "prompt [1] 'x ='\nprompt [2] 'y ='\n[1]  1\n[2]  [bold]\n[1] z = 2\n"


def test_on_a_terminal_the_ends_are_shown_and_all_of_it_afterwards() -> None:
    for width in (60, 120):
        target = console(terminal=True, width=width)
        lines = [f"line {number}" for number in range(40)]
        with AnswerScreen(target, ["first:", "second:"]) as screen:
            for line in lines:
                screen.add(0, f"\n{line}", False)
            growing = target.render_lines(screen._panels(target.height - 1))
        assert len(growing) < target.height
        seen = "\n".join("".join(segment.text for segment in line) for line in growing)
        assert "line 39" in seen and "line 0 " not in seen and "second:" in seen
        final = printed(target)[-width * 60 :]
        assert all(line in final for line in lines)


def rows(table: Table) -> list[list[str]]:
    """Return a table's cells as they are shown, its head left out."""
    target = console(terminal=False)
    target.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed(target).splitlines() if "│" in line]


def test_what_was_moved_is_what_the_figures_have_grown_by() -> None:
    names = (
        'hand_offs_total{ending="committed"}',
        "kv_bytes_moved_total",
        "kv_wire_seconds_total",
        "kv_hidden_seconds_total",
    )
    before = {f"slipstream_{name}": figure for name, figure in zip(names, (2.0, 1e6, 0.5, 0.25), strict=True)}
    after = {f"slipstream_{name}": figure for name, figure in zip(names, (8.0, 4e6, 0.9, 0.55), strict=True)}
    moved = movement(before, after)
    assert (moved.hand_offs, moved.kv_bytes) == (6, 3_000_000)
    assert rows(movements(moved)) == [["6", "3,000,000 bytes", "400.0", "75%"]]
    # A gateway that has not moved anything may not have the figures yet.
    assert movement({}, {}) == Movement() and rows(movements(Movement())) == [["0", "0 bytes", "0.0", "-"]]


def test_every_shard_is_listed_with_its_place() -> None:
    shards = [
        Shard(replica="prefill-1", role="prefill", rank=0, part="part 1 of 2 of every layer", device="a/0"),
        Shard(replica="[odd]-2", role="decode", rank=1, part="stage 2 of 2", device="b/1"),
    ]
    assert rows(places(shards)) == [
        ["prefill-1", "prefill", "0", "part 1 of 2 of every layer", "a/0"],
        ["[odd]-2", "decode", "1", "stage 2 of 2", "b/1"],
    ]


def test_the_table_counts_as_the_server_did() -> None:
    answers = [
        Answer(
            record=RequestRecord(
                index=0, due_s=1.0, end_s=3.0, pieces_s=(1.5, 2.0, 2.5), prompt_tokens=7, output_tokens=5
            ),
            finish_reason="stop",
        ),
        Answer(record=RequestRecord(index=1, due_s=1.0, end_s=5.0, error="http 400"), finish_reason=None),
    ]
    assert rows(timings(answers)) == [
        ["1", "7", "5", "500.0", "250.0", "2.5", "stop"],
        ["2", "-", "0", "-", "-", "0.0", "http 400"],
        ["all", "7", "5", "", "", "1.2", "4.00 s"],
    ]
