"""POST /tokenize and /detokenize: the model's tokenizer, for clients that count."""

from __future__ import annotations

from ...sdk.errors import InvalidRequest
from .answer import Call, Whole
from .prompts import check_model, prepare_chat, tokenize_text
from .requests import DetokenizeBody, TokenizeBody
from .responses import Detokenized, Tokenized


async def tokenize(call: Call) -> Whole:
    """Return the tokens of a text or of a chat."""
    body = TokenizeBody.parse(call.body)
    check_model(body.model, call.gateway.settings)
    model = call.gateway.replicas.current()
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", "give either prompt or messages")
    if body.prompt is not None:
        token_ids = await tokenize_text(
            model.tokenizer, body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    else:
        prepared = await prepare_chat(
            model,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            template_variables=body.chat_template_kwargs or {},
        )
        token_ids = prepared.token_ids.tolist()
    answer: Tokenized = {
        "count": len(token_ids),
        "max_model_len": model.facts.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
    return Whole(body=answer)


async def detokenize(call: Call) -> Whole:
    """Return the text of tokens."""
    body = DetokenizeBody.parse(call.body)
    check_model(body.model, call.gateway.settings)
    model = call.gateway.replicas.current()
    if not isinstance(body.tokens, list):
        raise InvalidRequest("tokens", "must be a list of token ids")
    for place, token_id in enumerate(body.tokens):
        if type(token_id) is not int or not 0 <= token_id < model.facts.vocab_size:
            problem = f"entry {place} must be a token id below {model.facts.vocab_size}"
            raise InvalidRequest("tokens", problem)
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    answer: Detokenized = {"prompt": text}
    return Whole(body=answer)
