"""A session of the public service when its caller does not keep up, and when the gateway fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from slipstream.runtime.rpc.codec_inference import read_kept, write_kept
from slipstream.runtime.rpc.generated import inference_pb2 as pb
from slipstream.runtime.rpc.inference import AnswerNews, Ask, Caller, ModelFacts, Scored, TextLine
from slipstream.runtime.rpc.inference_session import InferenceSession
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.view_source import run, until

PIECES = 500


class Talkative:
    """A host that writes over the line while that has room, and goes on as news where it has none."""

    def __init__(self) -> None:
        self.made = 0
        self.ended = 0

    def check(self, caller: Caller) -> None:
        pass

    def models(self) -> tuple[ModelFacts, ...]:
        return ()

    async def generate(self, ask: Ask, caller: Caller, line: TextLine | None) -> AsyncGenerator[AnswerNews]:
        assert line is not None
        if ask.body["prompt"] == "fail":
            raise ZeroDivisionError("what nobody should read")
        try:
            for place in range(PIECES):
                self.made += 1
                if line.keeps_up:
                    line.write(0, f"{place},")
                else:
                    yield AnswerNews(sample=0, text=f"{place},")
                await asyncio.sleep(0)
            yield AnswerNews(sample=0, text="", finish_reason="length", usage=(1, 0, PIECES))
        finally:
            self.ended += 1


class Reader:
    """What a caller reads, when it does."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.texts: dict[int, str] = {}
        self.failures: dict[int, pb.SessionFailure] = {}
        self.ends: set[int] = set()
        self.most = 0

    async def write(self, data: bytes) -> None:
        await self.reads.wait()
        news = pb.SessionNews.FromString(data)
        self.most = max(self.most, len(news.keys) + len(news.replies))
        for key, text in zip(news.keys, news.texts, strict=True):
            self.texts[key] = self.texts.get(key, "") + text
        self.failures.update({failure.key: failure for failure in news.failures})
        self.ends.update(reply.key for reply in news.replies if reply.reply.HasField("usage"))


def command(key: int, text: str = "go on") -> bytes:
    return pb.SessionCommand(ask=pb.SessionAsk(key=key, request=pb.GenerateRequest(text=text))).SerializeToString()


def session_of(host: Talkative, reader: Reader, *, write_timeout_s: float = 20.0) -> InferenceSession:
    return InferenceSession(
        host, Caller(), write=reader.write, write_timeout_s=write_timeout_s, max_requests=4, max_unsent=50
    )


def test_a_caller_that_does_not_read_holds_its_requests_up_and_then_gets_everything() -> None:
    async def test() -> None:
        host, reader = Talkative(), Reader()
        session = session_of(host, reader)
        writing = asyncio.ensure_future(session.write_all())
        for key in (1, 2, 3):
            await session.take(command(key))
        await until(lambda: host.made >= 50)
        before = -1
        while before != host.made:
            before = host.made
            for _ in range(50):
                await asyncio.sleep(0)
        # One message is being written and one is made; each request holds one piece more.
        assert host.made <= 2 * (50 + 3) + 3
        reader.reads.set()
        session.finish()
        await writing
        assert reader.texts == dict.fromkeys((1, 2, 3), "".join(f"{place}," for place in range(PIECES)))
        assert reader.ends == {1, 2, 3} and reader.most <= 50 + 3

    run(test())


def test_a_caller_that_never_reads_loses_its_session_and_its_requests() -> None:
    async def test() -> None:
        host, reader = Talkative(), Reader()
        session = session_of(host, reader, write_timeout_s=0.05)
        await session.take(command(1))
        with pytest.raises(EngineUnavailable, match="unread"):
            await session.write_all()
        await session.close()
        assert host.ended == 1

    run(test())


def test_one_request_too_many_and_one_that_breaks_the_gateway_are_told_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        host, reader = Talkative(), Reader()
        reader.reads.set()
        session = session_of(host, reader)
        for key in range(1, 6):
            await session.take(command(key))
        writing = asyncio.ensure_future(session.write_all())
        await until(lambda: len(reader.ends) == 4)
        await session.take(command(6, "fail"))
        session.finish()
        await writing
        told = {key: failure.code for key, failure in reader.failures.items()}
        assert told == {5: "RESOURCE_EXHAUSTED", 6: "INTERNAL"}
        assert "nobody should read" not in reader.failures[6].message

    run(test())
    assert "nobody should read" in caplog.text


def test_answers_that_are_kept_come_back_the_same() -> None:
    news = [
        AnswerNews(sample=1, text="é", token_ids=(5, 6), answer_id="a", logprobs=((Scored(5, -0.5, 1, "x"),),)),
        AnswerNews(sample=0, text="", finish_reason="stop", stop_reason="end", usage=(3, 2, 1)),
        AnswerNews(sample=2, text="z", finish_reason="stop", stop_reason=0),
    ]
    assert list(read_kept(b"".join(map(write_kept, news)))) == news
