"""A request's body: read within its bounds, and parsed.

Owns the bounds on bytes and time. What the body means is the business of ``requests``.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import orjson
from starlette.requests import Request

from .errors import HttpRefusal


async def read_json_object(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """Read and parse a body that must be a JSON object.

    Raises: HttpRefusal (400, 408, 413, 415); ClientDisconnect
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        got = f"got {content_type[:100]!r}" if content_type else "got none"
        message = f"the body must be JSON with the header 'content-type: application/json', {got}"
        raise HttpRefusal(415, message, code="unsupported_media_type", closes=True)
    try:
        async with asyncio.timeout(timeout_s):
            content = await _read(request, max_bytes)
    except TimeoutError as error:
        message = f"the body did not come within {timeout_s:g} s"
        raise HttpRefusal(408, message, code="body_timeout", closes=True) from error
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise HttpRefusal(400, f"the body is not valid JSON: {error.msg}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise HttpRefusal(400, "the body must be a JSON object", code="invalid_json")
    return value


def json_digest(path: str, body: dict[str, Any]) -> bytes:
    """Return a digest of what is asked of a path, the same for objects whose members are in another order."""
    content = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(path.encode() + b"\0" + content).digest()


async def _read(request: Request, max_bytes: int) -> bytearray:
    message = f"the body is larger than this server takes ({max_bytes} bytes)"
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise HttpRefusal(413, message, code="body_too_large", closes=True)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise HttpRefusal(413, message, code="body_too_large", closes=True)
    return content
