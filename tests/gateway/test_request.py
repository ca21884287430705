"""One request's way: what follows each event, as a table of stories and as random lives against imagined replicas."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from slipstream.comm.kv.transfer import Ending
from slipstream.runtime.gateway.request import (
    Action,
    Choose,
    Deliver,
    Drop,
    Finished,
    GiveUp,
    GoOn,
    Part,
    RequestWay,
    Submit,
    WayLimits,
)
from slipstream.runtime.gateway.routes import Route, Split, Whole
from slipstream.sdk.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest, Overloaded, SlipstreamError

LIMITS = WayLimits(shun_s=1.0, stall_s=10.0, commit_s=2.0, max_losses=4)
SPLIT = Split(prefill="p1", decode="d1")
LOST = EngineUnavailable("lost")


@dataclass
class Story:
    """A way, and what was delivered on it."""

    samples: int = 1
    may_split: bool = True
    max_tokens: int = 10
    ends_s: float = 100.0
    delivered: list[list[int]] = field(init=False)
    way: RequestWay = field(init=False)

    def __post_init__(self) -> None:
        self.delivered = [[] for _ in range(self.samples)]
        self.way = RequestWay(
            self.delivered,
            max_tokens=self.max_tokens,
            may_split=self.may_split,
            ends_s=self.ends_s,
            limits=LIMITS,
        )

    def start(self, route: Route | None) -> list[Action]:
        (choose,) = self.way.begin(0.0)
        assert choose == Choose(exclude=frozenset(), may_split=self.may_split and self.samples == 1)
        return self.routed(route)

    def routed(self, route: Route | None, now_s: float = 0.0) -> list[Action]:
        return self.way.routed(route, ticket="t", now_s=now_s)

    def bring(self, attempt: int, *token_ids: int, index: int = 0, now_s: float = 0.0) -> list[Action]:
        """Let an attempt bring tokens, and deliver what is to be delivered; return what else is to be done."""
        actions = self.way.take(attempt, index, token_ids, now_s=now_s)
        for action in actions:
            if isinstance(action, Deliver):
                self.delivered[index] += token_ids[action.skip :]
        return [action for action in actions if not isinstance(action, Deliver)]


def submit(attempt: int, replica: str, part: Part = Part.WHOLE, **more: object) -> Submit:
    values: dict[str, object] = {"attempt": attempt, "replica": replica, "part": part, "generated": (), **more}
    return Submit(**values)  # type: ignore[arg-type]  # named by tests


def choose(*exclude: str, may_split: bool = True, decode: str | None = None) -> Choose:
    return Choose(exclude=frozenset(exclude), may_split=may_split, decode=decode)


# ------------------------------------------------------------------ whole


def test_a_whole_request_runs_and_ends() -> None:
    story = Story()
    assert story.start(Whole(replica="d1")) == [submit(1, "d1")]
    assert story.way.leads(1) and story.bring(1, 5, 6) == []
    assert story.way.over(1, 0) == []
    assert story.way.ended(1, now_s=1.0) == [Finished()]
    assert story.way.done and story.delivered == [[5, 6]]


def test_what_was_delivered_goes_along_to_the_next() -> None:
    story = Story(samples=3)
    story.start(Whole(replica="d1"))
    story.bring(1, 5, 6)
    story.bring(1, 7, index=2)
    story.bring(1, 8, index=1)
    story.way.over(1, 1)
    assert story.way.failed(1, LOST, now_s=3.0) == [choose("d1", may_split=False)]
    assert story.routed(Whole(replica="d2"), 3.0) == [submit(2, "d2", generated=((5, 6), None, (7,)))]
    # What the lost one still brings is nobody's.
    assert story.bring(1, 9) == [] and story.delivered[0] == [5, 6]
    story.bring(2, 9)
    assert story.delivered == [[5, 6, 9], [8], [7]]


def test_a_lost_request_waits_for_a_replica_until_its_time_is_over() -> None:
    story = Story(ends_s=20.0)
    story.start(Whole(replica="d1"))
    assert story.way.failed(1, LOST, now_s=3.0) == [choose("d1")]
    assert story.routed(None, 3.0) == [] and story.way.waits and story.way.wakes_s == 4.0
    assert story.way.due(3.5) == []
    # Left out for a while, not for ever: a driver that starts again has the same name.
    assert story.way.due(4.0) == [choose()]
    assert story.routed(None, 4.0) == []
    assert story.way.replicas_changed(4.5) == [choose()]
    assert story.routed(None, 4.5) == []
    assert story.way.due(20.0) == [GiveUp(error=LOST)] and story.way.done
    assert story.way.due(21.0) == [] and story.way.replicas_changed(21.0) == []


def test_a_request_that_nobody_had_does_not_wait() -> None:
    story = Story()
    (give_up,) = story.start(None)
    assert isinstance(give_up, GiveUp) and isinstance(give_up.error, EngineUnavailable)


def test_a_refused_request_tries_another_and_is_told_at_once() -> None:
    story = Story()
    story.start(Whole(replica="d1"))
    full = Overloaded("full")
    assert story.way.failed(1, full, now_s=0.0) == [choose("d1")]
    assert story.routed(None) == [GiveUp(error=full)]


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_request_that_was_taken_once_waits_where_all_are_full(tokens: int) -> None:
    story = Story()
    story.start(Whole(replica="d1"))
    story.bring(1, *range(tokens))
    story.way.failed(1, LOST, now_s=0.0)
    # However often it is refused: that is not lost.
    for attempt in range(2, 20):
        assert story.routed(Whole(replica="d2"))
        story.way.failed(attempt, Overloaded("full"), now_s=2.0 * attempt)
        assert story.routed(None, 2.0 * attempt) == [] and story.way.waits
        assert story.way.due(2.0 * attempt + 1.0) == [choose()]


def test_what_no_other_replica_can_mend_ends_it() -> None:
    story = Story()
    story.start(SPLIT)
    wrong = InvalidRequest("prompt", "is wrong")
    assert story.way.failed(2, wrong, now_s=0.0) == [Drop(attempt=1), GiveUp(error=wrong)]


def test_a_request_that_every_replica_dies_of_is_given_up() -> None:
    story = Story()
    story.start(Whole(replica="d1"))
    for attempt in range(1, LIMITS.max_losses + 1):
        assert isinstance(story.way.failed(attempt, LOST, now_s=0.0)[-1], Choose)
        story.routed(Whole(replica=f"d{attempt + 1}"))
    assert story.way.failed(LIMITS.max_losses + 1, LOST, now_s=0.0) == [GiveUp(error=LOST)]


def test_an_answer_that_stops_short_is_lost() -> None:
    story = Story()
    story.start(Whole(replica="d1"))
    story.bring(1, 5)
    assert story.way.ended(1, now_s=0.0) == [choose("d1")]


def test_lost_after_its_last_token_is_finished() -> None:
    story = Story()
    story.start(Whole(replica="d1"))
    story.bring(1, 5)
    story.way.over(1, 0)
    assert story.way.failed(1, LOST, now_s=0.0) == [Finished()]


# ------------------------------------------------------------------ split


def started() -> Story:
    story = Story()
    hold = submit(1, "d1", Part.HOLD, ticket="t")
    assert story.start(SPLIT) == [hold, submit(2, "p1", Part.SEND, ticket="t", decode="d1")]
    assert not story.way.leads(1) and story.way.wakes_s == LIMITS.stall_s
    return story


@pytest.mark.parametrize("first", ["sender", "receiver"])
@pytest.mark.parametrize("reported", [True, False])
def test_a_split_request_has_each_token_once(first: str, reported: bool) -> None:
    story = started()
    if first == "sender":
        assert story.bring(2, 5) == [] and story.delivered == [[5]]
        assert story.bring(1, 5) == [] and story.delivered == [[5]]
    else:
        assert story.bring(1, 5, 6) == [] and story.bring(2, 5) == []
    assert story.way.leads(1) and story.way.wakes_s == story.ends_s
    if reported:
        assert story.way.handed_off(2, "committed", now_s=1.0) == []
    story.bring(1, *([7] if first == "receiver" else [6, 7]))
    assert story.delivered == [[5, 6, 7]]
    assert story.way.over(1, 0) == ([] if reported else [Drop(attempt=2)])
    assert story.way.ended(1, now_s=2.0) == [Finished()]


def test_a_request_that_ends_with_its_first_token_ends_at_the_sender() -> None:
    story = started()
    story.bring(2, 5)
    assert story.way.over(2, 0) == [Drop(attempt=1)]
    assert story.way.ended(2, now_s=1.0) == [Finished()]


@pytest.mark.parametrize("ending", [Ending.PEER_LOST, Ending.NO_ANSWER, Ending.TOO_MANY, None])
def test_without_a_token_another_sender_is_asked_for_the_same_ticket(ending: Ending | None) -> None:
    story = started()
    actions = story.way.failed(2, LOST, now_s=1.0) if ending is None else story.way.handed_off(2, ending, now_s=1.0)
    assert actions == [choose("p1", decode="d1")]
    again = submit(3, "p2", Part.SEND, ticket="t", decode="d1")
    assert story.routed(Split(prefill="p2", decode="d1"), 1.0) == [again]
    assert story.way.wakes_s == 1.0 + LIMITS.stall_s
    # The second is the last: then the one that waits goes on by itself.
    assert story.way.handed_off(3, Ending.PEER_LOST, now_s=2.0) == [GoOn(attempt=1)]
    assert story.way.leads(1) and story.way.wakes_s == story.ends_s


def test_without_another_sender_the_one_that_waits_goes_on() -> None:
    story = started()
    story.way.failed(2, LOST, now_s=1.0)
    assert story.routed(None, 1.0) == [GoOn(attempt=1)]
    story.bring(1, 5, 6)
    assert story.delivered == [[5, 6]]


@pytest.mark.parametrize("ending", [Ending.NO_ROOM, Ending.NEVER_FITS])
def test_without_room_another_sender_is_of_no_use(ending: Ending) -> None:
    assert started().way.handed_off(2, ending, now_s=1.0) == [GoOn(attempt=1)]


def test_after_the_first_token_what_was_delivered_counts() -> None:
    story = started()
    story.bring(2, 5)
    assert story.way.handed_off(2, Ending.BAD_CHECKSUM, now_s=1.0) == [Drop(attempt=1), choose("p1")]
    hold = submit(3, "d1", Part.HOLD, ticket="t", generated=((5,),))
    send = submit(4, "p2", Part.SEND, ticket="t", decode="d1", generated=((5,),))
    assert story.routed(Split(prefill="p2", decode="d1"), 1.0) == [hold, send]
    story.bring(4, 6)
    story.bring(3, 6, 7)
    assert story.delivered == [[5, 6, 7]]
    # Split twice, and not once more.
    assert story.way.failed(3, LOST, now_s=2.0) == [Drop(attempt=4), choose("d1", may_split=False)]


@pytest.mark.parametrize("how", ["lost", "unacknowledged"])
@pytest.mark.parametrize("came", [True, False])
def test_what_a_lost_sender_sent_may_have_come(how: str, came: bool) -> None:
    story = started()
    story.bring(2, 5)
    lost = how == "lost"
    way = story.way
    actions = way.failed(2, LOST, now_s=1.0) if lost else way.handed_off(2, Ending.UNACKNOWLEDGED, now_s=1.0)
    assert actions == [] and way.wakes_s == 1.0 + LIMITS.commit_s
    if came:
        story.bring(1, 5, 6)
        assert way.wakes_s == story.ends_s and story.delivered == [[5, 6]]
    else:
        assert way.due(3.0)[0] == Drop(attempt=1)


@pytest.mark.parametrize("first_token", [True, False])
def test_a_lost_receiver_ends_the_sending(first_token: bool) -> None:
    story = started()
    if first_token:
        story.bring(2, 5)
    assert story.way.failed(1, LOST, now_s=1.0) == [Drop(attempt=2), choose("d1")]
    assert story.way.handed_off(2, Ending.COMMITTED, now_s=1.0) == []
    expected = submit(3, "d2", generated=((5,),) if first_token else ())
    assert story.routed(Whole(replica="d2"), 1.0) == [expected]


def test_a_stalled_sender_is_left_for_another_one() -> None:
    story = started()
    assert story.way.due(9.9) == [] and story.way.due(10.0) == [choose("p1", decode="d1")]
    again = submit(3, "p2", Part.SEND, ticket="t", decode="d1")
    assert story.routed(Split(prefill="p2", decode="d1"), 10.0) == [Drop(attempt=2), again]
    assert story.way.due(20.0) == [Drop(attempt=3), GoOn(attempt=1)]


def test_kv_that_does_not_come_is_not_waited_for_without_end() -> None:
    story = started()
    story.bring(2, 5, now_s=8.0)
    assert story.way.wakes_s == 18.0
    assert story.way.due(18.0) == [Drop(attempt=1), Drop(attempt=2), choose("p1")]


def test_nobody_goes_on_from_another_token_than_the_clients() -> None:
    story = started()
    story.bring(2, 5)
    assert story.bring(1, 4, 6) == [Drop(attempt=2), choose("d1")]
    assert story.routed(Whole(replica="d1"), 1.0) == [submit(3, "d1", generated=((5,),))]


def test_a_prompt_with_one_token_left_is_not_split() -> None:
    story = Story(max_tokens=2)
    story.start(SPLIT)
    story.bring(2, 5)
    assert story.way.failed(1, LOST, now_s=0.0)[-1] == choose("d1", may_split=False)


def test_a_client_that_leaves_drops_everything() -> None:
    story = started()
    assert story.way.leave() == [Drop(attempt=1), Drop(attempt=2)]
    assert story.way.handed_off(2, Ending.CANCELLED, now_s=1.0) == [] and story.way.done


def test_the_deadline_ends_everything() -> None:
    *dropped, give_up = started().way.due(100.0)
    assert dropped == [Drop(attempt=1), Drop(attempt=2)]
    assert isinstance(give_up, GiveUp) and isinstance(give_up.error, DeadlineExceeded)


# ------------------------------------------------------------------ random lives


class Life:
    """A request against imagined replicas that do, and suffer, what they like."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        samples = draw.choice((1, 1, 1, 3))
        self.truth = [[draw.randrange(50) for _ in range(draw.randrange(1, 9))] for _ in range(samples)]
        self.story = Story(samples=samples, may_split=draw.random() < 0.8, max_tokens=8, ends_s=60.0)
        self.way = self.story.way
        self.now_s = 0.0
        self.live: dict[int, Submit] = {}
        self.places: dict[int, list[int]] = {}
        self.came: set[str] = set()
        self.gone_on: set[int] = set()
        self.ends: list[Action] = []
        self.tickets = 0

    def live_on(self) -> None:
        self.act(self.way.begin(0.0))
        for _ in range(300):
            if self.ends:
                break
            self.now_s += self.draw.choice((0.0, 0.1, 0.5, 3.0))
            if self.live and self.draw.random() < 0.9:
                self.happen(self.draw.choice(list(self.live)))
            self.act(self.way.due(self.now_s) if self.draw.random() < 0.7 else self.way.replicas_changed(self.now_s))
            assert self.ends or self.live or self.way.waits, "nobody has it and nobody waits"

    def happen(self, number: int) -> None:
        """Let something happen to one attempt."""
        one, way = self.live[number], self.way
        if self.draw.random() < 0.15:
            error: SlipstreamError = self.draw.choice((LOST, LOST, Overloaded("full")))
            del self.live[number]
            self.act(way.failed(number, error, now_s=self.now_s))
        elif one.part is Part.SEND:
            self.send(number, one)
        elif one.part is Part.WHOLE or number in self.gone_on or one.ticket in self.came:
            self.draw_tokens(number)

    def send(self, number: int, one: Submit) -> None:
        (truth,), (place,) = self.truth, self.places[number]
        if place == len(one.generated[0] or () if one.generated else ()):
            if self.draw.random() < 0.2:
                return self.hand_off(number, one, self.draw.choice((Ending.NO_ROOM, Ending.PEER_LOST)))
            return self.tokens(number, 0, 1)
        if place == len(truth):
            return self.end(number)
        return self.hand_off(number, one, self.draw.choice((Ending.COMMITTED, Ending.COMMITTED, *Ending)))

    def hand_off(self, number: int, one: Submit, ending: Ending) -> None:
        receivers = [each for each in self.live.values() if each.part is Part.HOLD and each.ticket == one.ticket]
        arrived = ending is Ending.COMMITTED or (ending is Ending.UNACKNOWLEDGED and self.draw.random() < 0.5)
        if receivers and arrived and receivers[0].attempt not in self.gone_on:
            self.came.add(one.ticket)
        del self.live[number]
        self.act(self.way.handed_off(number, ending, now_s=self.now_s))

    def draw_tokens(self, number: int) -> None:
        left = [index for index, truth in enumerate(self.truth) if self.places[number][index] < len(truth)]
        if not left:
            return self.end(number)
        index = self.draw.choice(left)
        return self.tokens(number, index, self.draw.randrange(1, 4))

    def tokens(self, number: int, index: int, count: int) -> None:
        place, truth = self.places[number][index], self.truth[index]
        token_ids = truth[place : place + count]
        self.places[number][index] += len(token_ids)
        self.act(self.story.bring(number, *token_ids, index=index, now_s=self.now_s))
        if place + count >= len(truth) and number in self.live:
            self.act(self.way.over(number, index))

    def end(self, number: int) -> None:
        del self.live[number]
        self.act(self.way.ended(number, now_s=self.now_s))

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Choose():
                    self.tickets += 1
                    ticket = f"t{self.tickets}"
                    self.act(self.way.routed(self.route(action), ticket=ticket, now_s=self.now_s))
                case Submit(attempt=number, part=part, generated=generated):
                    self.live[number] = action
                    given = generated or tuple(() for _ in self.truth)
                    for tokens, truth, delivered in zip(given, self.truth, self.story.delivered, strict=True):
                        assert delivered == truth if tokens is None else list(tokens) == delivered
                    ends = [len(truth) for truth in self.truth]
                    self.places[number] = [
                        end if tokens is None else len(tokens) for end, tokens in zip(ends, given, strict=True)
                    ]
                    parts = [each.part for each in self.live.values()]
                    assert sorted(map(str, parts)) in (["Part.WHOLE"], ["Part.HOLD"], ["Part.HOLD", "Part.SEND"])
                    assert part is not Part.SEND or action.decode == next(
                        each.replica for each in self.live.values() if each.part is Part.HOLD
                    )
                case Drop(attempt=number):
                    self.live.pop(number, None)
                case GoOn(attempt=number):
                    (tokens,) = self.live[number].generated or ((),)
                    assert list(tokens or ()) == self.story.delivered[0], "what is computed anew was delivered"
                    self.gone_on.add(number)
                case Finished() | GiveUp():
                    self.ends.append(action)
                case Deliver():
                    raise AssertionError("bring has delivered it")

    def route(self, asked: Choose) -> Route | None:
        prefill = [name for name in ("p1", "p2") if name not in asked.exclude]
        decode = [name for name in ("d1", "d2", "d3") if name not in asked.exclude]
        if asked.decode is not None:
            return Split(prefill=prefill[0], decode=asked.decode) if prefill else None
        if not decode or self.draw.random() < 0.1:
            return None
        if asked.may_split and prefill and self.draw.random() < 0.7:
            return Split(prefill=self.draw.choice(prefill), decode=self.draw.choice(decode))
        return Whole(replica=self.draw.choice(decode))


def test_every_life_ends_once_with_the_right_tokens_or_an_error(seed: int) -> None:
    finished = 0
    for life_seed in range(seed, seed + 2000):
        life = Life(random.Random(life_seed))
        life.live_on()
        told = f"life {life_seed}"
        assert len(life.ends) == 1 and not life.live and life.way.done, told
        if isinstance(life.ends[0], Finished):
            finished += 1
            assert life.story.delivered == life.truth, told
        else:
            for delivered, truth in zip(life.story.delivered, life.truth, strict=True):
                assert delivered == truth[: len(delivered)], told
    assert finished > 1000
