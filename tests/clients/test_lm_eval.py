"""EleutherAI's lm-evaluation-harness against the server: the numbers that it logs are those of ``LLM``.

Its three kinds of tasks: choices by log-likelihood, log-likelihood of whole texts (both with echo), generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slipstream import LLM, SamplingParams
from slipstream.tests.clients.environments import ClientEnvironment, client_environment
from slipstream.tests.gateway.server_process import Server, running_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]

# For models behind an API it needs no torch; transformers only for the tokenizer.
REQUIREMENTS = ("lm-eval[api]==0.4.13", "transformers==5.23.0")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
TASKS = Path(__file__).resolve().parent / "tasks"
RUN_TIMEOUT_S = 300.0
TOLERANCE = 1e-3

WAYS = {
    "token ids, several to a request": ("tokenized_requests=True", "4"),
    "text, several requests at once": ("tokenized_requests=False,num_concurrent=4", "1"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What the harness wrote down: its figures by task, and its samples by task in the order of the documents."""

    figures: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ClientEnvironment:
    return client_environment(pytestconfig, "lm-eval", REQUIREMENTS, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(environment: ClientEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(MODEL, tmp_path_factory.mktemp("log") / "server.log", "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODEL), dtype="float32", max_num_seqs=8) as opened:
        yield opened


@pytest.fixture(scope="module", params=list(WAYS))
def logged(
    request: pytest.FixtureRequest, environment: ClientEnvironment, server: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Logged:  # fmt: skip
    out = tmp_path_factory.mktemp("out")
    way, batch_size = WAYS[request.param]
    model_arguments = f"model=demo_model,base_url={server.url}/v1/completions,tokenizer={MODEL},max_retries=1"
    tasks = ("slipstream_choice", "slipstream_rolling", "slipstream_generate")
    environment.run(
        "lm-eval",
        [
            *("run", "--model", "local-completions", "--model_args", f"{model_arguments},{way}"),
            *("--batch_size", batch_size),
            *("--tasks", ",".join(tasks), "--include_path", str(TASKS)),
            *("--output_path", str(out), "--log_samples"),
        ],
        # The tasks name their data relative to where the harness runs.
        cwd=TASKS,
        timeout_s=RUN_TIMEOUT_S,
    )
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(rows, key=lambda row: int(row["doc_id"]))
        assert len(rows) == len((TASKS / f"{task.removeprefix('slipstream_')}.jsonl").read_text().splitlines())
    return Logged(figures=json.loads(results.read_text(encoding="utf-8"))["results"], samples=samples)


def scored(llm: LLM, prompt: str | list[int], start: int) -> tuple[float, bool]:
    """Return the log-probability of a prompt from a token on, and whether each of those is the likeliest."""
    output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))[0]
    assert output.prompt_logprobs is not None
    entries = []
    for token_id, table in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[start:]:
        assert table is not None
        entries.append(table[token_id])
    return sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)


def tokens(llm: LLM, text: str) -> list[int]:
    return llm.generate([text], SamplingParams(max_tokens=1))[0].prompt_token_ids


def test_choices_have_the_log_probabilities_of_llm(logged: Logged, llm: LLM) -> None:
    right = 0
    for sample in logged.samples["slipstream_choice"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        start = tokens(llm, question)
        # Where a token spans the border, the harness scores tokens that are not the text's: not ours to compare with.
        assert all(tokens(llm, question + choice)[: len(start)] == start for choice in choices)
        expected = [scored(llm, question + choice, len(start)) for choice in choices]
        found = [(float(value), greedy == "True") for ((value, greedy),) in sample["resps"]]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        best = max(range(len(choices)), key=lambda index: expected[index][0])
        right += best == sample["doc"]["answer"]
    count = len(logged.samples["slipstream_choice"])
    # One answer of the data is the unlikely one, so that the figure cannot be 1 by chance or by default.
    assert 0 < right < count
    assert logged.figures["slipstream_choice"]["acc,none"] == pytest.approx(right / count)


def test_whole_texts_have_the_log_probabilities_of_llm(logged: Logged, llm: LLM) -> None:
    first = AutoTokenizer.from_pretrained(MODEL).eos_token_id
    for sample in logged.samples["slipstream_rolling"]:
        expected, _ = scored(llm, [first, *tokens(llm, sample["doc"]["text"])], 1)
        ((found,),) = sample["resps"]
        assert float(found) == pytest.approx(expected, abs=TOLERANCE)


def test_generated_text_is_that_of_llm(logged: Logged, llm: LLM) -> None:
    samples = logged.samples["slipstream_generate"]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=("\n",))
    expected = [output.outputs[0].text for output in llm.generate([row["doc"]["prompt"] for row in samples], params)]
    assert [row["resps"][0][0] for row in samples] == expected
    exact = sum(text == row["doc"]["line"] for text, row in zip(expected, samples, strict=True)) / len(samples)
    assert logged.figures["slipstream_generate"]["exact_match,none"] == pytest.approx(exact)
