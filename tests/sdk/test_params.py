"""SamplingParams: the edges of every parameter, an error that names the field for everything beyond them."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream import InvalidRequest, SamplingParams, StructuredOutputsParams
from slipstream.sdk import params as limits

# The frozen options: adding, renaming or dropping a parameter means editing this list, with the reason in the commit.
# Left: the name. Right: the default of vLLM's SamplingParams, which is ours; None, "" and empty mean the same there.
VLLM_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "logit_bias": None,
    "structured_outputs": None,
}

INT31 = 2**31 - 1

VALID: dict[str, list[Any]] = {
    "n": [1, 2, limits.MAX_N],
    "presence_penalty": [-2, -2.0, 0, 2.0],
    "frequency_penalty": [-2, -2.0, 0, 2.0],
    "repetition_penalty": [0.01, 1, 100.0],
    "temperature": [0, 0.0, 1e-6, 1, 100.0],
    "top_p": [1e-6, 0.5, 1, 1.0],
    "top_k": [-1, 0, 1, INT31],
    "min_p": [0, 0.0, 1.0],
    "seed": [None, -(2**63), -1, 0, 2**64 - 1],
    "stop": [None, (), [], "x", ["x", "yy"], ("x",), "x" * 1024, ["x"] * 64, "\n", "é漢"],
    "stop_token_ids": [None, (), [], [0], (1, 2), [INT31], [1] * 128],
    "ignore_eos": [True, False],
    "max_tokens": [None, 1, INT31],
    "min_tokens": [0, 1, 16],
    "logprobs": [None, 0, 1, limits.MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, 1, limits.MAX_LOGPROBS],
    "detokenize": [True, False],
    "skip_special_tokens": [True, False],
    "include_stop_str_in_output": [True, False],
    "logit_bias": [None, {}, {0: -100}, {INT31: 100.0}, {"7": 1}, dict.fromkeys(range(1024), 0.5)],
    "structured_outputs": [None, StructuredOutputsParams(json_object=True)],
}

NOT_NUMBERS = [None, "1", True, False, [1], math.nan, math.inf, -math.inf, 10**400, -(10**400), 1j]
NOT_INTEGERS = ["1", True, False, 1.0, [1], math.nan, math.inf]
NOT_FLAGS: list[Any] = [None, 0, 1, "true", [], ()]

INVALID: dict[str, list[Any]] = {
    "n": [None, *NOT_INTEGERS, 0, -1, limits.MAX_N + 1],
    "presence_penalty": [*NOT_NUMBERS, -2.01, 2.01],
    "frequency_penalty": [*NOT_NUMBERS, -2.01, 2.01],
    "repetition_penalty": [*NOT_NUMBERS, 0, 0.0, 5e-324, 0.009, -1, 100.1],
    "temperature": [*NOT_NUMBERS, -0.01, 100.1],
    "top_p": [*NOT_NUMBERS, 0, 0.0, -0.1, 1.01],
    "top_k": [None, *NOT_INTEGERS, -2, INT31 + 1],
    "min_p": [*NOT_NUMBERS, -0.01, 1.01],
    "seed": [*NOT_INTEGERS, -(2**63) - 1, 2**64],
    "stop": ["", [""], ["x", ""], 1, [1], ["x", None], b"x", {"x"}, "x" * 1025, ["x"] * 65],
    "stop_token_ids": [0, 1, False, True, "", "1", ["1"], [1.0], [True], [-1], [INT31 + 1], [1] * 129, b"1", [None]],
    "ignore_eos": NOT_FLAGS,
    "max_tokens": [*NOT_INTEGERS, 0, -1, INT31 + 1],
    "min_tokens": [None, *NOT_INTEGERS, -1, 17, INT31 + 1],
    "logprobs": [*NOT_INTEGERS, -1, limits.MAX_LOGPROBS + 1],
    "prompt_logprobs": [*NOT_INTEGERS, -1, limits.MAX_LOGPROBS + 1],
    "detokenize": NOT_FLAGS,
    "skip_special_tokens": NOT_FLAGS,
    "include_stop_str_in_output": NOT_FLAGS,
    "logit_bias": [
        0, 1, "", [], [(1, 1.0)], "x", {-1: 0.0}, {INT31 + 1: 0.0}, {"x": 0.0}, {"-1": 0.0}, {"": 0.0}, {"²": 0.0},
        {"9" * 5000: 0.0}, {1.0: 0.0}, {True: 0.0}, {None: 0.0}, {1: 100.1}, {1: -100.1}, {1: math.nan}, {1: "1"},
        {1: None}, {1: True}, {1: 10**400}, dict.fromkeys(range(1025), 0.5),
    ],
    "structured_outputs": [{}, "json", True, 0, {"json_object": True}],
}  # fmt: skip


def cases(table: Mapping[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{i}-{repr(value)[:20]}")
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


def test_the_options_are_frozen() -> None:
    assert [field.name for field in dataclasses.fields(SamplingParams)] == list(VLLM_DEFAULTS)
    assert VALID.keys() == VLLM_DEFAULTS.keys() == INVALID.keys()


@pytest.mark.parametrize("name", VLLM_DEFAULTS)
def test_defaults_are_those_of_vllm(name: str) -> None:
    ours, theirs = getattr(SamplingParams(), name), VLLM_DEFAULTS[name]
    if theirs is None:
        assert ours is None or len(ours) == 0
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", VLLM_DEFAULTS)
def test_passing_the_default_of_vllm_changes_nothing(name: str) -> None:
    assert SamplingParams(**{name: VLLM_DEFAULTS[name]}) == SamplingParams()


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_a_valid_value_is_taken(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    if name not in ("top_k", "stop", "stop_token_ids", "logit_bias"):
        assert getattr(params, name) == value


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: ")
    assert isinstance(caught.value, ValueError)


@given(
    name=st.sampled_from(list(VLLM_DEFAULTS)),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), st.one_of(st.floats(), st.text(max_size=3))),
    ),
)
def test_any_value_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    try:
        SamplingParams(**{name: value})
    except InvalidRequest as error:
        assert error.field in (name, "min_tokens")


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_parameters_are_named() -> None:
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[call-arg]


def test_values_are_normalised() -> None:
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop_strings == ("x", "y")
    assert SamplingParams(stop=None).stop_strings == ()
    assert SamplingParams(stop_token_ids=[3, 4]).stop_ids == (3, 4)
    assert SamplingParams(stop_token_ids=None).stop_ids == ()
    assert SamplingParams(logit_bias={"7": 1, 8: -1.5}).logit_bias == {7: 1.0, 8: -1.5}  # type: ignore[dict-item]


def test_min_tokens_is_held_against_max_tokens() -> None:
    assert SamplingParams(min_tokens=16, max_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000
    with pytest.raises(InvalidRequest, match="min_tokens: 9 is more than max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_stop_strings_need_text() -> None:
    assert SamplingParams(stop_token_ids=[1], detokenize=False).stop_ids == (1,)
    with pytest.raises(InvalidRequest, match=r"stop: .*stop_token_ids"):
        SamplingParams(stop="x", detokenize=False)


def test_a_callers_later_change_does_not_reach_in() -> None:
    stop, ids, bias = ["x"], [1], {1: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("")
    ids.append(-1)
    bias[-1] = math.nan
    assert (params.stop_strings, params.stop_ids, params.logit_bias) == (("x",), (1,), {1: 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 0  # type: ignore[misc]


def test_copies_are_equal_and_checked() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], stop_token_ids=[1], logit_bias={2: 1}, top_k=-1, seed=7)
    for other in (dataclasses.replace(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert other == params
    with pytest.raises(InvalidRequest, match="top_p"):
        dataclasses.replace(params, top_p=2.0)
