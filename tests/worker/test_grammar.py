"""Grammars against vocabularies: a mask allows the tokens that can go on to a whole text, and no others."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import InvalidRequest, StructuredOutputsParams
from slipstream.runtime.messages import AdmittedSequence, SequenceId
from slipstream.runtime.worker.grammar import GrammarCompiler
from slipstream.runtime.worker.grammar_masks import GrammarMasks, TokenMasks
from slipstream.sdk.params import SamplingParams
from slipstream.tests.text.tiny_tokenizers import FAMILIES, byte_level, id_of

PATIENCE_S = 30.0
PADDING = 37
"""A model's vocabulary may be longer than its tokenizer's."""
FOLLOWED = ("byte level", "byte fallback", "byte fallback, nothing stripped")


def compiler_for(directory: Path, family: str = "byte level") -> GrammarCompiler:
    tokenizer = FAMILIES[family]()
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    ends = (id_of(tokenizer, "<|im_end|>"), id_of(tokenizer, "</s>"))
    return GrammarCompiler(file, vocab_size=tokenizer.get_vocab_size() + PADDING, eos_token_ids=ends)


class Row:
    """One sequence that is shown its grammar's masks step by step."""

    def __init__(self, compiler: GrammarCompiler, constraint: StructuredOutputsParams, *, min_tokens: int = 0) -> None:
        self.masks = GrammarMasks(compiler)
        self.compiler = compiler
        self.params = SamplingParams(structured_outputs=constraint, min_tokens=min_tokens, max_tokens=1000)
        self.tokens = np.zeros((2, 1000), dtype=np.int32)
        self.known = 3  # the prompt, which the grammar must not see
        self.admit()

    def admit(self) -> None:
        self.masks.admit(
            AdmittedSequence(
                slot=1,
                sequence_id=SequenceId(1),
                token_ids=self.tokens[1, : self.known],
                prompt_length=3,
                block_ids=np.zeros(1, np.int32),
                params=self.params,
                seed=0,
                stop_ids=self.compiler.eos_token_ids,
            )
        )

    def next_masks(self) -> TokenMasks:
        future = self.masks.begin(np.array([0, 1]), np.array([5, self.known]), self.tokens)
        assert future is not None
        return future.result(PATIENCE_S)

    def allowed(self) -> set[int]:
        found = self.next_masks()
        assert found.rows.tolist() == [1] and not found.failed_rows
        bits = np.unpackbits(found.masks[0].view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    def draw(self, token_id: int) -> None:
        self.tokens[1, self.known] = token_id
        self.known += 1


def texts_of(family: str) -> dict[int, str]:
    """Return the text of every token that stands for itself wherever it is."""
    tokenizer = FAMILIES[family]()
    special = {tokenizer.token_to_id(text) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>")}
    texts = {}
    for token in range(tokenizer.get_vocab_size()):
        # Behind another token, because decoders drop a space at the beginning.
        first = tokenizer.encode("x", add_special_tokens=False).ids
        text = tokenizer.decode([*first, token])[len(tokenizer.decode(first)) :]
        if token not in special and text and "�" not in text and "<" not in text:
            texts[token] = text
    return texts


@pytest.mark.parametrize("family", FOLLOWED)
def test_a_mask_allows_what_can_become_one_of_the_choices(family: str, tmp_path: Path, seed: int) -> None:
    compiler, texts = compiler_for(tmp_path, family), texts_of(family)
    draw = random.Random(seed)
    for _ in range(12):
        alphabet = draw.sample(sorted({text for text in texts.values() if len(text) < 4}), 6)
        choices = {"".join(draw.choices(alphabet, k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 6))}
        row = Row(compiler, StructuredOutputsParams(choice=sorted(choices)))
        said = ""
        while True:
            expected = {token for token, text in texts.items() if any(c.startswith(said + text) for c in choices)}
            allowed = row.allowed()
            # Where the next byte is forced, the compiler insists on the tokens that the tokenizer would choose.
            following = {choice.encode()[len(said.encode()) :][:1] for choice in choices if choice.startswith(said)}
            assert allowed & texts.keys() <= expected, (choices, said)
            assert allowed & texts.keys() == expected or len(following) == 1, (choices, said)
            assert (allowed >= set(compiler.eos_token_ids)) == (said in choices), (choices, said)
            if not allowed & texts.keys():
                # At an end, or where only a part of a character comes next.
                assert said in choices or allowed
                break
            token = draw.choice(sorted(allowed & texts.keys()))
            row.draw(token)
            said += texts[token]


def test_an_interrupted_row_goes_on_where_it_stood(tmp_path: Path) -> None:
    compiler, draw = compiler_for(tmp_path), random.Random(7)
    row = Row(compiler, StructuredOutputsParams(regex=r"(\([a-z]{1,4}\) ){2,5}!"))
    for _ in range(12):
        allowed = row.allowed()
        row.admit()  # a new state, which has to catch up
        assert row.allowed() == allowed
        row.draw(draw.choice(sorted(allowed)))


def test_the_end_comes_when_nothing_else_can(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path)
    ends = set(compiler.eos_token_ids)
    a = id_of(byte_level(), "a")
    row = Row(compiler, StructuredOutputsParams(regex="a{1,3}"), min_tokens=2)
    assert a in row.allowed() and not ends & row.allowed()
    row.draw(a)
    assert not ends & row.allowed(), "complete, but too early"
    row.draw(a)
    assert row.allowed() == {a} | ends
    row.draw(a)
    assert row.allowed() == ends
    row.draw(min(ends))
    assert row.allowed() == ends, "a step that was under way already draws another one"
    late = Row(compiler, StructuredOutputsParams(regex="a"), min_tokens=5)
    late.draw(a)
    assert late.allowed() == ends, "min_tokens gives way to the end of the text"


def test_a_slot_forgets_its_grammar(tmp_path: Path) -> None:
    row = Row(compiler_for(tmp_path), StructuredOutputsParams(json_object=True))
    row.params = SamplingParams()
    row.admit()
    assert row.masks.begin(np.array([1]), np.array([3]), row.tokens) is None


def test_a_grammar_that_becomes_too_complex_fails_its_row_alone(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path)
    row = Row(compiler, StructuredOutputsParams(regex="(((a{0,99}){0,99}){0,99}b?){0,99}"))
    for _ in range(100):
        found = row.next_masks()
        if found.failed_rows:
            break
        row.draw(id_of(byte_level(), "a"))
    assert found.failed_rows == (1,)
    other = Row(compiler, StructuredOutputsParams(regex="ab"))
    assert other.allowed()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "(" * 30_000 + "a" + ")" * 30_000}, "invalid regex"),
    ({"json": {"type": "nonsense"}}, "nonsense"),
    ({"json": {"$ref": "#"}}, "no text"),
    ({"json": {"$ref": "http://localhost/schema.json"}}, "retrieving it failed"),
    ({"json": {"$ref": "file:///etc/hostname"}}, "retrieving it failed"),
    ({"json": '{"minimum": ' + "9" * 400 + "}"}, "number out of range"),
    ({"json": '{"items":' * 200 + "{}" + "}" * 200}, "recursion limit"),
    ({"json": '{"items":' * 2000 + "{}" + "}" * 2000}, "recursion"),
    ({"json": {"unevaluatedItems": False, "type": "array"}}, "unevaluatedItems"),
    (
        {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}},
        "large",
    ),
    ({"json": {"type": "integer", "multipleOf": 999_999_937}}, "fuel"),
    ({"grammar": 'x: "a"'}, "no start"),
    ({"grammar": "start: " + "(" * 3000}, "nested"),
    ({"grammar": "start: a\na: a"}, "no text"),
]


@pytest.mark.parametrize(("constraint", "problem"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_compiled_is_refused_by_name(constraint: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (kind,) = constraint
    with pytest.raises(InvalidRequest, match=re.escape(problem)) as refused:
        compiler_for(tmp_path).compile(StructuredOutputsParams(**constraint))
    assert refused.value.field == f"structured_outputs.{kind}"
    assert len(refused.value.problem) < 500


def test_a_vocabulary_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    constraint = StructuredOutputsParams(json_object=True)
    missing = GrammarCompiler(tmp_path / "tokenizer.json", vocab_size=9, eos_token_ids=(1,))
    with pytest.raises(InvalidRequest, match=r"structured_outputs: .*tokenizer\.json"):
        missing.compile(constraint)
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        GrammarCompiler(tmp_path / "tokenizer.json", vocab_size=9, eos_token_ids=()).compile(constraint)
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        compiler_for(tmp_path, "word piece").compile(constraint)
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        compiler_for(tmp_path, "metaspace").compile(constraint)


def test_compiled_constraints_are_kept(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path)
    one = StructuredOutputsParams(json={"type": "object"})
    assert not compiler.has(one)
    compiler.compile(one)
    assert compiler.has(StructuredOutputsParams(json='{"type":"object"}'))
    for number in range(300):
        compiler.compile(StructuredOutputsParams(regex=f"a{{{number + 1}}}"))
    assert not compiler.has(one), "the cache is bounded"
