"""Waiting for one's turn: the shell around ``admission``."""

from __future__ import annotations

import asyncio

from .admission import Ticket
from .errors import BusyRefusal
from .gateway import Gateway
from .record import RequestRecord


async def take_turn(gateway: Gateway, record: RequestRecord) -> Ticket:
    """Wait until a request is let in, which ``end_turn`` ends.

    Raises: Draining; BusyRefusal when there is no room in time (both retryable)
    """
    admission = gateway.admission
    turned = asyncio.Event()
    ticket = admission.ask(caller=record.caller, now_s=gateway.clock(), wake=turned.set)
    if not ticket.waits:
        return ticket
    let_in = False
    try:
        async with asyncio.timeout(gateway.settings.limits.turn_timeout_s):
            await turned.wait()
        admission.check(ticket)
        let_in = True
    except TimeoutError as error:
        problem = f"no turn came within {gateway.settings.limits.turn_timeout_s:g} s: try again later"
        raise BusyRefusal(problem, retry_after_s=gateway.settings.limits.turn_timeout_s) from error
    finally:
        if not let_in:
            admission.leave(ticket, now_s=gateway.clock())
    return ticket


def end_turn(gateway: Gateway, record: RequestRecord, ticket: Ticket) -> None:
    """Give back what a request held, and tell what it has cost."""
    gateway.admission.leave(ticket, now_s=gateway.clock(), tokens=record.prompt_tokens + record.output_tokens)
