"""The arithmetic of load tests."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from slipstream.runtime.load_test.plan import LoadPlan, calibrated_words, poisson_arrivals, prompt_text
from slipstream.runtime.load_test.report import to_json, to_table
from slipstream.runtime.load_test.statistics import RequestRecord, distribution, percentile, summarize
from slipstream.sdk.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0, 1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 50, 3.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 90, 4.6),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 100, 5.0),
        ([float(value) for value in range(101)], 99, 99.0),
    ],
)
def test_a_percentile_is_linear_between_neighbours(values: list[float], percent: float, expected: float) -> None:
    assert math.isclose(percentile(values, percent), expected)


def test_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    assert distribution([]) is None


def test_a_distribution_is_in_milliseconds_and_needs_no_order() -> None:
    found = distribution([0.003, 0.001, 0.002])
    assert found is not None
    assert (found.count, round(found.mean_ms, 9), found.max_ms) == (3, 2.0, 3.0)
    assert found.quantiles_ms[50] == 2.0


RECORDS = [
    # Due at 1, sent late: the wait counts. Pieces after 2, 2.5 and 3.5 s, the last with two tokens.
    RequestRecord(index=0, due_s=1.0, end_s=5.0, pieces_s=(3.0, 3.5, 4.5), prompt_tokens=10, output_tokens=4),
    # A server that does not count.
    RequestRecord(index=1, due_s=2.0, end_s=3.0, pieces_s=(2.5,)),
    # What fails is counted, with the first message of each kind, and is part of no figure.
    RequestRecord(index=2, due_s=2.0, end_s=99.0, pieces_s=(50.0, 98.0), error="deadline", detail="first"),
    RequestRecord(index=3, due_s=2.0, end_s=9.0, error="deadline", detail="second"),
    RequestRecord(index=4, due_s=2.0, end_s=2.1, error="http 429", detail="queue is full"),
]


def test_a_summary_of_known_records() -> None:
    figures = summarize(RECORDS, start_s=1.0, end_s=11.0)
    assert (figures.requests, figures.completed, figures.uncounted) == (5, 2, 1)
    assert (figures.prompt_tokens, figures.output_tokens) == (10, 5)
    assert (figures.requests_per_s, figures.output_tokens_per_s) == (0.2, 0.5)
    assert figures.errors == {"deadline": 2, "http 429": 1}
    assert figures.details == {"deadline": "first", "http 429": "queue is full"}
    assert figures.first_token is not None and figures.first_token.max_ms == 2000.0
    assert figures.first_token.quantiles_ms[50] == 1250.0
    assert figures.between_tokens is not None and figures.between_tokens.mean_ms == 750.0
    assert figures.per_token is not None and (figures.per_token.count, figures.per_token.max_ms) == (1, 500.0)
    assert figures.end_to_end is not None and figures.end_to_end.max_ms == 4000.0


def test_a_summary_of_failures_alone_shows_them() -> None:
    figures = summarize(RECORDS[2:], start_s=0.0, end_s=1.0)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(to_table(figures))
    printed = captured.get()
    assert "0 of 3 requests" in printed and "2 failed: deadline: first" in printed
    assert "1 failed: http 429: queue is full" in printed
    plan = LoadPlan(num_prompts=3)
    content = json.loads(json.dumps(to_json(figures, plan, base_url="http://x", model="m")))
    assert content["figures"]["errors"] == {"deadline": 2, "http 429": 1}
    assert content["figures"]["first_token"] is None and content["plan"]["num_prompts"] == 3


def test_arrivals_repeat_with_their_seed_and_keep_the_rate() -> None:
    times = poisson_arrivals(4000, 20.0, seed=3)
    assert times == poisson_arrivals(4000, 20.0, seed=3) != poisson_arrivals(4000, 20.0, seed=4)
    assert times[0] == 0.0 and list(times) == sorted(times)
    assert math.isclose(times[-1], 4000 / 20.0, rel_tol=0.1)
    assert LoadPlan(num_prompts=3).arrivals() is None
    assert len(LoadPlan(num_prompts=3, request_rate=1.0).arrivals() or ()) == 3


def test_prompts_repeat_with_their_seed_and_differ_by_index() -> None:
    assert prompt_text(20, seed=1, index=5) == prompt_text(20, seed=1, index=5)
    assert len({prompt_text(20, seed=seed, index=index) for seed in (1, 2) for index in range(10)}) == 20
    assert len(prompt_text(20, seed=1, index=0).split()) == 20
    assert calibrated_words(128, tried_words=128, found_tokens=256) == 64
    assert calibrated_words(1, tried_words=1, found_tokens=9) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"num_prompts": 0}, {"num_prompts": 10**7}, {"max_concurrency": 0}, {"request_rate": -1.0},
     {"request_timeout_s": math.inf}, {"output_tokens": 0}],
)  # fmt: skip
def test_a_wrong_plan_names_its_option(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoadPlan(**wrong)  # type: ignore[arg-type]


def test_concurrency_has_a_bound_in_every_loop() -> None:
    assert LoadPlan(num_prompts=10).concurrency == 10
    assert LoadPlan(num_prompts=1000).concurrency == 32
    assert LoadPlan(num_prompts=10_000, request_rate=5.0).concurrency == 4096
    assert LoadPlan(num_prompts=1000, request_rate=5.0, max_concurrency=7).concurrency == 7
