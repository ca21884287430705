"""Compiles the constraints of structured outputs against a model's vocabulary, and follows them token by token.

Owns llguidance, which does both: a grammar is compiled in milliseconds because most of the automaton is made while it
is walked, and limits on states, items and work per step keep a hostile one from holding anybody up; it then fails by
name. A state is made from the grammar and moves with the tokens it is shown: nothing of it has to be kept or sent, a
request that was interrupted shows its tokens again.

Source: Earley parsing with a lexer of regular-expression derivatives (github.com/guidance-ai/llguidance)
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from ...sdk.errors import InvalidRequest
from ...sdk.structured import StructuredOutputsParams

_FIELD = "structured_outputs"
_CACHED_GRAMMARS = 256
_MAX_PROBLEM_CHARS = 400
# A lexer's state takes 1 to 2 KiB; a schema of 64 KiB has some 50,000 symbols.
_LIMITS: Final = LLParserLimits(max_lexer_states=20_000, max_grammar_size=100_000, verbose_errors=False)
# Bounded, because a weak model can go on with white space until its tokens are used up.
_JSON_SPACE: Final = r"[\x20\x0A\x0D\x09]{1,20}"


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.consumed = 0

    def advance(self, token_ids: NDArray[np.int32]) -> None:
        """Take in the sequence's next tokens. A token that the grammar does not allow makes it ``failed``."""
        self.consumed += len(token_ids)
        # What is drawn after the end (a step was under way already) is dropped by the engine, and says nothing here.
        if not self.ended:
            self.matcher.consume_tokens(token_ids.tolist())

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self.matcher.is_stopped()

    @property
    def failed(self) -> bool:
        """Whether no token can be judged any more: the grammar became too complex, or nothing can follow."""
        return self.matcher.is_error()


class GrammarCompiler:
    """Compiles constraints for one vocabulary and keeps the latest. Safe to call from several threads.

    ``tokenizer_file``: a Hugging Face ``tokenizer.json``, read when the first constraint comes.
    """

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._grammars: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that may follow a complete text."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Tokens that masks are made for."""
        return self._vocab_size

    def has(self, constraint: StructuredOutputsParams) -> bool:
        """Return whether a constraint is compiled already."""
        with self._lock:
            return constraint in self._grammars

    def compile(self, constraint: StructuredOutputsParams) -> None:
        """Compile a constraint, or find that it has been. Takes milliseconds, for the largest allowed about a second.

        Raises: InvalidRequest naming ``structured_outputs``
        """
        self._compiled(constraint)

    def start(self, constraint: StructuredOutputsParams) -> GrammarState:
        """Return the state before the first token.

        Raises: InvalidRequest, as ``compile``
        """
        return GrammarState(self._compiled(constraint).deep_copy())

    def _compiled(self, constraint: StructuredOutputsParams) -> LLMatcher:
        with self._lock:
            if (found := self._grammars.get(constraint)) is not None:
                self._grammars.move_to_end(constraint)
                return found
        matcher = LLMatcher(self._vocabulary(), _source(constraint), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # The first mask is the dearest, and it finds out what can match nothing at all.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"{_FIELD}.{constraint.kind}", _problem(matcher.get_error()))
        with self._lock:
            self._grammars[constraint] = matcher
            while len(self._grammars) > _CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_vocabulary()
            return self._tokenizer

    def _read_vocabulary(self) -> LLTokenizer:
        if not self._eos_token_ids:
            raise InvalidRequest(_FIELD, "this model names no end-of-sequence token, so no text can be complete")
        try:
            text = self._tokenizer_file.read_text(encoding="utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids))
        except (OSError, ValueError) as error:
            problem = f"not with this model, whose tokenizer.json cannot be used for it: {_problem(str(error))}"
            raise InvalidRequest(_FIELD, problem) from None


class MaskFiller:
    """Computes which tokens may come next, for several states at once, on threads that do not hold the interpreter."""

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads)

    def fill(self, states: list[tuple[GrammarState, int]], masks: NDArray[np.int32]) -> None:
        """Write the mask of each state into its row of ``masks``. A state may be ``failed`` afterwards.

        Shapes: masks [rows, (vocabulary + 31) // 32] int32, contiguous; bit ``i % 32`` of word ``i // 32`` is token i
        """
        self._executor.unsafe_compute_mask_ptr(
            [(state.matcher, row) for state, row in states], masks.ctypes.data, masks.shape[1] * 4, masks.shape[0]
        )


def _source(constraint: StructuredOutputsParams) -> str:
    """Return a constraint in llguidance's own notation."""
    spaced = not constraint.disable_any_whitespace
    match constraint.kind:
        case "json":
            assert isinstance(constraint.json, str), "text after checking"
            return _json_source(constraint.json, spaced=spaced)
        case "json_object":
            return _json_source('{"type":"object"}', spaced=spaced)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.regex or "")
        case "choice":
            strings = " | ".join(map(json.dumps, constraint.choice or ()))
            return LLMatcher.grammar_from_lark(f"start: {strings}")
        case _:
            return LLMatcher.grammar_from_lark(constraint.grammar or "")


def _json_source(schema: str, *, spaced: bool) -> str:
    try:
        if spaced:
            return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _JSON_SPACE})
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    except ValueError as error:
        raise InvalidRequest(f"{_FIELD}.json", _problem(str(error))) from None


def _problem(text: str) -> str:
    """Return the part of a compiler's complaint that a person can use."""
    text = text.replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        text = "no text can satisfy it"
    return text if len(text) <= _MAX_PROBLEM_CHARS else f"{text[:_MAX_PROBLEM_CHARS]}..."
