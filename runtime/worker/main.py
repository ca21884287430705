"""The driver process: ``python -m slipstream.runtime.worker.main --socket PATH MODEL``.

Launches the engine, serves it over gRPC and prints one line of JSON, ``{"ready": true, "address": ...}``, when requests
are taken. The first SIGTERM or SIGINT drains: requests that run may finish within ``--drain-timeout``, new ones are
refused; a second signal stops at once. The process ends when the one that started it does.

With ``--role`` or ``--kv-transport`` requests are split between it and other replicas; see ``kv_options``.
With ``--rank`` it is one rank of a replica whose others somebody else starts, and rank 0 is the driver; see
``placed_rank``. Exit status: see ``exit_status``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import threading
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import uvloop

from ...sdk.errors import CheckpointError, ConfigError, EngineError, EngineUnavailable
from ..clock import monotonic_clock
from ..config import EngineOptions
from ..rpc.engine_client import EngineFacts
from ..rpc.in_process import InProcessEngineClient
from ..rpc.kv_client import GrpcKvTalker
from ..rpc.kv_talk import KvHost
from ..rpc.secret import secret_from
from ..rpc.server import EngineServer
from ..rpc.tls import tls_from
from .driver import DriverLimits, EngineLoop
from .exit_status import EXIT_DRAINED, EXIT_ENGINE_FAILED, EXIT_REFUSED, EXIT_STOPPED
from .keeper_pipe import KeeperPipe
from .kv_desk import open_desk
from .kv_options import add_kv_options, check_kv_options, kv_settings, kv_transport, transfer_limits
from .null_engine import NullEngineOptions, launch_null_engine

if TYPE_CHECKING:
    from .placed_rank import Placed

# Text is the gateway's business; the tokenizer's vocabulary is needed where grammars are followed.
_NOT_FOR_A_DRIVER = ("model", "skip_tokenizer_init")
_PARENT_PERIOD_S = 1.0
_STOP_TIMEOUT_S = 5.0
_MEET_TIMEOUT_S = 10.0
# The step loop and the server's event loop share the interpreter: this bounds how long one makes the other wait.
_SWITCH_INTERVAL_S = 0.001


def main(arguments: list[str] | None = None) -> int:
    """Run a driver until it is told to stop; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if options.exit_with_parent:
        _exit_with_parent()
    if options.rank is not None:
        pipe = KeeperPipe(sys.stdin.fileno(), lambda: os._exit(EXIT_STOPPED))
        if options.rank > 0:
            return _be_other_rank(options, pipe)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            driver = _launch_null(options) if options.null else _launch(options, runner.get_loop())
            loop = driver.loop
            loop.start()
            status = runner.run(_serve(driver, options.socket or options.listen, options.drain_timeout))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # A thread may still wait for the rank that is missing, and end much later.
        os._exit(EXIT_ENGINE_FAILED)
    if not loop.close(timeout_s=0.0):
        # A step that does not end holds a thread that cannot be joined: leave it behind.
        os._exit(status)
    return status


@dataclass(frozen=True, slots=True, kw_only=True)
class _Driver:
    """What is served. ``lines``: where other drivers call, None where KV is never moved."""

    loop: EngineLoop
    lines: KvHost | None = None


async def _serve(driver: _Driver, address: str, drain_timeout_s: float) -> int:
    """Serve until a signal or the engine's end; return the exit status."""
    signals, loop = _Signals(), driver.loop
    own = InProcessEngineClient(loop)
    await own.connect(timeout_s=_MEET_TIMEOUT_S)
    server = EngineServer(loop, address, kv=driver.lines, secret=secret_from(os.environ), tls=tls_from(os.environ))
    shown = await server.start()
    print(json.dumps({"ready": True, "address": shown}), flush=True)
    try:
        await _first_of(signals.first.wait(), own.wait_lost())
        if not signals.first.is_set():
            return EXIT_ENGINE_FAILED
        await server.set_serving(False)
        try:
            await _first_of(signals.second.wait(), own.drain(timeout_s=drain_timeout_s))
        except EngineUnavailable:
            return EXIT_ENGINE_FAILED
        return EXIT_STOPPED if signals.second.is_set() else EXIT_DRAINED
    finally:
        # The sessions end with the loop, after what they have not read yet; the server gives them time for it.
        patience_s = 0.0 if signals.second.is_set() else _STOP_TIMEOUT_S
        await asyncio.to_thread(loop.close, timeout_s=patience_s)
        await server.stop(grace_s=patience_s)
        await own.close()


class _Signals:
    """The first SIGTERM or SIGINT, and the second."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._note)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _first_of(*waits: Any) -> None:
    """Wait until one of these has ended, raising what it raised, and leave the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


# ------------------------------------------------------------------ engines


def _launch(options: argparse.Namespace, event_loop: asyncio.AbstractEventLoop) -> _Driver:
    # Only here: a driver without a model starts without torch.
    from .launch import launch_engine
    from .placed_rank import launch_placed

    kv = kv_settings(options)
    given = {name: getattr(options, name) for name in _engine_options() if getattr(options, name) is not None}
    engine_options = EngineOptions(model=options.model, **given)
    if options.rank is None:
        launched = launch_engine(engine_options, clock=monotonic_clock, kv=kv)
    else:
        launched = launch_placed(engine_options, _placed(options), kv=kv)
    opened = None
    if kv is not None:
        ranks = launched.kv
        assert ranks is not None, "an engine that is launched with KV settings has ranks that move it"
        opened = open_desk(
            kv,
            ranks,
            launched.engine,
            GrpcKvTalker(event_loop, secret=secret_from(os.environ), tls=tls_from(os.environ)),
            vocab_size=launched.spec.vocab_size,
            clock=monotonic_clock,
            limits=transfer_limits(options, block_bytes=launched.block_bytes),
        )
    role = options.role or "mixed"
    facts = EngineFacts(
        epoch=secrets.token_hex(8),
        replica=options.replica or "",
        model=options.model,
        vocab_size=launched.spec.vocab_size,
        max_model_len=launched.config.max_model_len,
        max_num_seqs=launched.config.max_num_seqs,
        eos_token_ids=launched.eos_token_ids,
        dtype=str(launched.dtype).removeprefix("torch."),
        device=str(launched.device),
        role=role,
        block_size=launched.config.block_size,
        rope_threshold=launched.spec.rope.prompt_length_threshold,
        sends_kv=kv is not None and role != "decode",
        receives_kv=kv is not None and role != "prefill",
    )
    loop = EngineLoop(
        launched.engine,
        facts,
        clock=monotonic_clock,
        limits=DriverLimits(max_sessions=options.max_sessions),
        compiler=launched.grammars,
        check=launched.check,
        desk=None if opened is None else opened.desk,
    )
    return _Driver(loop=loop, lines=None if opened is None else opened.lines)


def _launch_null(options: argparse.Namespace) -> _Driver:
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_queued_requests")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    null = NullEngineOptions(vocab_size=options.null_vocab_size, step_time_s=options.null_step_time, **given)
    engine = launch_null_engine(null, clock=monotonic_clock)
    facts = EngineFacts(
        epoch=secrets.token_hex(8),
        replica=options.replica or "",
        model=options.model or "null",
        vocab_size=null.vocab_size,
        max_model_len=null.max_model_len,
        max_num_seqs=null.max_num_seqs,
        eos_token_ids=(),
        dtype="none",
        device="none",
        role=options.role or "mixed",
        block_size=engine.scheduler.config.block_size,
    )
    limits = DriverLimits(max_sessions=options.max_sessions)
    return _Driver(loop=EngineLoop(engine, facts, clock=monotonic_clock, limits=limits))


def _be_other_rank(options: argparse.Namespace, pipe: KeeperPipe) -> int:
    from .placed_rank import run_placed

    return run_placed(_placed(options), pipe)


def _placed(options: argparse.Namespace) -> Placed:
    from .placed_rank import Placed
    from .rank_order import Seat

    return Placed(
        replica=options.replica,
        seat=Seat(
            rank=options.rank,
            address=options.address,
            ranks_on_host=options.ranks_on_host,
            kv_address=options.kv_address,
        ),
        start_timeout_s=options.start_timeout,
        comm_timeout_s=options.comm_timeout,
    )


# ------------------------------------------------------------------ options


def _parser() -> argparse.ArgumentParser:
    description = "Serve one engine to gateways, over gRPC."
    parser = argparse.ArgumentParser(prog="python -m slipstream.runtime.worker.main", description=description)
    parser.allow_abbrev = False
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory; with --null a name", nargs="?")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on a unix socket")
    where.add_argument("--listen", metavar="HOST:PORT", help="listen on an address; port 0 takes any free one")
    parser.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="S", help="seconds (default: 30)")
    parser.add_argument("--max-sessions", type=int, default=64, metavar="N", help="gateways at once (default: 64)")
    parser.add_argument(
        "--exit-with-parent",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stop at once when the process that started this one ends (default: yes)",
    )
    _add_placed(parser)
    add_kv_options(parser)
    null = parser.add_argument_group("without a model")
    null.add_argument(
        "--null", action="store_true", help="an engine that draws tokens from a hash, to measure the rest"
    )
    null.add_argument("--null-vocab-size", type=int, default=32_000, metavar="N")
    null.add_argument("--null-step-time", type=_seconds, default=0.0, metavar="S", help="seconds a step takes")
    engine = parser.add_argument_group("engine options, as of LLM")
    for name, kind in _engine_options().items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            engine.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            engine.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper())
    return parser


def _add_placed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("one rank of a replica, whose other ranks somebody else starts")
    group.add_argument("--replica", metavar="NAME", help="the replica's name")
    group.add_argument("--rank", type=int, metavar="R", help="which of its ranks; 0 is the driver")
    group.add_argument("--address", metavar="HOST", help="this node's address, by which the other ranks reach it")
    group.add_argument("--ranks-on-host", type=int, metavar="N", help="how many of its ranks are on this host")
    group.add_argument(
        "--start-timeout", type=_seconds, default=600.0, metavar="S", help="until all are ready (default: 600)"
    )
    group.add_argument(
        "--comm-timeout", type=_seconds, default=60.0, metavar="S", help="a rank waits for another (default: 60)"
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.model is None and not options.null:
        parser.error("MODEL is missing: give a Hugging Face directory, or --null")
    if options.socket is None and options.listen is None and not options.rank:
        parser.error("one of the arguments --socket --listen is required")
    given = [name for name in ("rank", "address", "ranks_on_host") if getattr(options, name) is not None]
    alone = options.role is not None or kv_transport(options) != "none"
    if (options.replica is not None and not given and not alone) or (given and (len(given) < 3 or not options.replica)):
        parser.error("--replica, --rank, --address and --ranks-on-host belong together")
    check_kv_options(parser, options)
    if given and (options.rank < 0 or options.ranks_on_host < 1):
        parser.error("--rank counts from 0, --ranks-on-host from 1")
    if options.null and options.rank:
        parser.error("--null is an engine of one rank")


def _engine_options() -> dict[str, type]:
    """Return the engine's options: name → the type of its value. None, where it is allowed, is left unsaid."""
    kinds: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
    options = [field for field in fields(EngineOptions) if field.name not in _NOT_FOR_A_DRIVER]
    return {field.name: kinds[str(field.type).partition(" ")[0]] for field in options}


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _exit_with_parent() -> None:
    """End this process soon after its parent has, whatever it is doing: nobody would be left to stop it."""
    parent, never = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            never.wait(_PARENT_PERIOD_S)
        os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, name="slipstream-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
