"""A deployment on a terminal: tables of pools, replicas and gateways, a tree of nodes with the ranks on them.

While a command waits they are drawn anew with every look, below the lines that tell what has happened.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from ..controller.controller import RankStatus, ReplicaStatus
from ..controller.gateway_keeper import GatewayState
from ..reconcile.adopt import Phase
from ..reconcile.observed import RankState
from .progress import Event
from .reporter import Ending, JsonLines, Lines, Reporter, Write
from .status import DeploymentStatus

_FRAMES_PER_S = 4
_COLORS: dict[str, str] = {
    Phase.READY: "green",
    Phase.BROKEN: "red",
    RankState.FAILED: "red",
    RankState.LOST: "red",
    GatewayState.PAUSED: "red",
}
_PIPED_COLUMNS = 200


def status_text(status: DeploymentStatus) -> str:
    """Return a status as plain text, in lines as wide as they need to be."""
    console = Console(file=StringIO(), highlight=False, width=_PIPED_COLUMNS, force_terminal=False)
    with console.capture() as captured:
        console.print(status_view(status))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def status_view(status: DeploymentStatus) -> RenderableType:
    """Return all that is to be seen of a deployment."""
    parts: list[RenderableType] = [_head(status), _pools(status)]
    if status.replicas:
        parts.append(_replicas(status))
    if status.gateways:
        parts.append(_gateways(status))
    parts.append(_tree(status))
    parts += [f"[red]missing[/red] pool {escape(each.pool)}: {escape(each.why)}" for each in status.shortages]
    if status.problem:
        parts.append(f"[red]problem[/red] {escape(status.problem)}")
    return Group(*parts)


class LiveScreen:
    """A ``Reporter`` on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def show(self, status: DeploymentStatus, happened: Iterable[Event]) -> None:
        """Tell what has happened, and draw the status below it."""
        self.events(happened)
        if self._live is None:
            # Nothing is left of it when the command has ended: its lines are.
            self._live = Live(console=self._console, refresh_per_second=_FRAMES_PER_S, transient=True)
            self._live.start()
        self._live.update(status_view(status))

    def events(self, happened: Iterable[Event]) -> None:
        """Tell what has happened."""
        for event in happened:
            self._console.print(escape(event.text), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def status(self, status: DeploymentStatus) -> None:
        """Show a status."""
        self._console.print(status_view(status))

    def log(self, source: str, number: int, line: str) -> None:
        """Show a line of a process."""
        self.say(f"{source} | {line}")

    def serving(self, ending: Ending) -> None:
        """Show where it serves."""
        self.say(ending.text)

    def end(self, ending: Ending) -> None:
        """Show the last status and how it has ended."""
        self.close()
        if ending.status is not None and ending.status.pools:
            self.status(ending.status)
        color = "red" if ending.exit_code else "green"
        self._console.print(f"[{color}]{escape(ending.text)}[/{color}]", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_reporter(*, as_json: bool, write: Write, complain: Write) -> Reporter:
    """Return what a command tells through: JSON, a terminal, or lines where nobody looks."""
    if as_json:
        return JsonLines(write)
    # Bound to what is standard output now, wherever that leads later.
    console = Console(file=sys.stdout, highlight=False)
    return LiveScreen(console) if console.is_terminal else Lines(write, complain, status_text)


def _head(status: DeploymentStatus) -> str:
    model = f"{', '.join(status.served_names)} ({status.model})" if status.model else "no model"
    lines = [f"[bold]{escape(status.name)}[/bold]  {escape(model)}  view {status.epoch}  Ray at {status.ray}"]
    if not status.controller:
        why = escape(status.controller_detail)
        lines.append(f"[red]the controller is down[/red] ({why}); what serves goes on, this is what the ledger has")
    return "\n".join(lines)


def _pools(status: DeploymentStatus) -> Table:
    table = _table("pool", "role", "degrees", "generation", "wanted", "serving", "coming", "leaving", "failed starts")
    for pool in status.pools:
        degrees = pool.degrees
        cut = " ".join(f"{axis}={getattr(degrees, axis)}" for axis in ("pp", "ep", "tp") if getattr(degrees, axis) > 1)
        serving = _colored(str(pool.serving), "green" if pool.serving == pool.wanted else "yellow")
        table.add_row(
            escape(pool.pool), pool.role, cut or "tp=1", pool.generation, str(pool.wanted), serving,
            str(pool.coming), str(pool.leaving), str(pool.failures),
        )  # fmt: skip
    return table


def _replicas(status: DeploymentStatus) -> Table:
    table = _table(
        "replica", "role", "generation", "phase", "in view", "requests", "transfers", "address", "devices", "why"
    )
    for each in status.replicas:
        table.add_row(
            escape(each.replica), each.role, each.generation, _state(each.phase), "yes" if each.routed else "no",
            str(each.requests), str(each.transfers), each.address, escape(", ".join(each.devices)), escape(each.why),
        )  # fmt: skip
    return table


def _gateways(status: DeploymentStatus) -> Table:
    table = _table("gateway", "node", "state", "url", "starts", "last ended")
    for each in status.gateways:
        url = f"http://{each.address}/v1" if each.address else ""
        table.add_row(each.name, escape(each.node), _state(each.state), url, str(each.starts), escape(each.detail))
    return table


def _tree(status: DeploymentStatus) -> Tree:
    """Return nodes with their devices and who is on them."""
    on: dict[str, list[tuple[ReplicaStatus, RankStatus]]] = defaultdict(list)
    for replica in status.replicas:
        for rank in replica.ranks:
            on[rank.device].append((replica, rank))
    devices = {node.name: [f"{node.name}/{index}" for index in range(node.devices)] for node in status.nodes}
    for device in on:
        # A node that cannot be seen may still have ranks.
        of_node = devices.setdefault(device.rpartition("/")[0], [])
        if device not in of_node:
            of_node.append(device)
    facts = {node.name: f" at {node.address}, {node.device_type}" for node in status.nodes}
    tree = Tree("nodes")
    for name, listed in devices.items():
        drained = " [yellow]drained[/yellow]" if name in status.cordoned else ""
        branch = tree.add(f"{escape(name)}{escape(facts.get(name, ' (not seen)'))}{drained}")
        for device in listed:
            ranks = ", ".join(_rank(replica, rank) for replica, rank in on[device])
            branch.add(f"{escape(device)}  {ranks or 'free'}")
    return tree


def _rank(replica: ReplicaStatus, rank: RankStatus) -> str:
    share = f" {rank.loaded:.0%}" if rank.state == RankState.LOADING else ""
    return f"{escape(replica.replica)} rank {rank.rank}: {_state(rank.state)}{share}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> str:
    return _colored(state, _COLORS.get(state, "yellow"))


def _colored(text: str, color: str) -> str:
    return f"[{color}]{escape(text)}[/{color}]"
