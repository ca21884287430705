"""Turn tokens into text as they come.

Owns the question when text is final: a token may end inside a UTF-8 character, and some decoders change text that
tokens before produced. It must not know requests or stop strings: it stands between the engine's tokens and the
matcher.

What is returned never changes afterwards, and all of it together is ``tokenizer.decode`` of all the tokens. The cost of
a token does not grow with the number of tokens before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class _Strategy(Protocol):
    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """Text of one sequence, token by token."""

    __slots__ = ("feed", "finish")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        byte_level = tokenizer.decoder_kinds == ("ByteLevel",)
        strategy: _Strategy = (_ByteLevelText if byte_level else _WindowText)(tokenizer, skip_special_tokens)
        self.feed: Callable[[int], str] = strategy.feed
        """Takes the next token and returns the text that is final now, often empty."""
        self.finish: Callable[[], str] = strategy.finish
        """Returns what is left when no more tokens come: replacement characters where bytes are missing."""


class _ByteLevelText:
    """Byte-level vocabularies: every token is bytes, and text is the bytes as UTF-8.

    Python's decoder and Rust's ``from_utf8_lossy`` replace the same bytes: one character for each longest beginning of
    a valid sequence.
    Source: Unicode 15, section 3.9, "U+FFFD substitution of maximal subparts"
    """

    __slots__ = ("_begun", "_pieces")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._pieces = tokenizer.byte_pieces(skip_special_tokens)
        # Bytes of a character whose others have not come.
        self._begun = b""

    def feed(self, token_id: int) -> str:
        text, used = codecs.utf_8_decode(data := self._begun + self._pieces[token_id], "replace", False)
        self._begun = data[used:]
        return text

    def finish(self) -> str:
        begun, self._begun = self._begun, b""
        return begun.decode(errors="replace")


class _WindowText:
    """All other decoders: the text of new tokens is what they add to that of the tokens just before them.

    The context is there because decoders treat the first token of all differently (a leading space is stripped); it is
    as short as it can be while its own text is not empty. Byte tokens (``<0x41>``) are held until another token ends
    their run: were the run no valid UTF-8, all of its bytes would become replacement characters, good ones too.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._has_byte_tokens = "ByteFallback" in tokenizer.decoder_kinds
        self._may_split_characters = "ByteLevel" in tokenizer.decoder_kinds
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        # tokenizers drops these before it decodes, so to the decoder they never were.
        token = self._tokenizer.id_to_token(token_id)
        if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token)):
            return ""
        self._pending.append(token_id)
        if self._has_byte_tokens and _is_byte_token(token):
            return ""
        text = self._decode(self._context + self._pending)
        if self._may_split_characters and text.endswith(_REPLACEMENT):
            return ""
        if not text.startswith(self._context_text) or len(text) == len(self._context_text):
            return ""
        added = text[len(self._context_text) :]
        self._advance(text)
        return added

    def finish(self) -> str:
        text = self._decode(self._context + self._pending)
        added = text[len(self._context_text) :]
        self._context, self._context_text, self._pending = [], "", []
        return added

    def _advance(self, text: str) -> None:
        window = self._context + self._pending
        # A single space token decodes to nothing when it stands first: then keep what is before it, one token less
        # each time, so that a run of them does not pile up.
        for context in (self._pending, window[1:]):
            if context_text := self._decode(context):
                self._context, self._context_text, self._pending = context, context_text, []
                return
        self._context, self._context_text, self._pending = window, text, []

    def _decode(self, token_ids: list[int]) -> str:
        # Special tokens that are to be skipped never get here.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
