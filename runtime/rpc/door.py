"""Where calls over TCP are let in or not: ``call_proof`` carried in gRPC's metadata, on both sides.

Health is open to everybody, since a probe has no secret and learns nothing; everything else that a server with a secret
offers goes through its door. Servers on a socket's path have none: the file's owner is who may call.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...comm.handshake import SECRET_VARIABLE
from ..clock import monotonic_clock
from .call_proof import Challenger, Proof
from .errors import SecretRefused, status_of
from .generated import secret_pb2 as pb
from .wire import CHALLENGE, SECRET_SERVICE

PROOF_KEY = "slipstream-proof-bin"


class Door:
    """A server's: lets in callers that know the secret; without one, everybody."""

    def __init__(self, secret: bytes | None) -> None:
        self._challenger = None if secret is None else Challenger(secret, clock=monotonic_clock)

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in."""
        return self._challenger is None

    def methods(self) -> tuple[Any, ...]:
        """Return the handlers that a server needs beside its own."""
        if self._challenger is None:
            return ()
        handler: Any = grpc.unary_unary_rpc_method_handler(self._challenge)
        return (grpc.method_handlers_generic_handler(SECRET_SERVICE, {CHALLENGE: handler}),)

    async def admit(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        """Let a call in, or end it as UNAUTHENTICATED. The first thing that a method does."""
        metadata: tuple[tuple[str, bytes], ...] = ()
        if self._challenger is not None:
            try:
                metadata = ((PROOF_KEY, self._challenger.check(method, _found(context.invocation_metadata()))),)
            except SecretRefused as error:
                await context.abort(status_of(error), str(error))
        await context.send_initial_metadata(metadata)

    async def _challenge(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        del request, context
        assert self._challenger is not None, "a door without a secret has no challenges"
        return pb.ChallengeReply(challenge=self._challenger.challenge()).SerializeToString()


class Visit:
    """A caller's: what its next calls over one channel take with them, each method once."""

    def __init__(self, secret: bytes | None, challenge: bytes) -> None:
        self._secret = secret
        self._challenge = challenge
        self._proofs: dict[str, Proof] = {}

    def metadata(self, method: str) -> tuple[tuple[str, bytes], ...]:
        """Return what goes with a call."""
        if self._secret is None:
            return ()
        proof = self._proofs[method] = Proof(self._secret, self._challenge, method)
        return ((PROOF_KEY, proof.sent),)

    async def check(self, call: Any, method: str) -> None:
        """Wait until a call was let in, by a server that knows the secret too; call it before anything is sent.

        Raises: SecretRefused; grpc.aio.AioRpcError when the call has ended otherwise
        """
        if (proof := self._proofs.get(method)) is None:
            return
        metadata = await call.initial_metadata()
        answer = _found(metadata)
        # A server that lets in answers; one that does not ends the call, and says why.
        if answer is None and await call.code() is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                await call.code(), metadata, await call.trailing_metadata(), details=await call.details()
            )
        proof.check(answer)


async def visit(channel: grpc.aio.Channel, secret: bytes | None, *, wait_for_ready: bool) -> Visit:
    """Ask for a challenge, if there is a secret to answer it with.

    Raises: SecretRefused; grpc.aio.AioRpcError
    """
    if secret is None:
        return Visit(None, b"")
    ask: Any = channel.unary_unary(f"/{SECRET_SERVICE}/{CHALLENGE}")
    try:
        reply = pb.ChallengeReply.FromString(await ask(b"", wait_for_ready=wait_for_ready))
    except DecodeError as error:
        raise SecretRefused("who answers at the server's address is no server of ours") from error
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise SecretRefused(f"the server asks for no secret: set {SECRET_VARIABLE} there too") from error
        raise
    return Visit(secret, reply.challenge)


def _found(metadata: Any) -> bytes | None:
    """Return the proof in a call's metadata; one that is not alone is none."""
    values = [value for key, value in metadata or () if key == PROOF_KEY]
    return values[0] if len(values) == 1 and isinstance(values[0], bytes) else None
