"""The public gRPC service of a gateway: the same answers, keys, limits and errors as over HTTP."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from slipstream.runtime.gateway.inference import GatewayInference
from slipstream.runtime.gateway.settings import RequestLimits
from slipstream.runtime.rpc.generated import inference_pb2 as pb
from slipstream.runtime.rpc.inference_server import InferenceServer
from slipstream.tests.gateway.harness import Setup, asynchronous, serving, until

SERVICE = "/slipstream.v1.Inference"
PROMPT = "def add(a, b): return"


@asynccontextmanager
async def public(**settings: Any) -> AsyncIterator[tuple[Setup, grpc.aio.Channel]]:
    async with serving(**settings) as setup:
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            path = str(Path(folder) / "public.sock")
            server = InferenceServer(GatewayInference(setup.gateway), path, max_requests=64, write_timeout_s=5.0)
            await server.start()
            try:
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    yield setup, channel
            finally:
                await server.stop(grace_s=0.0)


def ask(text: str | list[int] = PROMPT, **changes: Any) -> pb.GenerateRequest:
    params = {name: changes.pop(name) for name in list(changes) if name in pb.GenerateParams.DESCRIPTOR.fields_by_name}
    prompt: dict[str, Any] = {"text": text} if isinstance(text, str) else {"token_ids": pb.TokenIds(ids=text)}
    return pb.GenerateRequest(**prompt, params=pb.GenerateParams(**params), **changes)


def call(channel: grpc.aio.Channel, request: pb.GenerateRequest | bytes, **options: Any) -> Any:
    generate: Any = channel.unary_stream(f"{SERVICE}/Generate")
    return generate(request if isinstance(request, bytes) else request.SerializeToString(), **options)


async def replies(channel: grpc.aio.Channel, request: pb.GenerateRequest, **options: Any) -> list[pb.GenerateReply]:
    return [pb.GenerateReply.FromString(data) async for data in call(channel, request, **options)]


def text_of(found: list[pb.GenerateReply], sample: int = 0) -> str:
    return "".join(piece.text for reply in found for piece in reply.pieces if piece.sample == sample)


async def refusal(running: Any) -> tuple[str, str, str]:
    """Return status, field and text that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in running:
            pass
    error = caught.value
    trailing = dict(error.trailing_metadata() or ())
    return error.code().name, str(trailing.get("slipstream-field", "")), str(error.details())


# ------------------------------------------------------------------ one request


@asynchronous
async def test_an_answer_is_what_http_answers() -> None:
    async with public() as (setup, channel):
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": ["zz"], "n": 2}
        over_http = (await setup.client.post("/v1/completions", json=body)).json()
        found = await replies(channel, ask(max_tokens=12, temperature=0, stop=["zz"], n=2))
        for choice in over_http["choices"]:
            assert text_of(found, choice["index"]) == choice["text"]
        ends = {piece.sample: piece.finish_reason for reply in found for piece in reply.pieces if piece.finish_reason}
        assert ends == {0: "length", 1: "length"}
        usage = over_http["usage"]
        assert [reply.answer_id != "" for reply in found] == [True, *[False] * (len(found) - 1)]
        assert not any(reply.HasField("usage") for reply in found[:-1])
        last = found[-1].usage
        assert (last.prompt_tokens, last.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert not any(piece.token_ids for reply in found for piece in reply.pieces)


@asynchronous
async def test_token_prompts_token_ids_and_logprobs() -> None:
    async with public() as (setup, channel):
        found = await replies(channel, ask([5, 6, 7], max_tokens=4, logprobs=2, return_token_ids=True))
        tokens = [token for reply in found for piece in reply.pieces for token in piece.token_ids]
        assert tokens == [5, 6, 7, 5]
        scores = [position for reply in found for piece in reply.pieces for position in piece.logprobs]
        assert [position.tokens[0].token_id for position in scores] == tokens
        assert all(2 <= len(position.tokens) <= 3 for position in scores)
        assert setup.engine.requests[0].prompt_token_ids.tolist() == [5, 6, 7]


@asynchronous
async def test_parameters_reach_the_engine_as_they_are() -> None:
    async with public() as (setup, channel):
        given: dict[str, Any] = {
            "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": 0.5,
            "frequency_penalty": -0.5, "repetition_penalty": 1.5, "min_tokens": 1, "max_tokens": 3,
        }  # fmt: skip
        request = ask(**given, seed=-3, stop_token_ids=[9], logit_bias={3: -1.5}, priority=4, cache_salt="mine")
        await replies(channel, request)
        (seen,) = setup.engine.requests
        assert {name: getattr(seen.params, name) for name in given} == given
        assert seen.params.stop_ids == (9,) and dict(seen.params.logit_bias) == {3: -1.5}
        assert seen.seed == 2**64 - 3 and (seen.priority, seen.cache_salt) == (4, "mine")
        await replies(channel, ask(structured_outputs=pb.AnswerFormat(json='{"type": "object"}')))
        constraint = setup.engine.requests[-1].params.structured_outputs
        assert constraint is not None and constraint.kind == "json"


@pytest.mark.parametrize(
    ("status", "field", "request_"),
    [
        ("INVALID_ARGUMENT", "message", b"\xff\xff"),
        ("INVALID_ARGUMENT", "prompt", pb.GenerateRequest()),
        ("INVALID_ARGUMENT", "prompt", ask([])),
        ("INVALID_ARGUMENT", "prompt", ask([-1])),
        ("INVALID_ARGUMENT", "prompt", ask("x" * 100_000)),
        ("INVALID_ARGUMENT", "temperature", ask(temperature=-1)),
        ("INVALID_ARGUMENT", "temperature", ask(temperature=float("nan"))),
        ("INVALID_ARGUMENT", "n", ask(n=0)),
        ("INVALID_ARGUMENT", "max_tokens", ask(max_tokens=0)),
        ("INVALID_ARGUMENT", "stop", ask(stop=65 * ["a"])),
        ("INVALID_ARGUMENT", "stop_token_ids", ask(stop_token_ids=129 * [1])),
        ("INVALID_ARGUMENT", "logit_bias", ask(logit_bias=dict.fromkeys(range(1025), 0.0))),
        ("INVALID_ARGUMENT", "structured_outputs", ask(structured_outputs=pb.AnswerFormat())),
        ("INVALID_ARGUMENT", "structured_outputs.json", ask(structured_outputs=pb.AnswerFormat(json="{"))),
        ("INVALID_ARGUMENT", "idempotency_key", ask(idempotency_key=300 * "x")),
        ("NOT_FOUND", "model", ask(model="another")),
    ],
)
def test_what_is_wrong_is_named(status: str, field: str, request_: Any) -> None:
    @asynchronous
    async def test() -> None:
        async with public() as (setup, channel):
            assert (await refusal(call(channel, request_)))[:2] == (status, field)
            assert text_of(await replies(channel, ask(max_tokens=2))), "the service goes on"
            assert setup.gateway.admission.in_flight == 0

    test()


@asynchronous
async def test_keys_are_asked_for_as_over_http() -> None:
    async with public(api_keys=("a-good-key",)) as (_, channel):
        good = (("authorization", "Bearer a-good-key"),)
        list_models: Any = channel.unary_unary(f"{SERVICE}/ListModels")
        session: Any = channel.stream_stream(f"{SERVICE}/Session")
        for metadata in ((), (("authorization", "Bearer a-bad-key"),)):
            assert (await refusal(call(channel, ask(), metadata=metadata)))[0] == "UNAUTHENTICATED"
            assert (await refusal(session(metadata=metadata)))[0] == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError, match="key"):
                await list_models(b"", metadata=metadata)
        assert text_of(await replies(channel, ask(max_tokens=2), metadata=good))
        models = pb.ListModelsReply.FromString(await list_models(b"", metadata=good)).models
        assert [(model.name, model.max_model_len) for model in models] == [("tiny", 1024), ("alias", 1024)]


@asynchronous
async def test_the_bound_on_requests_is_shared_with_http() -> None:
    limits = RequestLimits(max_concurrent_requests=1)
    async with public(limits=limits) as (setup, channel):
        setup.engine.hold.clear()
        running = asyncio.ensure_future(setup.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}))
        await until(lambda: bool(setup.engine.live))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies(channel, ask())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata() or ())["retry-after"]) >= 1
        setup.engine.hold.set()
        assert (await running).status_code == 200
        assert text_of(await replies(channel, ask(max_tokens=2)))


@asynchronous
async def test_a_request_that_is_sent_again_under_its_key_gets_the_same_answer() -> None:
    async with public() as (setup, channel):
        keyed = ask(max_tokens=5, logprobs=1, return_token_ids=True, stop=["zz"], idempotency_key="once")
        first = await replies(channel, keyed)
        again = await replies(channel, keyed)
        assert again == first and len(setup.engine.requests) == 1
        stream = Stream(channel)
        await stream.ask(1, keyed)
        while not stream.ends:
            await stream.read()
        assert stream.texts[1, 0] == text_of(first) and len(setup.engine.requests) == 1
        other = ask(max_tokens=6, idempotency_key="once")
        assert (await refusal(call(channel, other)))[0] == "FAILED_PRECONDITION"
        setup.engine.hold.clear()
        running = call(channel, ask(max_tokens=2, idempotency_key="held"))
        await until(lambda: bool(setup.engine.live))
        assert (await refusal(call(channel, ask(max_tokens=2, idempotency_key="held"))))[0] == "ABORTED"
        running.cancel()
        await until(lambda: not setup.engine.live)
        setup.engine.hold.set()
        assert text_of(await replies(channel, ask(max_tokens=2, idempotency_key="held"))), "nothing was kept"
        stream.call.cancel()


@asynchronous
async def test_a_calls_deadline_is_its_requests_and_leaving_ends_it() -> None:
    async with public() as (setup, channel):
        setup.engine.hold.clear()
        assert (await refusal(call(channel, ask(), timeout=0.2)))[0] == "DEADLINE_EXCEEDED"
        await until(lambda: len(setup.engine.aborted) == 1 and not setup.gateway.admission.in_flight)
        leaving = call(channel, ask())
        await until(lambda: bool(setup.engine.live))
        leaving.cancel()
        await until(lambda: len(setup.engine.aborted) == 2 and not setup.gateway.admission.in_flight)


@asynchronous
async def test_a_lost_replica_is_unavailable_and_says_so() -> None:
    async with public() as (setup, channel):
        setup.replica.detach()
        status, _, text = await refusal(call(channel, ask()))
        assert status == "UNAVAILABLE" and text


@asynchronous
async def test_health_is_open() -> None:
    async with public(api_keys=("a-good-key",)) as (_, channel):
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        reply = health_pb2.HealthCheckResponse.FromString(await check(b""))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


# ------------------------------------------------------------------ many on one stream


class Stream:
    """A caller's end of a session, which puts the answers together."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        session: Any = channel.stream_stream(f"{SERVICE}/Session")
        self.call = session()
        self.texts: dict[tuple[int, int], str] = {}
        self.ends: dict[int, str] = {}
        self.failures: dict[int, pb.SessionFailure] = {}
        self.text_alone = 0

    async def ask(self, key: int, request: pb.GenerateRequest, timeout_s: float = 0.0) -> None:
        ask = pb.SessionAsk(key=key, request=request, timeout_s=timeout_s)
        await self.call.write(pb.SessionCommand(ask=ask).SerializeToString())

    async def cancel(self, key: int) -> None:
        await self.call.write(pb.SessionCommand(cancel=pb.SessionCancel(key=key)).SerializeToString())

    async def read(self) -> bool:
        """Take one message in; return False at the end."""
        data = await self.call.read()
        if not isinstance(data, bytes):
            return False
        news = pb.SessionNews.FromString(data)
        begins = [0, *(reply.after for reply in news.replies)]
        ends = [*(reply.after for reply in news.replies), len(news.keys)]
        for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if place:
                self._reply(news.replies[place - 1])
            for index in range(begin, end):
                self._add(news.keys[index], news.samples[index], news.texts[index])
                self.text_alone += 1
        self.failures.update({failure.key: failure for failure in news.failures})
        return True

    def _reply(self, reply: pb.SessionReply) -> None:
        for piece in reply.reply.pieces:
            self._add(reply.key, piece.sample, piece.text)
        if reply.reply.HasField("usage"):
            self.ends[reply.key] = reply.reply.pieces[-1].finish_reason

    def _add(self, key: int, sample: int, text: str) -> None:
        assert key not in self.ends and key not in self.failures, "news after the end"
        self.texts[key, sample] = self.texts.get((key, sample), "") + text


@asynchronous
async def test_many_requests_share_a_stream_and_each_gets_its_own_answer() -> None:
    async with public() as (setup, channel):
        stream = Stream(channel)
        prompts = {key: f"def f{key}(a, b): return a" for key in range(1, 13)}
        for key, prompt in prompts.items():
            await stream.ask(key, ask(prompt, max_tokens=20, n=1 + key % 2, temperature=0))
        await stream.call.done_writing()
        while await stream.read():
            pass
        assert await stream.call.code() is grpc.StatusCode.OK
        assert stream.ends == dict.fromkeys(prompts, "length") and not stream.failures
        for key, prompt in prompts.items():
            alone = await replies(channel, ask(prompt, max_tokens=20, n=1 + key % 2, temperature=0))
            for sample in range(1 + key % 2):
                assert stream.texts[key, sample] == text_of(alone, sample)
        assert setup.engine.taken and stream.text_alone, "text goes without waking its request"
        assert setup.gateway.admission.in_flight == 0


@asynchronous
async def test_one_that_is_wrong_refused_or_ended_leaves_the_others_alone() -> None:
    async with public() as (setup, channel):
        setup.engine.hold.clear()
        stream = Stream(channel)
        await stream.ask(1, ask(max_tokens=4))
        await stream.ask(2, ask(temperature=-1))
        await stream.ask(3, pb.GenerateRequest())
        await stream.ask(4, ask(), timeout_s=float("nan"))
        await stream.ask(5, ask(), timeout_s=0.05)
        await stream.ask(6, ask())
        await until(lambda: len(setup.engine.requests) == 3)
        await stream.cancel(6)
        await stream.cancel(6)
        await until(lambda: len(setup.engine.live) <= 2)
        while len(stream.failures) < 4:
            assert await stream.read()
        told = {key: (failure.code, failure.field) for key, failure in stream.failures.items()}
        assert told == {
            2: ("INVALID_ARGUMENT", "temperature"),
            3: ("INVALID_ARGUMENT", "prompt"),
            4: ("INVALID_ARGUMENT", "timeout_s"),
            5: ("DEADLINE_EXCEEDED", ""),
        }
        setup.engine.hold.set()
        await stream.call.done_writing()
        while await stream.read():
            pass
        assert stream.ends == {1: "length"} and set(stream.failures) == {2, 3, 4, 5}


@pytest.mark.parametrize(
    "said",
    [b"\xff\xff", b"", pb.SessionCommand(ask=pb.SessionAsk()).SerializeToString(), None],
    ids=["garbage", "nothing", "no key", "a key again"],
)
def test_what_cannot_be_said_ends_the_session_and_its_requests(said: bytes | None) -> None:
    @asynchronous
    async def test() -> None:
        async with public() as (setup, channel):
            setup.engine.hold.clear()
            stream = Stream(channel)
            await stream.ask(7, ask())
            await until(lambda: bool(setup.engine.live))
            if said is None:
                await stream.ask(7, ask())
            else:
                await stream.call.write(said)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await stream.read():
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await until(lambda: not setup.engine.live and not setup.gateway.admission.in_flight)

    test()


@asynchronous
async def test_a_caller_that_leaves_has_all_its_requests_ended() -> None:
    async with public() as (setup, channel):
        setup.engine.hold.clear()
        stream = Stream(channel)
        for key in range(1, 6):
            await stream.ask(key, ask())
        await until(lambda: len(setup.engine.live) == 5)
        stream.call.cancel()
        await until(lambda: not setup.engine.live and not setup.gateway.admission.in_flight)
        assert len(setup.engine.aborted) == 5
