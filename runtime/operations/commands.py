"""The command line around a deployment: ``up``, ``status``, ``scale``, ``drain``, ``update``, ``logs``, ``down``.

Reads arguments, calls the commands, turns what comes of them into exit codes: 0 done, 1 not done, 2 a wrong file or
argument, 130 interrupted. What they need is imported when they are given: Ray takes a second to load.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ...sdk.errors import CheckpointError, ConfigError, SlipstreamError
from ..clock import monotonic_clock

if TYPE_CHECKING:
    from ..controller.operator import Operator
    from .follow import Patience
    from .reporter import Ending, Reporter
    from .session import Session

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="a cluster file")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="RAY",
        help="HOST:PORT of a Ray cluster; auto: one that runs on this machine; local: our own. "
        "Default: RAY_ADDRESS, or whichever runs here",
    ),
]
NameOption = Annotated[str | None, typer.Option(help="the deployment, as its file calls it. Default: the only one")]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65_535, help="for the gateways, in place of the file's gateway.port; 0: any")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON: an object for each thing that happens")]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="do not stay")]
NoWaitOption = Annotated[bool, typer.Option("--detach", "-d", help="do not wait until it is so")]
TimeoutOption = Annotated[
    float | None, typer.Option(min=0, metavar="S", help="seconds to wait. Default: limits.start_timeout_s of the file")
]
WaitOption = Annotated[float, typer.Option(min=0, metavar="S", help="seconds to wait")]

_WAIT_S = 1800.0


def register(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    for command in (up, status, scale, drain, update, logs, down):
        app.command()(command)


def reach_operator(
    address: str | None, *, start: bool, announce: Callable[[str], None]
) -> AbstractContextManager[Operator]:
    """Reach the platform for as long as a block runs."""
    from .reach import reached

    return reached(address, start=start, announce=announce)


def real_patience() -> Patience:
    """Return time as it passes."""
    from .follow import Patience

    never = threading.Event()

    def pause(seconds: float) -> None:
        never.wait(seconds)

    return Patience(clock=monotonic_clock, pause=pause)


# ------------------------------------------------------------------ commands


def up(
    file: FileArgument,
    detach: DetachOption = False,
    address: AddressOption = None,
    timeout: TimeoutOption = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring up what a cluster file describes, on a Ray cluster or, where there is none, on this machine.

    Waits until every replica serves and, without --detach, stays until Ctrl-C, which takes all down again. Exit code 1
    says what is missing. A deployment of this name that runs already is updated, as with `slipstream update`, and goes
    on running.
    """
    from .up import apply, follow_applied, read_runnable

    with _exits(as_json) as reporter:
        # What is wrong with the file is said before anything is started.
        read_runnable(file)
        with _session(address, reporter, starts_ray=True, ends_ray=True) as session:
            applied = apply(session, file, environment=os.environ, timeout_s=timeout, must_run=False, port=port)
            if detach or applied.ran:
                _end(reporter, follow_applied(session, applied))
            _end(reporter, _stay(session, applied.name, lambda: follow_applied(session, applied)))


def update(
    file: FileArgument,
    detach: NoWaitOption = False,
    address: AddressOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a deployment that runs to what its cluster file says now, replica by replica.

    A request is answered by replicas of one model. Pools that `scale` has changed are again as the file says.
    """
    from .up import apply, follow_applied, read_runnable

    with _exits(as_json) as reporter:
        read_runnable(file)
        with _session(address, reporter) as session:
            applied = apply(session, file, environment=os.environ, timeout_s=timeout, must_run=True)
            _end(reporter, _asked() if detach else follow_applied(session, applied))


def status(name: NameOption = None, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Show a deployment: pools, replicas, gateways, and which rank is on which device of which node.

    While the controller is down, what its ledger has is shown. Exit code 1 when nothing runs.
    """
    from .status import look

    with _exits(as_json) as reporter, _session(address, reporter) as session:
        reporter.status(look(session.operator, _deployment(session, name)))


def scale(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="a pool of the deployment")],
    replicas: Annotated[int, typer.Argument(metavar="N", min=0, help="how many replicas it is to have")],
    name: NameOption = None,
    detach: NoWaitOption = False,
    address: AddressOption = None,
    timeout: WaitOption = _WAIT_S,
    as_json: JsonOption = False,
) -> None:
    """Give a pool more or fewer replicas. What is too many is drained. The next `update` goes by the file again."""
    from .change import scale as change

    with _exits(as_json) as reporter, _session(address, reporter) as session:
        found = _deployment(session, name)
        wanted = change(session, found, pool, replicas)
        done = f"pool {pool} has {replicas} replicas"
        _end(reporter, _asked() if detach else session.follow(found, wanted, timeout_s=timeout, done=done))


def drain(
    target: Annotated[str, typer.Argument(metavar="NODE|REPLICA", help="a node, or a replica such as mixed-3")],
    undo: Annotated[bool, typer.Option("--undo", help="let the node be used, or the replica stay, again")] = False,
    name: NameOption = None,
    detach: NoWaitOption = False,
    address: AddressOption = None,
    timeout: WaitOption = _WAIT_S,
    as_json: JsonOption = False,
) -> None:
    """Take a node out of use, or replace a replica: others take over first, where there is room."""
    from .change import drain as change
    from .status import look

    with _exits(as_json) as reporter, _session(address, reporter) as session:
        found = _deployment(session, name)
        wanted = change(session, found, target, undo=undo)
        of_replica = f"{target} may stay" if undo else f"{target} is replaced"
        of_node = f"{target} is used again" if undo else f"nothing is left on {target}"
        done = of_node if target in {node.name for node in look(session.operator, found).nodes} else of_replica
        _end(reporter, _asked() if detach else session.follow(found, wanted, timeout_s=timeout, done=done))


def logs(
    source: Annotated[
        str | None, typer.Argument(metavar="[REPLICA|gateway]", help="a replica, or gateway. Default: all")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="this rank alone")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what comes, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option(min=1, help="of each process, at most")] = 200,
    name: NameOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what ranks and gateways have printed, the last of it, for as long as somebody keeps their processes."""
    from .logs import LogReader

    with _exits(as_json) as reporter, _session(address, reporter) as session:
        reader = LogReader(session, _deployment(session, name), source, rank, lines)
        while True:
            for line in reader.read():
                reporter.log(line.source, line.number, line.line)
            if not follow:
                return
            session.patience.pause(session.patience.period_s)


def down(
    now: Annotated[bool, typer.Option("--now", help="cut off what runs instead of draining it")] = False,
    name: NameOption = None,
    address: AddressOption = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="seconds until what has not ended is ended at once")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """End a deployment: drain it, end all that belongs to it, and the Ray that `up` started for it.

    Works with or without a controller, and may be repeated. Ctrl-C ends all at once; a second one leaves the rest to
    another `slipstream down`.
    """
    from ..controller.cluster import ClusterError
    from ..controller.operator import NoCluster, OwnRaySilent
    from .local import end_own_ray
    from .reporter import Ending
    from .session import EXIT_DONE
    from .status import which

    with _exits(as_json) as reporter:
        try:
            with _session(address, reporter, ends_ray=True) as session:
                found = which(session.operator, name)
                if found is not None:
                    _end(reporter, _take_down(session, found, now=now, timeout_s=timeout))
        except NoCluster:
            # Then nothing can run on it.
            pass
        except OwnRaySilent as error:
            if not now:
                raise ClusterError(f"{error}; slipstream down --now ends it, and with it all that it runs") from error
            end_own_ray()
            text = "the Ray of this machine did not answer and was ended, with all that ran on it"
            _end(reporter, Ending(exit_code=EXIT_DONE, outcome="down", text=text))
        _end(reporter, Ending(exit_code=EXIT_DONE, outcome="nothing", text="nothing runs"))


# ------------------------------------------------------------------ staying and ending


def _stay(session: Session, name: str, follow: Callable[[], Ending]) -> Ending:
    """Wait until a deployment serves, stay until told to end, and take it down."""
    from ..ending import ending_on_signals
    from .reporter import Ending
    from .session import EXIT_DONE

    reporter, failed = session.reporter, None
    try:
        with ending_on_signals():
            ending = follow()
            serves = ending.status is not None and any(pool.serving for pool in ending.status.pools)
            if serves or ending.exit_code == EXIT_DONE:
                reporter.serving(ending)
                reporter.say("Ctrl-C takes it down")
                session.watcher(name).until(lambda _: None, timeout_s=float("inf"))
            failed = ending
    except KeyboardInterrupt:
        reporter.say("taking it down; Ctrl-C again cuts off what runs")
    except SystemExit:
        reporter.say("taking it down")
    ended = _take_down(session, name, now=False, timeout_s=None)
    if failed is None:
        return ended
    return Ending(exit_code=failed.exit_code, outcome=failed.outcome, text=f"{failed.text}\n{ended.text}")


def _take_down(session: Session, name: str, *, now: bool, timeout_s: float | None) -> Ending:
    """End a deployment; when interrupted at once; when interrupted again not at all."""
    from .down import down as end

    try:
        return end(session, name, now=now, timeout_s=timeout_s)
    except KeyboardInterrupt:
        session.reporter.say("ending all at once; Ctrl-C again leaves the rest to another `slipstream down`")
        return end(session, name, now=True, timeout_s=timeout_s)


# ------------------------------------------------------------------ around every command


def _deployment(session: Session, name: str | None) -> str:
    from .session import NothingRuns
    from .status import which

    found = which(session.operator, name)
    if found is None:
        raise NothingRuns("nothing runs: slipstream up FILE starts a deployment")
    return found


@contextmanager
def _session(
    address: str | None, reporter: Reporter, *, starts_ray: bool = False, ends_ray: bool = False
) -> Iterator[Session]:
    """Reach the platform for as long as a block runs; the Ray of this machine ends after it, if nothing needs it."""
    from .local import unneeded_ray
    from .session import Session

    end_ray = None
    try:
        with (
            # Ray tells of its workers on standard output, where others read what we tell.
            redirect_stdout(sys.stderr),
            reach_operator(address, start=starts_ray, announce=reporter.say) as operator,
        ):
            try:
                yield Session(operator=operator, reporter=reporter, patience=real_patience())
            finally:
                end_ray = unneeded_ray(operator) if ends_ray else None
    finally:
        # Not before nobody is connected to it.
        if end_ray is not None and end_ray():
            reporter.say("the Ray of this machine has ended too")


@contextmanager
def _exits(as_json: bool) -> Iterator[Reporter]:
    """Turn what goes wrong into exit codes, and a line that says what it was."""
    from .reporter import Ending
    from .screen import make_reporter
    from .session import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED

    output = sys.stdout
    reporter = make_reporter(
        as_json=as_json,
        write=lambda text: typer.echo(text, file=output),
        complain=lambda text: typer.echo(text, err=True),
    )
    try:
        yield reporter
    except (ConfigError, CheckpointError) as error:
        _end(reporter, Ending(exit_code=EXIT_REFUSED, outcome="refused", text=f"error: {error}"))
    except (SlipstreamError, OSError) as error:
        _end(reporter, Ending(exit_code=EXIT_FAILED, outcome="failed", text=f"error: {error}"))
    except KeyboardInterrupt:
        text = "interrupted; what was asked for goes on: `slipstream status` shows it, `slipstream down` ends it"
        _end(reporter, Ending(exit_code=EXIT_INTERRUPTED, outcome="interrupted", text=text))
    finally:
        reporter.close()


def _asked() -> Ending:
    from .reporter import Ending

    return Ending(exit_code=0, outcome="asked", text="asked for; `slipstream status` shows how far it is")


def _end(reporter: Reporter, ending: Ending) -> NoReturn:
    reporter.end(ending)
    raise typer.Exit(ending.exit_code)
