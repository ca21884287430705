"""What each token of a byte-level vocabulary is in bytes.

Owns GPT-2's table of characters that stand for bytes. Tokens are looked up once and remembered: a server's streams
meet the same tokens over and over.
"""

from __future__ import annotations

from collections.abc import Callable


def _printable_bytes() -> dict[str, int]:
    """Return the characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()


class BytePieces(dict[int, bytes]):
    """Token id → its bytes, found when it is first asked for; no bytes for a token that has no text.

    ``text_token`` returns a token as the vocabulary writes it, None when it has no text. As large as the vocabulary at
    most, but for ids outside of it, which are not kept.
    """

    def __init__(self, text_token: Callable[[int], str | None]) -> None:
        super().__init__()
        self._text_token = text_token

    def __missing__(self, token_id: int) -> bytes:
        token = self._text_token(token_id)
        if token is None:
            return b""
        try:
            piece = bytes([_BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # an added token in plain text, taken as it is
            piece = token.encode()
        self[token_id] = piece
        return piece
