"""What every command works with: the platform, someone to tell, time; and how a command's end is put."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...sdk.errors import Blame, SlipstreamError
from ..controller.ledger import Deployment, Ledger
from ..controller.operator import Operator
from .follow import Followed, Outcome, Patience, Watcher
from .progress import missing
from .reporter import Ending, Reporter

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


class NothingRuns(SlipstreamError):
    """There is no deployment."""

    blame = Blame.CALLER


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One command's surroundings."""

    operator: Operator
    reporter: Reporter
    patience: Patience
    _watchers: dict[str, Watcher] = field(default_factory=dict)

    def ledger(self, name: str) -> Ledger:
        """Return a deployment's records."""
        return Ledger(self.operator.store, deployment=name)

    def watcher(self, name: str) -> Watcher:
        """Return who looks at a deployment and tells what is new to this command."""
        if name not in self._watchers:
            self._watchers[name] = Watcher(self.operator, name, self.reporter, self.patience)
        return self._watchers[name]

    def ask(self, name: str, wanted: Deployment) -> None:
        """Let the controller keep this from now on; one that has gone is started again. Raises: ClusterError"""
        if self.ledger(name).deployment().mark:
            self.watcher(name).begin_here()
        self.operator.start_controller(name, wanted)
        self.operator.want(name, wanted)

    def follow(self, name: str, wanted: Deployment, *, timeout_s: float, done: str) -> Ending:
        """Wait until a deployment is as wanted, and return how that ended. ``done``: what to say when it is."""
        return ending_of(self.watcher(name).until_as_wanted(wanted, timeout_s=timeout_s), done, timeout_s=timeout_s)


def ending_of(followed: Followed, done: str, *, timeout_s: float) -> Ending:
    """Return what a command ends with, with all that is missing."""
    status = followed.status
    if followed.outcome is Outcome.DONE:
        return Ending(exit_code=EXIT_DONE, outcome=followed.outcome, text=done, status=status)
    why = {
        Outcome.SHORT: "there is not room for all",
        Outcome.FAILING: "it does not come up: `slipstream status` and `slipstream logs` say more",
        Outcome.LATE: f"not all serves after {timeout_s:g} s",
    }[followed.outcome]
    text = "\n".join([f"{status.name}: {why}", *(f"  {line}" for line in missing(status))])
    return Ending(exit_code=EXIT_FAILED, outcome=followed.outcome, text=text, status=status)
