"""What every way for drivers to talk about KV has to keep, over a wire or not."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from slipstream.comm.errors import KvMismatch
from slipstream.comm.kv.transfer import Heartbeat
from slipstream.runtime.rpc.kv_talk import KvCaller, KvHost, KvTalker
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.view_source import run, until
from slipstream.tests.fakes.kv_talkers import FROM_RECEIVER, FROM_SENDER, NotingEar, NotingHost, facts, other_model


@dataclass
class Talking:
    """A talker, an address to call, and what starts and ends a driver there."""

    talker: KvTalker
    address: str
    serve: Callable[[KvHost], Awaitable[None]]
    stop: Callable[[], Awaitable[None]]

    def call(self, ear: NotingEar, *, replica: str = "d-1") -> KvCaller:
        return self.talker.call(replica=replica, address=self.address, ours=ear.ours, ear=ear)


class KvTalkContract(ABC):
    """Subclass it as ``Test...`` and say how drivers talk."""

    @abstractmethod
    def talking(self) -> AsyncIterator[Talking]:
        """Yield a way to talk; an async generator."""

    @asynccontextmanager
    async def met(self) -> AsyncIterator[tuple[Talking, NotingHost, NotingEar, KvCaller]]:
        """Yield two drivers that have met."""
        host, ear = NotingHost(), NotingEar()
        async with asynccontextmanager(self.talking)() as talking:
            await talking.serve(host)
            caller = talking.call(ear)
            await until(lambda: bool(ear.lives and host.lines))
            try:
                yield talking, host, ear, caller
            finally:
                caller.close()

    def test_each_hears_what_the_other_is_and_says_in_order(self) -> None:
        async def test() -> None:
            async with self.met() as (_, host, ear, caller):
                assert ear.lives == [host.facts] and host.lines[0].theirs == ear.ours
                for said in FROM_SENDER:
                    assert caller.say(said)
                for answered in FROM_RECEIVER:
                    assert host.lines[0].say(answered)
                await until(lambda: len(host.heard) == len(FROM_SENDER) and len(ear.heard) == len(FROM_RECEIVER))
                assert host.messages == list(FROM_SENDER) and ear.heard == list(FROM_RECEIVER)
                assert all(line is host.lines[0] for line, _ in host.heard)
                assert not ear.losses and not host.gone

        run(test())

    def test_both_speak_from_other_threads(self) -> None:
        async def test() -> None:
            async with self.met() as (_, host, ear, caller):

                def speak() -> None:
                    for _ in range(50):
                        caller.say(FROM_SENDER[0])
                        host.lines[0].say(FROM_RECEIVER[0])

                thread = threading.Thread(target=speak)
                thread.start()
                await until(lambda: len(host.heard) == 50 and len(ear.heard) == 50)
                thread.join()

        run(test())

    def test_what_is_said_before_they_meet_waits_for_it(self) -> None:
        async def test() -> None:
            host, ear = NotingHost(), NotingEar()
            async with asynccontextmanager(self.talking)() as talking:
                await talking.serve(host)
                caller = talking.call(ear)
                assert caller.say(FROM_SENDER[0])
                await until(lambda: bool(host.heard))
                assert host.messages == [FROM_SENDER[0]] and ear.lives
                caller.close()

        run(test())

    def test_a_driver_whose_kv_is_another_is_refused_by_name(self) -> None:
        async def test() -> None:
            host = NotingHost(facts=other_model(facts("d-1")))
            ear = NotingEar()
            async with asynccontextmanager(self.talking)() as talking:
                await talking.serve(host)
                caller = talking.call(ear)
                await until(lambda: bool(ear.losses))
                assert isinstance(ear.losses[0], KvMismatch) and "model" in str(ear.losses[0])
                caller.close()
            assert not host.lines and not host.gone and not ear.heard

        run(test())

    def test_whoever_answers_under_another_name_is_not_met(self) -> None:
        async def test() -> None:
            host, ear = NotingHost(), NotingEar()
            async with asynccontextmanager(self.talking)() as talking:
                await talking.serve(host)
                caller = talking.call(ear, replica="d-2")
                await until(lambda: bool(ear.losses))
                assert isinstance(ear.losses[0], EngineUnavailable)
                assert "'d-1'" in str(ear.losses[0]) and "'d-2'" in str(ear.losses[0])
                caller.close()
            assert not ear.lives

        run(test())

    def test_a_driver_that_starts_anew_at_its_address_is_met_anew(self) -> None:
        async def test() -> None:
            async with self.met() as (talking, host, ear, caller):
                await talking.stop()
                await until(lambda: bool(ear.losses and host.gone))
                assert host.gone == host.lines[:1] and isinstance(ear.losses[0], EngineUnavailable)
                assert not host.lines[0].say(FROM_RECEIVER[0]), "the line is over"
                heard = len(ear.heard)
                later = NotingHost(facts=facts("d-1", 2))
                await talking.serve(later)
                await until(lambda: bool(later.lines))
                await until(lambda: len(ear.lives) == 2)
                assert ear.lives[1].incarnation == 2
                assert caller.say(FROM_SENDER[1])
                await until(lambda: bool(later.heard))
                assert later.messages == [FROM_SENDER[1]] and len(ear.heard) == heard

        run(test())

    def test_a_driver_may_come_later(self) -> None:
        async def test() -> None:
            host, ear = NotingHost(), NotingEar()
            async with asynccontextmanager(self.talking)() as talking:
                caller = talking.call(ear)
                await until(lambda: bool(ear.losses))
                assert isinstance(ear.losses[0], EngineUnavailable) and not ear.lives
                await talking.serve(host)
                await until(lambda: bool(ear.lives))
                caller.close()

        run(test())

    def test_a_receiver_that_closes_a_line_is_called_again(self) -> None:
        async def test() -> None:
            async with self.met() as (talking, host, ear, _):
                threading.Thread(target=host.lines[0].close).start()
                await until(lambda: bool(ear.losses and host.gone))
                assert host.gone == host.lines[:1]
                await talking.serve(host)
                await until(lambda: len(host.lines) == 2 and len(ear.lives) == 2)

        run(test())

    def test_a_caller_that_closes_is_left_and_hears_no_more(self) -> None:
        async def test() -> None:
            async with self.met() as (_, host, ear, caller):
                closing = threading.Thread(target=caller.close)
                closing.start()
                await until(lambda: bool(host.gone))
                closing.join()
                caller.close()
                assert not caller.say(FROM_SENDER[0])
                host.lines[0].say(Heartbeat(alive=()))
                assert len(host.gone) == 1 and not ear.heard and not ear.losses

        run(test())
