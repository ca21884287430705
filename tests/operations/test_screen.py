"""What a terminal shows: lines that stay, a status below them while the command waits, and the last one at its end."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from slipstream.placement.plan import Degrees, Shortage
from slipstream.runtime.controller.controller import NodeStatus, PoolStatus, RankStatus, ReplicaStatus
from slipstream.runtime.controller.gateway_keeper import GatewayReport, GatewayState
from slipstream.runtime.operations.progress import Event
from slipstream.runtime.operations.reporter import Ending
from slipstream.runtime.operations.screen import LiveScreen, make_reporter, status_text
from slipstream.runtime.operations.status import DeploymentStatus

STATUS = DeploymentStatus(
    name="chat",
    ray="10.0.0.1:6379",
    model="/models/[odd]",
    served_names=("chat",),
    controller=False,
    controller_detail="it has ended",
    epoch=7,
    pools=(PoolStatus(pool="mixed", role="mixed", degrees=Degrees(pp=2, tp=2), generation="2.1", wanted=2, serving=1),),
    replicas=(
        ReplicaStatus(
            replica="mixed-4",
            pool="mixed",
            generation="2.1",
            phase="loading",
            routed=False,
            devices=("a/0", "lost/1"),
            address="",
            why="",
            role="decode",
            requests=3,
            transfers=2,
            ranks=(
                RankStatus(rank=0, device="a/0", state="loading", loaded=0.375),
                RankStatus(rank=1, device="lost/1", state="lost"),
            ),
        ),
    ),
    nodes=(NodeStatus(name="a", address="10.0.0.1", device_type="cpu-core", devices=2),),
    gateways=(GatewayReport(name="0", node="a", state=GatewayState.READY, address="10.0.0.1:8000", starts=1),),
    cordoned=("a",),
    shortages=(Shortage(pool="mixed", needed=4, found=1, why="4 devices are needed"),),
    problem="a round failed",
)


def terminal() -> tuple[StringIO, Console]:
    text = StringIO()
    return text, Console(file=text, force_terminal=True, width=160, highlight=False)


def test_a_status_shows_all_there_is() -> None:
    text = status_text(STATUS)
    for part in (
        "chat  chat (/models/[odd])  view 7  Ray at 10.0.0.1:6379",
        "the controller is down (it has ended)",
        "mixed  mixed  pp=2 tp=2",
        "mixed-4  decode  2.1         loading  no       3         2 ",
        "a at 10.0.0.1, cpu-core drained",
        "a/0  mixed-4 rank 0: loading 38%",
        "a/1  free",
        "lost (not seen)",
        "lost/1  mixed-4 rank 1: lost",
        "http://10.0.0.1:8000/v1",
        "missing pool mixed: 4 devices are needed",
        "problem a round failed",
    ):
        assert part in text, part
    assert "\x1b" not in text


def test_lines_stay_and_the_status_is_drawn_below_them_until_the_end() -> None:
    text, console = terminal()
    screen = LiveScreen(console)
    screen.say("starting")
    screen.show(STATUS, [Event(event="node", text="node [a] is there")])
    screen.show(STATUS, [])
    screen.end(Ending(exit_code=1, outcome="late", text="not all serves", status=STATUS))
    screen.close()
    shown = text.getvalue()
    assert shown.index("starting") < shown.index("node [a] is there") < shown.rindex("mixed-4 rank 0")
    assert shown.rindex("not all serves") > shown.rindex("mixed-4 rank 0")
    # The cursor is back.
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_who_reads_chooses_how_it_is_told() -> None:
    lines: list[str] = []
    errors: list[str] = []
    for as_json in (False, True):
        reporter = make_reporter(as_json=as_json, write=lines.append, complain=errors.append)
        reporter.show(STATUS, [Event(event="node", node="a", text="it is there")])
        reporter.say("for people")
        reporter.end(Ending(exit_code=1, outcome="late", text="not all serves"))
        reporter.close()
    assert lines[:2] == ["it is there", "for people"] and errors == ["not all serves"]
    assert lines[2] == '{"event": "node", "node": "a", "text": "it is there"}'
    assert lines[3] == '{"event":"end","exit_code":1,"outcome":"late","status":null,"text":"not all serves"}'
    assert len(lines) == 4
