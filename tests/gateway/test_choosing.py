"""Which replica gets a request: a table of loads, and what holds for any course of events."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.runtime.gateway.choosing import Balance

Step = tuple[str, Any]
"""``report``: (name, load), ``send``: (name, sequences)."""

TABLE: list[tuple[str, list[Step], list[str], str | None]] = [
    ("nobody there", [], [], None),
    ("the only one", [("report", ("a", 99))], ["a"], "a"),
    ("the least loaded", [("report", ("a", 3)), ("report", ("b", 1)), ("report", ("c", 2))], ["a", "b", "c"], "b"),
    ("one without a report is idle", [("report", ("a", 1))], ["a", "b"], "b"),
    ("what was sent counts", [("send", ("a", 2)), ("report", ("b", 1))], ["a", "b"], "b"),
    ("until it is reported", [("send", ("a", 2)), ("report", ("b", 1)), ("report", ("a", 0))], ["a", "b"], "a"),
    ("a request of many sequences weighs more", [("send", ("a", 8)), *3 * [("send", ("b", 1))]], ["a", "b"], "b"),
    ("equals in turn", [("send", ("a", 1)), ("send", ("b", 1))], ["a", "b"], "a"),
    ("equals in turn, the other way", [("send", ("b", 1)), ("send", ("a", 1))], ["a", "b"], "b"),
    ("who is not asked for is not chosen", [("report", ("a", 9)), ("report", ("b", 0))], ["a"], "a"),
    ("who was forgotten begins anew", [("report", ("a", 5)), ("forget", "a"), ("report", ("b", 1))], ["a", "b"], "a"),
]


def carry_out(balance: Balance, step: Step) -> None:
    match step:
        case ("report", (name, load)):
            balance.report(name, load)
        case ("send", (name, sequences)):
            balance.send(name, sequences)
        case ("forget", name):
            balance.forget(name)


@pytest.mark.parametrize(("steps", "names", "chosen"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_choices(steps: list[Step], names: list[str], chosen: str | None) -> None:
    balance = Balance()
    for step in steps:
        carry_out(balance, step)
    assert balance.least(names) == chosen
    # Looking changes nothing.
    assert balance.least(names) == chosen


names = st.sampled_from("abcd")
steps = st.lists(
    st.tuples(st.just("report"), st.tuples(names, st.integers(0, 20)))
    | st.tuples(st.just("send"), st.tuples(names, st.integers(1, 8)))
    | st.tuples(st.just("choose"), st.sets(names, min_size=1)),
    max_size=60,
)


@given(steps)
def test_the_chosen_one_is_never_busier_than_another(course: list[Step]) -> None:
    balance, loads = Balance(), Counter[str]()
    for kind, what in course:
        if kind != "choose":
            carry_out(balance, (kind, what))
            name, number = what
            loads[name] = number if kind == "report" else loads[name] + number
            continue
        chosen = balance.least(sorted(what))
        assert chosen is not None and chosen in what and loads[chosen] == min(loads[name] for name in what)
        balance.send(chosen, 1)
        loads[chosen] += 1


@given(st.integers(1, 6), st.integers(1, 60))
def test_requests_are_spread_evenly_while_no_report_comes(replicas: int, requests: int) -> None:
    balance, sent = Balance(), Counter[str]()
    all_of_them = [f"p-{number}" for number in range(replicas)]
    for _ in range(requests):
        chosen = balance.least(all_of_them)
        assert chosen is not None
        balance.send(chosen, 1)
        sent[chosen] += 1
    counts = [sent[name] for name in all_of_them]
    assert max(counts) - min(counts) <= 1


@given(st.integers(2, 6), st.integers(1, 12))
def test_idle_replicas_take_turns_although_reports_come_after_each_request(replicas: int, rounds: int) -> None:
    balance = Balance()
    all_of_them = [f"p-{number}" for number in range(replicas)]
    order = []
    for _ in range(rounds * replicas):
        chosen = balance.least(all_of_them)
        assert chosen is not None
        order.append(chosen)
        balance.send(chosen, 1)
        balance.report(chosen, 0)
    assert order == rounds * all_of_them
