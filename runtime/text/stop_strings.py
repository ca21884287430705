"""Find stop strings in text that comes in pieces.

Owns what may be shown while a stop string could still be forming. It must not know tokens or requests: it stands
between the detokenizer and the stream.
"""

from __future__ import annotations


class StopStringMatcher:
    """Passes text through up to the first stop string.

    First means: the one whose last character comes first; of several that end there, the longest. So the answer does
    not depend on the pieces in which the text comes. Text that could still turn out to belong to a stop string is held
    back, and only that. ``matched`` is the stop string found, None before; after it all text is swallowed.
    """

    def __init__(self, stop_strings: tuple[str, ...], *, include_in_output: bool = False) -> None:
        self._stop_strings = stop_strings
        self._include_in_output = include_in_output
        self._held = ""
        self._held_unsearchable = 0
        self.matched: str | None = None

    def feed(self, text: str, *, searchable: bool = True) -> str:
        """Take the next piece and return what may be shown.

        Stop strings do not act before ``min_tokens``: the text of those tokens is given as not ``searchable``. It may
        hold the beginning of a stop string, but not its last character.
        """
        if self.matched is not None or not text:
            return ""
        unsearchable = self._held_unsearchable if searchable else len(self._held) + len(text)
        window = self._held + text
        found = self._first_match(window, unsearchable) if searchable else None
        if found is not None:
            self.matched, end = found
            self._held = ""
            return window[: end if self._include_in_output else end - len(self.matched)]
        shown = len(window) - self._unfinished(window)
        self._held = window[shown:]
        self._held_unsearchable = max(0, unsearchable - shown)
        return window[:shown]

    def finish(self) -> str:
        """Return what was held back for text that will not come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, unsearchable: int) -> tuple[str, int] | None:
        """Return the first stop string that ends beyond the unsearchable part, and where it ends."""
        first: tuple[int, int, str] | None = None
        for stop in self._stop_strings:
            start = window.find(stop, max(0, unsearchable - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), -len(stop), stop)
                first = found if first is None else min(first, found)
        return None if first is None else (first[2], first[0])

    def _unfinished(self, window: str) -> int:
        """Return how many characters at the end are the beginning of a stop string; the most, when several are."""
        longest = 0
        for stop in self._stop_strings:
            length = min(len(stop) - 1, len(window))
            # Try only beginnings that end in the window's last character, found at C speed.
            while (length := stop.rfind(window[-1], 0, length) + 1) > longest:
                if window.endswith(stop[:length]):
                    longest = length
                length -= 1
        return longest
