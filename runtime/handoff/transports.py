"""Which transports a rank has: a table of kinds. What each does is in ``comm/kv``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ...comm.errors import CommMisuse
from ...comm.kv.channel import Carrier
from ...comm.kv.layout import KvOffer
from ...comm.kv.memory import KvStore
from ...comm.kv.nixl import Nixl
from ...comm.kv.shm import Shm
from ...comm.kv.streams import StreamTransport
from ...comm.kv.tcp import Tcp
from ...comm.kv.transport import Events, Gate
from ..clock import Clock
from .settings import KvSeat, KvShare

_CARRIERS: dict[str, Callable[[], Carrier]] = {"shm": Shm, "tcp": Tcp, "nixl": Nixl}


def check_kinds(kinds: tuple[str, ...], address: str, *, across_hosts: bool) -> None:
    """Refuse transports that there are not, and an address at which other replicas cannot reach this one.

    Raises: CommMisuse
    """
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= _CARRIERS.keys():
        raise CommMisuse(f"KV goes by some of {', '.join(_CARRIERS)}, each once, got {', '.join(kinds) or 'none'}")
    if not set(kinds) <= {"shm"}:
        Tcp().check_address(any_port(address), across_hosts=across_hosts)


def open_transports(
    share: KvShare,
    seat: KvSeat,
    offer: KvOffer,
    gate: Gate,
    memory: KvStore,
    *,
    folder: Path,
    events: Events,
    clock: Clock,
) -> dict[str, StreamTransport]:
    """Listen with every kind of transport that the replica has, and let others in; ``folder``: for sockets with names.

    Raises: CommMisuse
    """
    with ExitStack() as undo:
        opened: dict[str, StreamTransport] = {}
        for kind in share.kinds:
            local = kind == "shm"
            transport = StreamTransport(
                _CARRIERS[kind](),
                offer,
                gate,
                address=f"unix:{folder / kind}" if local else any_port(seat.address),
                secret=seat.secret,
                clock=clock,
                limits=share.limits.streams_of(),
                across_hosts=share.across_hosts and not local,
                events=events,
            )
            undo.callback(transport.close)
            opened[kind] = transport
        for transport in opened.values():
            transport.register(memory)
        undo.pop_all()
    return opened


def any_port(host: str) -> str:
    """Return where to listen at a host, on any free port."""
    return f"[{host}]:0" if ":" in host else f"{host}:0"
