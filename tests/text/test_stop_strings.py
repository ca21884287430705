"""Stop strings in pieces, against a search through the whole text."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.runtime.text.stop_strings import StopStringMatcher


def plain_search(text: str, stops: list[str], unsearchable: int, include: bool) -> tuple[str, str | None]:
    """Text up to the first stop string that ends beyond the unsearchable part, and that string."""
    for end in range(unsearchable + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def could_continue(text: str, stops: list[str]) -> int:
    """How many characters at the end could belong to a stop string that is not complete."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if size <= len(text) and text.endswith(stop[:size])),
        default=0,
    )


SMALL = st.text("ab", max_size=8)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(SMALL, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    silent=st.integers(0, 4),
    include=st.booleans(),
)
@example(pieces=["aab", "cd"], stops=["abcd", "bc"], silent=0, include=False)
@example(pieces=["ab", "ab"], stops=["ab"], silent=1, include=True)
def test_matcher_equals_a_plain_search(pieces: list[str], stops: list[str], silent: int, include: bool) -> None:
    matcher = StopStringMatcher(tuple(stops), include_in_output=include)
    shown = fed = ""
    for index, piece in enumerate(pieces):
        shown += matcher.feed(piece, searchable=index >= silent)
        fed += piece
        expected, stop = plain_search(fed, stops, len("".join(pieces[:silent])), include)
        assert matcher.matched == stop
        if stop is not None:
            assert shown == expected
        else:
            # Exactly what could still become a stop string is held back, no more and no less.
            assert shown == fed[: len(fed) - could_continue(fed, stops)]
    if matcher.matched is None:
        assert shown + matcher.finish() == fed
    else:
        assert matcher.feed("more") == ""
        assert matcher.finish() == ""


def test_a_stop_string_over_three_pieces_never_leaks() -> None:
    matcher = StopStringMatcher(("\n\nHuman:",))
    assert [matcher.feed(piece) for piece in ("Sure.\n", "\nHu", "man", ": hi")] == ["Sure.", "", "", ""]
    assert matcher.matched == "\n\nHuman:"
    assert matcher.finish() == ""


def test_held_text_comes_when_it_turns_out_harmless() -> None:
    matcher = StopStringMatcher(("STOP",))
    assert [matcher.feed(piece) for piece in ("go ST", "O", "RE")] == ["go ", "", "STORE"]
    assert matcher.feed("ST") == ""
    assert matcher.finish() == "ST"


def test_nothing_is_held_without_a_reason() -> None:
    matcher = StopStringMatcher(("###", "END"))
    assert matcher.feed("plain text") == "plain text"


def test_before_min_tokens_a_stop_string_only_begins() -> None:
    matcher = StopStringMatcher(("END",))
    assert matcher.feed("END E", searchable=False) == "END "
    assert matcher.feed("N", searchable=False) == ""
    assert matcher.feed("D.") == ""
    assert matcher.matched == "END"


def test_the_string_that_ends_first_wins_however_the_text_is_cut() -> None:
    for pieces in (["abcd"], ["ab", "cd"], ["a", "b", "c", "d"]):
        matcher = StopStringMatcher(("abcd", "bc"))
        assert "".join(matcher.feed(piece) for piece in pieces) == "a"
        assert matcher.matched == "bc"
