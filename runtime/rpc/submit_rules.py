"""What belongs together in a submit, whatever carries it: what its samples have, and where its KV goes or comes from.

Pure: both transports' clients ask before they send, and the codec of what it has read. Ranges of single numbers are the
codec's business, and what a model can do the replica's.
"""

from __future__ import annotations

import re

from ...sdk.errors import InvalidRequest
from ..messages import EngineRequest
from .session import Submit

MAX_PROMPT_TOKENS = 2 << 20
MAX_REPLICA_CHARS = 256
MAX_ADDRESS_CHARS = 256
MAX_TICKET_CHARS = 64
_TICKET = re.compile(rf"[0-9A-Za-z_-]{{1,{MAX_TICKET_CHARS}}}")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


def check_submit(submit: Submit) -> None:
    """Make sure of what belongs together in a submit, wherever its parts are from. Raises: InvalidRequest"""
    _check_generated(submit.request)
    _check_split(submit)


def _check_generated(request: EngineRequest) -> None:
    generated, n = request.generated, request.params.n
    if not generated:
        return
    if len(generated) != n:
        raise InvalidRequest("generated", f"needs an entry for each of {n} samples, got {len(generated)}")
    lengths = [len(tokens) for tokens in generated if tokens is not None]
    if not lengths:
        raise InvalidRequest("generated", "leaves no sample to go on with")
    if max(lengths) >= request.max_tokens:
        raise InvalidRequest("generated", f"{max(lengths)} tokens leave none of max_tokens {request.max_tokens}")
    if sum(lengths) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("generated", f"has more than {MAX_PROMPT_TOKENS} tokens")


def _check_split(submit: Submit) -> None:
    """Make sure that a request is sent on, or waits for what is sent, or neither, and with what it needs for it."""
    send_to = submit.send_to
    if send_to is not None:
        if submit.ticket:
            raise InvalidRequest("ticket", "must not be set beside send_to: a request is sent on or waits, not both")
        for field, text, limit in (
            ("send_to.replica", send_to.replica, MAX_REPLICA_CHARS),
            ("send_to.address", send_to.address, MAX_ADDRESS_CHARS),
        ):
            if not 1 <= len(text) <= limit:
                raise InvalidRequest(field, f"must have 1 to {limit} characters, got {len(text)}")
        _check_ticket("send_to.ticket", send_to.ticket)
    if submit.ticket:
        _check_ticket("ticket", submit.ticket)
    if (send_to is not None or submit.ticket) and submit.request.params.n != 1:
        raise InvalidRequest("n", f"must be 1 of a request that is split, got {submit.request.params.n}")
    if submit.trace_id and not _TRACE_ID.fullmatch(submit.trace_id):
        raise InvalidRequest("trace_id", f"must be 32 hex digits in lower case, got {submit.trace_id[:64]!r}")


def _check_ticket(field: str, ticket: str) -> None:
    if not _TICKET.fullmatch(ticket):
        problem = f"must have 1 to {MAX_TICKET_CHARS} letters, digits, - and _, got {ticket[:MAX_TICKET_CHARS]!r}"
        raise InvalidRequest(field, problem)
