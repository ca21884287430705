"""A rank whose process somebody else has started, beside other ranks on other nodes: what its keeper hears and says.

    standard output   {"loaded": 0.35} time and again; the driver {"meeting": line} once the others may come;
                      {"ready": true}, which the driver says itself, with its address
    standard input    the driver's line, for every other rank; its end ends the process: nobody keeps it any more

Whatever a rank opens, it opens at its node's own address. Who connects proves the secret that all of them have from
their environment. What a rank does is ``rank_life``'s, what the driver does with the others ``bus_peers``'.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial

import psutil

from ...comm.errors import CommError, CommMisuse, HandshakeRefused
from ...comm.handshake import SECRET_VARIABLE, Identity, secret_from
from ...comm.step_listener import StepListener
from ...sdk.errors import CheckpointError, ConfigError
from ..clock import monotonic_clock
from ..config import EngineOptions
from ..handoff.settings import KvSettings
from .exit_status import EXIT_DRAINED, EXIT_ENGINE_FAILED, EXIT_REFUSED
from .keeper_pipe import KeeperPipe
from .launch import LaunchedEngine, check_own_gpu, launch_engine
from .placed_peers import PlacedPeers, any_port
from .rank import RankSetup
from .rank_life import live
from .rank_order import RankOrder, Seat

_LOADED_LINES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placed rank's own part of the command line.

    Units: as of ``BusPeers``
    """

    replica: str
    seat: Seat
    start_timeout_s: float
    comm_timeout_s: float


def launch_placed(options: EngineOptions, placed: Placed, *, kv: KvSettings | None = None) -> LaunchedEngine:
    """Launch the engine of a replica as its rank 0, and say where the other ranks come; ``kv``: as ``launch_engine``.

    Raises: as ``launch_engine``
    """
    check_address(placed.seat.address)
    _use_interface(placed.seat.address)

    def start_peers(setup: RankSetup) -> PlacedPeers:
        return PlacedPeers(
            setup,
            identity=_identity(placed),
            seat=placed.seat,
            announce=lambda line: say(meeting=line),
            start_timeout_s=placed.start_timeout_s,
            comm_timeout_s=placed.comm_timeout_s,
        )

    return launch_engine(
        options,
        clock=monotonic_clock,
        start_peers=start_peers,
        ranks_on_host=placed.seat.ranks_on_host,
        progress=LoadedLines(),
        kv=kv,
    )


def run_placed(placed: Placed, pipe: KeeperPipe) -> int:
    """Be a rank other than the driver's until the driver closes the bus; return the exit status."""
    rank = placed.seat.rank
    try:
        _identity(placed)
        check_address(placed.seat.address)
        _use_interface(placed.seat.address)
        order = RankOrder.from_json(pipe.line(placed.start_timeout_s))
        _check_order(order, placed)
        # The driver, which drains at a signal, still needs this rank then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        done = live(order, placed.seat, progress=LoadedLines(), on_ready=partial(say, ready=True))
        return EXIT_DRAINED if done else EXIT_ENGINE_FAILED
    except (ConfigError, CheckpointError, HandshakeRefused) as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except CommError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return EXIT_ENGINE_FAILED


class LoadedLines:
    """Says how much of a rank's weights is loaded: a ``Progress`` of few lines, however many weights there are."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, share: float) -> None:
        """Say a share, unless it is about the same as before."""
        step = int(share * _LOADED_LINES)
        if step > self._said:
            self._said = step
            say(loaded=round(share, 2))


def say(**what: object) -> None:
    """Print a line of JSON for whoever keeps this process."""
    print(json.dumps(what), flush=True)


def check_address(address: str) -> None:
    """Refuse an address that is none of this node's, or that other nodes do not reach it by. Raises: ConfigError"""
    try:
        unspecified = ipaddress.ip_address(address).is_unspecified
    except ValueError:
        unspecified = False  # a name
    if unspecified:
        raise ConfigError(
            "address", f"{address} is every address: give the one by which the other ranks reach this node"
        )
    try:
        StepListener(any_port(address)).close()
    except CommMisuse as error:
        raise ConfigError("address", f"must be this node's own: {error}") from error


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address, if any does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None


def _use_interface(address: str) -> None:
    """Have NCCL, which takes no address, use the interface of ours, unless somebody has chosen already."""
    if (name := interface_of(address)) is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _identity(placed: Placed) -> Identity:
    try:
        return Identity(replica=placed.replica, secret=secret_from(os.environ))
    except CommMisuse as error:
        raise ConfigError(SECRET_VARIABLE, str(error)) from error


def _check_order(order: RankOrder, placed: Placed) -> None:
    if order.replica != placed.replica:
        raise ConfigError("meeting", f"is of replica {order.replica!r}, this rank is of {placed.replica!r}")
    size = order.setup.mesh.size
    if not 1 <= placed.seat.rank < size:
        raise ConfigError("rank", f"{placed.seat.rank} is none of the other ranks of a replica of {size}")
    if order.setup.device == "cuda":
        check_own_gpu()
