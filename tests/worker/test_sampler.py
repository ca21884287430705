"""The sampler against a plain implementation: one row, one token at a time, the whole vocabulary, nothing pruned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.runtime.messages import AdmittedSequence, SequenceId
from slipstream.runtime.worker.sampler import Sampler, prompt_token_logprobs
from slipstream.sdk.params import SamplingParams
from slipstream.tests.worker.plain_sampling import plain_draw, plain_edits


def admitted(
    slot: int, prompt: list[int], params: SamplingParams, *, seed: int = 0, stop: list[int] | None = None
) -> AdmittedSequence:
    return AdmittedSequence(
        slot=slot,
        sequence_id=SequenceId(slot),
        token_ids=np.array(prompt, np.int32),
        prompt_length=len(prompt),
        block_ids=np.zeros(0, np.int32),
        params=params,
        seed=seed,
        stop_ids=tuple(stop or ()),
    )


def table_of(known: list[list[int]], length: int = 64) -> np.ndarray:
    table = np.full((len(known), length), -1, np.int32)
    for slot, tokens in enumerate(known):
        table[slot, : len(tokens)] = tokens
    return table


VOCABULARY = 12
QUARTERS = st.integers(-40, 40).map(lambda value: value / 4)
TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def logits_rows(draw: st.DrawFn) -> list[float]:
    kind = draw(st.sampled_from(["free", "flat", "peaked", "ties", "holes"]))
    if kind == "flat":
        return [draw(QUARTERS)] * VOCABULARY
    if kind == "peaked":
        row = [draw(QUARTERS) / 8 for _ in range(VOCABULARY)]
        row[draw(TOKENS)] += 30.0
        return row
    if kind == "ties":
        return [float(draw(st.integers(0, 2))) for _ in range(VOCABULARY)]
    row = [draw(QUARTERS) for _ in range(VOCABULARY)]
    if kind == "holes":
        keep = draw(TOKENS)
        row = [logit if token == keep or draw(st.booleans()) else -math.inf for token, logit in enumerate(row)]
    return row


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int], list[int], int]:
    plain = draw(st.booleans())
    min_tokens = 0 if plain else draw(st.integers(0, 6))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.05, 0.5, 0.8, 1.0, 1.7, 20.0])),
        top_p=draw(st.sampled_from([1.0, 0.05, 0.3, 0.7, 0.95, 0.9999])),
        top_k=draw(st.sampled_from([-1, 1, 2, 5, VOCABULARY, 100])),
        min_p=draw(st.sampled_from([0.0, 0.001, 0.1, 0.6, 1.0])),
        repetition_penalty=1.0 if plain else draw(st.sampled_from([1.0, 0.7, 1.3, 2.0])),
        frequency_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.3, -0.5, 2.0])),
        presence_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.7, -1.0])),
        logit_bias={}
        if plain
        else draw(st.dictionaries(st.integers(0, 20), st.sampled_from([-100.0, -1.1, 2.3]), max_size=3)),
        min_tokens=min_tokens,
        max_tokens=64,
    )
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=8))
    output = draw(st.lists(TOKENS, max_size=8))
    stop = [] if plain else draw(st.lists(st.integers(0, 20), max_size=3, unique=True))
    return draw(logits_rows()), params, prompt, output, stop, draw(st.integers(-(2**63), 2**64 - 1))


@settings(max_examples=150)
@given(st.lists(cases(), min_size=1, max_size=5))
def test_draws_equal_the_plain_implementation(
    batch: list[tuple[list[float], SamplingParams, list[int], list[int], list[int], int]],
) -> None:
    sampler = Sampler(len(batch))
    expected, invalid = [], []
    for slot, (logits, params, prompt, output, stop, seed) in enumerate(batch):
        sampler.admit(admitted(slot, prompt, params, seed=seed, stop=stop))
        edited = plain_edits(logits, params, prompt, output, stop)
        if max(edited) == -math.inf:
            invalid.append(slot)
            expected.append(-1)
        else:
            expected.append(plain_draw(edited, params, seed, len(prompt) + len(output)))
    slots = np.arange(len(batch), dtype=np.int32)
    positions = np.array([len(prompt) + len(output) for _, _, prompt, output, _, _ in batch], np.int64)
    table = table_of([prompt + output for _, _, prompt, output, _, _ in batch])
    sampled = sampler.sample(torch.tensor([case[0] for case in batch]), slots, positions, table)
    assert sampled.invalid_rows == tuple(invalid)
    drawn = [-1 if row in invalid else token for row, token in enumerate(sampled.token_ids.tolist())]
    assert drawn == expected

    order = list(reversed(range(len(batch))))
    again = sampler.sample(torch.tensor([batch[row][0] for row in order]), slots[order], positions[order], table)
    assert [again.token_ids[order.index(row)] for row in range(len(batch)) if row not in invalid] == [
        token for token in drawn if token >= 0
    ]


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_pruning_is_exact_over_a_large_vocabulary(scale: float, seed: int) -> None:
    rows, vocabulary = 24, 3000
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal((rows, vocabulary)) * scale).astype(np.float32)
    sampler = Sampler(rows)
    choices = [
        SamplingParams(),
        SamplingParams(top_p=0.6),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(min_p=0.02),
        SamplingParams(temperature=3.0, top_p=0.2),
    ]
    all_params = [choices[row % len(choices)] for row in range(rows)]
    for row, params in enumerate(all_params):
        sampler.admit(admitted(row, [1], params, seed=row))
    drawn = sampler.sample(
        torch.from_numpy(logits.copy()), np.arange(rows, dtype=np.int32), np.arange(1, rows + 1), table_of([[1]] * rows)
    ).token_ids.tolist()
    for row, params in enumerate(all_params):
        assert drawn[row] == plain_draw(logits[row].tolist(), params, row, row + 1), f"row {row}"


def test_a_resumed_sequence_draws_the_same_tokens(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((20, 50)).astype(np.float32)
    params = SamplingParams(repetition_penalty=1.4, frequency_penalty=0.2, min_tokens=5, max_tokens=20, top_p=0.9)
    prompt = [3, 1, 4, 1, 5]

    def run(resume_at: int | None) -> list[int]:
        sampler, table = Sampler(4), table_of([[]] * 4)
        slot = 0
        sampler.admit(admitted(slot, prompt, params, seed=9, stop=[7]))
        known = list(prompt)
        for step in range(20):
            if step == resume_at:
                slot = 2
                resumed = AdmittedSequence(
                    slot=slot,
                    sequence_id=SequenceId(1),
                    token_ids=np.array(known, np.int32),
                    prompt_length=len(prompt),
                    block_ids=np.zeros(0, np.int32),
                    params=params,
                    seed=9,
                    stop_ids=(7,),
                )
                sampler.admit(resumed)
            table[slot, : len(known)] = known
            sampled = sampler.sample(
                torch.from_numpy(logits[step : step + 1].copy()),
                np.array([slot], np.int32),
                np.array([len(known)], np.int64),
                table,
            )
            known.append(int(sampled.token_ids[0]))
        return known

    assert run(None) == run(1) == run(13)


def test_a_slot_forgets_its_last_sequence() -> None:
    sampler = Sampler(1)
    sampler.admit(admitted(0, [1], SamplingParams(temperature=0, logit_bias={2: 100.0}, logprobs=3)))
    sampler.admit(admitted(0, [1], SamplingParams(temperature=0)))
    sampled = sampler.sample(
        torch.tensor([[0.0, 5.0, 1.0]]), np.zeros(1, np.int32), np.ones(1, np.int64), table_of([[1]])
    )
    assert sampled.token_ids.tolist() == [1]
    assert sampled.logprobs == {}


def test_end_tokens_are_masked_until_min_tokens() -> None:
    sampler = Sampler(1)
    sampler.admit(admitted(0, [1, 1], SamplingParams(temperature=0, min_tokens=2, max_tokens=9), stop=[0, 999]))
    drawn = []
    for position in (2, 3, 4):
        sampled = sampler.sample(
            torch.tensor([[9.0, 5.0, 1.0]]), np.zeros(1, np.int32), np.array([position]), table_of([[1, 1, 1, 1]])
        )
        drawn.append(int(sampled.token_ids[0]))
    assert drawn == [1, 1, 0]


def test_logprobs_are_of_the_models_own_logits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((4, 100)).astype(np.float32) * 3
    sampler = Sampler(4)
    all_params = [
        SamplingParams(temperature=0.7, logprobs=5, logit_bias={3: 50.0}),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, logprobs=0),
        SamplingParams(temperature=0.0, logprobs=2, repetition_penalty=1.5),
    ]
    for slot, params in enumerate(all_params):
        sampler.admit(admitted(slot, [3, 4], params, seed=slot))
    slots = np.array([2, 0, 1, 3], np.int32)
    sampled = sampler.sample(
        torch.from_numpy(logits[slots].copy()), slots, np.full(4, 2, np.int64), table_of([[3, 4]] * 4)
    )
    assert sorted(sampled.logprobs) == [0, 1, 3]
    for row, entry in sampled.logprobs.items():
        own = logits[slots[row]].astype(np.float64)
        expected = own - np.log(np.exp(own).sum())
        k = all_params[slots[row]].logprobs or 0
        assert entry.token_ids.tolist() == [int(sampled.token_ids[row]), *np.argsort(-own, kind="stable")[:k].tolist()]
        np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=2e-6)
        assert entry.rank == 1 + int((own > own[entry.token_ids[0]]).sum())
        assert entry.token_ids.dtype == np.int32
        assert entry.logprobs.dtype == np.float32
    assert sampled.token_ids[1] == 3


def test_logprobs_are_not_edited_when_every_row_asks() -> None:
    sampler = Sampler(1)
    sampler.admit(admitted(0, [1], SamplingParams(temperature=0, logprobs=1, logit_bias={2: 100.0})))
    sampled = sampler.sample(torch.zeros(1, 4), np.zeros(1, np.int32), np.ones(1, np.int64), table_of([[1]]))
    assert sampled.token_ids.tolist() == [2]
    assert sampled.logprobs[0].token_ids.tolist() == [2, 0]
    np.testing.assert_allclose(sampled.logprobs[0].logprobs, math.log(0.25), rtol=1e-6)


def test_prompt_logprobs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((9, 60)).astype(np.float32)
    targets = generator.integers(0, 60, 9).astype(np.int32)
    tables = prompt_token_logprobs(torch.from_numpy(logits), targets, 3)
    assert len(tables) == 9
    for row, table in enumerate(tables):
        own = logits[row].astype(np.float64)
        expected = own - np.log(np.exp(own).sum())
        assert table.token_ids.tolist() == [int(targets[row]), *np.argsort(-own)[:3].tolist()]
        np.testing.assert_allclose(table.logprobs, expected[table.token_ids], atol=2e-6)
        assert table.rank == 1 + int((own > own[targets[row]]).sum())
    assert prompt_token_logprobs(torch.zeros(0, 60), np.zeros(0, np.int32), 3) == ()
