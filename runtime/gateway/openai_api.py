"""The routes that OpenAI's clients know, and vLLM's two for tokens. What they do is in the modules of their names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from .answer import Answer, Work
from .chat import chat
from .completions import complete
from .errors import HttpRefusal
from .gateway import Gateway
from .requests import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from .responses import ChatCompletion, Completion, Detokenized, ModelCard, ModelList, Tokenized
from .tokens_api import detokenize, tokenize

_WORK: tuple[tuple[str, Work, type[BaseModel], Any], ...] = (
    ("/v1/completions", complete, CompletionBody, Completion),
    ("/v1/chat/completions", chat, ChatBody, ChatCompletion),
    ("/tokenize", tokenize, TokenizeBody, Tokenized),
    ("/detokenize", detokenize, DetokenizeBody, Detokenized),
)

BODIES: dict[str, type[BaseModel]] = {path: body for path, _, body, _ in _WORK}
"""Path → what a client posts there."""

STREAMED: dict[str, Any] = {path: answer for path, _, body, answer in _WORK if issubclass(body, GenerationBody)}
"""Path → what the events of its streams hold."""


def openai_routes(gateway: Gateway) -> APIRouter:
    """Return the routes of one gateway."""
    router = APIRouter()
    for path, work, _, answer in _WORK:
        _add(router, gateway, path, work, answer)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """List the names under which the model is served."""
        return {"object": "list", "data": [_card(gateway, name) for name in gateway.settings.served_model_names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """Describe one served name."""
        if name not in gateway.settings.served_model_names:
            raise HttpRefusal(
                404, f"the model {name[:200]!r} is not served here", param="model", code="model_not_found"
            )
        return _card(gateway, name)

    return router


def _add(router: APIRouter, gateway: Gateway, path: str, work: Work, answer: Any) -> None:
    async def endpoint() -> Response:
        return Answer(gateway, work)

    router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=work.__name__,
        description=work.__doc__,
        responses={200: {"model": answer}},
        response_model=None,
    )


def _card(gateway: Gateway, name: str) -> ModelCard:
    length = gateway.replicas.current().facts.max_model_len if gateway.replicas.attached else None
    return {
        "id": name,
        "object": "model",
        "created": gateway.started_s,
        "owned_by": "slipstream",
        "max_model_len": length,
    }
