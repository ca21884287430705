"""Server-sent events out of bytes: pure, so that how the network cuts a stream can be tested without one."""

from __future__ import annotations

LAST_EVENT = b"[DONE]"

MAX_LINE_BYTES = 4 << 20


class EventDecoder:
    """Takes a stream's bytes as they come and gives the data of each event that is complete.

    Only ``data`` lines count, one an event, as these APIs send them. Lines end with a line feed and nothing else: text
    may hold the other characters that Python takes for line ends.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of the events that ``chunk`` completes.

        Raises: ValueError when a line is longer than any event is
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
