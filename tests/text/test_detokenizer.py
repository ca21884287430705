"""Text in pieces is the text of the whole, for every family of tokenizers and whatever tokens come."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.runtime.text.detokenizer import IncrementalDetokenizer
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.tests.text.tiny_tokenizers import FAMILIES, SPECIAL, byte_fallback, byte_level

family = pytest.mark.parametrize("name", FAMILIES)


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]


@family
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_random_tokens_make_the_whole(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = Tokenizer(FAMILIES[name]())
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), pieces


@family
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), skip=st.booleans())
@example(text="  two spaces  and é→ <tool call> <|im_end|> more", skip=True)
@example(text="👩‍👩‍👧‍👦 你好 \u0000\ufffd\ufffd x", skip=False)
def test_pieces_of_text_make_the_whole(name: str, text: str, skip: bool) -> None:
    tokenizer = Tokenizer(FAMILIES[name]())
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), pieces


@settings(max_examples=200, deadline=None)
@given(raw=st.lists(st.integers(0, 255), max_size=30).map(bytes), cut=st.integers(0, 30))
@example(raw=b"\xe0\x80\x80\xed\xa0\x80\xf4\x90\x80\x80\xf0\x9f\x98", cut=0)
@example(raw="€".encode() + b"\xff", cut=0)
def test_invalid_bytes_become_the_same_replacements(raw: bytes, cut: int) -> None:
    tokenizers = Tokenizer(byte_level()), Tokenizer(byte_fallback())
    printable = {byte: character for character, byte in _byte_of_character().items()}
    byte_level_ids = [tokenizers[0].token_to_id(printable[byte]) for byte in raw]
    fallback_ids = [tokenizers[1].token_to_id(f"<0x{byte:02X}>") for byte in raw]
    fallback_ids.insert(min(cut, len(raw)), tokenizers[1].token_to_id("▁"))
    for tokenizer, ids in zip(tokenizers, (byte_level_ids, fallback_ids), strict=True):
        known = [token_id for token_id in ids if token_id is not None]
        assert len(known) == len(ids)
        assert "".join(pieces_of(tokenizer, known)) == tokenizer.decode(known)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table, written the way it was published."""
    visible = list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), 256))
    characters, extra = visible[:], 0
    for byte in range(256):
        if byte not in visible:
            visible.append(byte)
            characters.append(256 + extra)
            extra += 1
    return {chr(character): byte for character, byte in zip(characters, visible, strict=True)}


def test_a_character_comes_whole_and_at_once() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_valid_text_is_complete_before_the_end() -> None:
    tokenizer = Tokenizer(byte_level())
    text = "naïve 😀 café — 你好\n\n  done"
    assert "".join(pieces_of(tokenizer, tokenizer.encode(text))[:-1]) == text


def test_byte_tokens_wait_for_the_end_of_their_run() -> None:
    tokenizer = Tokenizer(byte_fallback())
    ids = [tokenizer.token_to_id(token) or 0 for token in ("T", "<0xE2>", "<0x82>", "<0xAC>", "h")]
    assert pieces_of(tokenizer, ids) == ["T", "", "", "", "€h", ""]
    ids.insert(4, tokenizer.token_to_id("<0xFF>") or 0)
    assert pieces_of(tokenizer, ids) == ["T", "", "", "", "", "\ufffd\ufffd\ufffd\ufffdh", ""]


def test_a_missing_rest_becomes_a_replacement_at_the_end() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("😀")[:2]
    assert pieces_of(tokenizer, ids) == ["", "", "\ufffd"]


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("<|im_start|>fox<|im_end|>")
    assert "".join(pieces_of(tokenizer, ids)) == "fox"
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == "<|im_start|>fox<|im_end|>"
    assert all(tokenizer.is_special(token) for token in SPECIAL)


class _CountingTokenizer(Tokenizer):
    """Notes the longest window that was ever decoded."""

    longest = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:  # type: ignore[override]
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@family
def test_the_cost_of_a_token_does_not_grow(name: str) -> None:
    tokenizer = _CountingTokenizer(FAMILIES[name]())
    long_text = " ".join(["return the lazy fox,"] * 40) + " " * 100 + "x"
    ids = tokenizer.encode(long_text)
    space = tokenizer.token_to_id("▁")
    if space is not None:
        ids += [space] * 200
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join([*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()])
    assert tokenizer.longest <= 8
    assert text == tokenizer.decode(ids)
