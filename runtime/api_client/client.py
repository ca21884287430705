"""A client for OpenAI's HTTP API: models, requests, streams of events.

Owns addresses, keys and which way a request failed. How long one may take is the caller's business: every call can be
cancelled at any await.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import httpx

from ...sdk.errors import ConfigError
from .errors import ApiError
from .events import LAST_EVENT, EventDecoder
from .metrics_text import figures

_MAX_SHOWN_CHARS = 300


def read_api_key(file: Path) -> str:
    """Return the first key of a file; empty lines and lines that start with # are skipped.

    Raises: ConfigError when there is none
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", f"{file} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not keys[0].isascii():
        raise ConfigError("api_key_file", f"{file} holds no key")
    return keys[0]


class ApiClient:
    """Speaks to one server. ``base_url`` is given with or without its ``/v1``.

    Raises: ConfigError when the address is none
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, max_connections: int = 8) -> None:
        root = base_url.strip().rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise ConfigError("base_url", f"must start with http:// or https://, got {base_url!r}")
        try:
            self._http = httpx.AsyncClient(
                base_url=f"{root}/v1/",
                headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
                limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
                timeout=None,
            )
        except httpx.InvalidURL as error:
            raise ConfigError("base_url", f"{base_url!r}: {error}") from error
        self.url = f"{root}/v1"
        self._metrics_url = f"{root}/metrics"

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Return the names of the models that the server offers. Raises: ApiError."""
        match await self._whole("GET", "models", None):
            case {"data": list(models)}:
                return [model["id"] for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]
        raise ApiError("bad answer", f"{self.url}/models does not list models")

    async def first_model(self) -> str:
        """Return the first model that the server offers. Raises: ApiError."""
        models = await self.models()
        if not models:
            raise ApiError("bad answer", f"{self.url}/models lists no model: name one")
        return models[0]

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its whole answer. Raises: ApiError."""
        return await self._whole("POST", path, body)

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Send a request and yield its events; ends after the last one has been announced.

        Raises: ApiError, also when the stream breaks off
        """
        decoder, ended = EventDecoder(), False
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(response.status_code, await response.aread())
                # httpx declares an iterator; it is a generator, and one that is left in the middle has to be closed.
                async with aclosing(cast(AsyncGenerator[bytes], response.aiter_bytes())) as chunks:
                    async for chunk in chunks:
                        for data in decoder.feed(chunk):
                            if data == LAST_EVENT:
                                ended = True
                            elif not ended:
                                yield _event(data)
        except httpx.HTTPError as error:
            raise _broken(error, self.url) from error
        except ValueError as error:
            raise ApiError("bad answer", str(error)) from error
        # Read to the end even so: only then can the connection serve the next request.
        if not ended:
            raise ApiError("stream broke off", "the stream ended before its last event")

    async def metrics(self) -> dict[str, float]:
        """Return the server's metrics, see ``metrics_text``; {} of one that has none. Raises: ApiError"""
        try:
            response = await self._http.get(self._metrics_url)
        except httpx.HTTPError as error:
            raise _broken(error, self.url) from error
        return figures(response.text) if response.status_code == httpx.codes.OK else {}

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise _broken(error, self.url) from error
        if response.status_code != httpx.codes.OK:
            raise _refusal(response.status_code, response.content)
        return _object(response.content)


def _event(data: bytes) -> dict[str, Any]:
    event = _object(data)
    if event.get("error"):
        raise ApiError("error in stream", _message(event) or _shown(data))
    return event


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ApiError("bad answer", f"not JSON: {_shown(content)}") from error
    if not isinstance(value, dict):
        raise ApiError("bad answer", f"not a JSON object: {_shown(content)}")
    return value


def _refusal(status: int, content: bytes) -> ApiError:
    try:
        message = _message(json.loads(content))
    except ValueError:
        message = None
    return ApiError(f"http {status}", message or _shown(content))


def _message(value: Any) -> str | None:
    """Return the message of an error as OpenAI writes it."""
    match value:
        case {"error": {"message": str(message)}} | {"error": str(message)} | {"message": str(message)}:
            return message[:_MAX_SHOWN_CHARS]
    return None


def _broken(error: httpx.HTTPError, url: str) -> ApiError:
    kind = "no connection" if isinstance(error, httpx.ConnectError) else "connection lost"
    return ApiError(kind, f"{url}: {str(error) or type(error).__name__}")


def _shown(content: bytes) -> str:
    return content[:_MAX_SHOWN_CHARS].decode(errors="replace")
