"""Log-probabilities as OpenAI writes them: one shape for completions, another for chats.

Knows tables of ``Logprob`` and nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from typing_extensions import TypedDict

from ...sdk.results import Logprob

_LOWEST = -9999.0
"""JSON has no minus infinity; OpenAI writes this number."""


class CompletionLogprobs(TypedDict):
    """Of one completion: a list for each column."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TopLogprob(TypedDict):
    """One candidate at a position of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """One position of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of one answer."""

    content: list[ContentLogprob]
    refusal: None


Decode = Callable[[int], str]
"""Returns the text of one token."""

Entry = tuple[int, dict[int, Logprob] | None]
"""A token and the table of its position; None where nothing stands before it."""


def completion_logprobs(entries: Sequence[Entry], *, top: int, offset: int, decode: Decode) -> CompletionLogprobs:
    """Write a completion's log-probabilities; ``offset`` is where the first token's text begins."""
    answer: CompletionLogprobs = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [] if top else None,
        "text_offset": [],
    }
    for token_id, table in entries:
        text = decode(token_id) if table is None else _text(table[token_id])
        answer["tokens"].append(text)
        answer["token_logprobs"].append(None if table is None else _number(table[token_id]))
        if answer["top_logprobs"] is not None:
            answer["top_logprobs"].append(None if table is None else _top_by_text(token_id, table, top))
        answer["text_offset"].append(offset)
        offset += len(text)
    return answer


def chat_logprobs(entries: Sequence[Entry], *, top: int) -> ChatLogprobs:
    """Write a chat's log-probabilities."""
    content: list[ContentLogprob] = []
    for token_id, table in entries:
        assert table is not None
        own = _candidate(table[token_id])
        best = [_candidate(entry) for entry in _ranked(table, top)]
        content.append({**own, "top_logprobs": best})
    return {"content": content, "refusal": None}


def _ranked(table: dict[int, Logprob], top: int) -> list[Logprob]:
    """Return the ``top`` most likely, best first."""
    ranked = [entry for entry in table.values() if entry.rank is not None and entry.rank <= top]
    return sorted(ranked, key=lambda entry: entry.rank or 0)


def _top_by_text(token_id: int, table: dict[int, Logprob], top: int) -> dict[str, float]:
    """Return the most likely tokens by text, and the one that stands there.

    Two tokens may have one text (halves of characters): the likelier stays.
    """
    best: dict[str, float] = {}
    for entry in (*_ranked(table, top), table[token_id]):
        best.setdefault(_text(entry), _number(entry))
    return best


def _candidate(entry: Logprob) -> TopLogprob:
    text = _text(entry)
    return {"token": text, "logprob": _number(entry), "bytes": list(text.encode())}


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _number(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)
