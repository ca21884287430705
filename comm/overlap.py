"""Runs pieces of a forward pass that stop where they need other ranks: one alone, or several in turns.

A piece is a generator. Where it needs what a collective brings it yields the ``Work``, and is sent the result; what it
returns is the piece's result. With one rank it yields nothing. Its author writes a layer once, and knows nothing of
this module: whether a step runs whole, or as parts of its tokens that hide one another's wire time, is decided by
whoever runs it.

Several pieces take turns, in the order given: each runs until it yields, its work stays in flight while the others
compute, and is waited for when its turn comes again. What follows from that, and may be relied on:

- What piece k does between its yields i and i + 1 happens after what piece k - 1 does between *its* yields i and i + 1,
  and before what piece k - 1 does after that. So parts of a step's tokens, in order of position, may run the same
  layers: a layer's attention in part 2 finds the keys that part 1 wrote for it.
- Each rank starts its collectives in the same order, if each runs the same pieces in the same order. A cut must
  therefore be the same on all ranks.
- Between two yields nothing else runs: a piece may use a workspace that all share, but not keep it over a yield.

A piece that can go on computing beside its own work yields it as ``Begun``, is resumed at once, and yields the work
itself when it needs the result. That is no turn: what is said above of yields is said of waiting.

Source: TokenWeave (arXiv 2505.11329), section 3
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor

from .collectives import Work
from .errors import CommError
from .overlap_meter import OverlapMeter

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Begun:
    """Says that a work is in flight which the piece waits for later: should it fail, someone has to know of it.

    The work must not write to tensors that the piece still uses.
    """

    work: Work


Steps: TypeAlias = Generator[Work | Begun, Tensor, ResultT]
"""A piece of a forward pass: yields works, is sent their results, returns its own."""
Parts: TypeAlias = Steps[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """A moment by which all waits must have ended, on a clock.

    Units: at_s, seconds on ``clock``
    """

    at_s: float
    clock: Callable[[], float]

    def left_s(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self.at_s - self.clock())


def run_plain(steps: Steps[ResultT], *, deadline: Deadline | None = None, meter: OverlapMeter | None = None) -> ResultT:
    """Run one piece, waiting for each work at once; otherwise as ``run_interleaved``."""
    return run_interleaved((steps,), deadline=deadline, meter=meter)[0]


def run_interleaved(
    pieces: Sequence[Steps[ResultT]], *, deadline: Deadline | None = None, meter: OverlapMeter | None = None
) -> list[ResultT]:
    """Run pieces in turns, each computing while the others' works are in flight; return their results in order.

    A wait ends at ``deadline``, or at the group's own if there is none. Whatever fails, all pieces are closed and the
    works in flight are waited for before the error goes on, so that nothing writes to tensors any more; where only
    this rank failed, the others wait for it until their deadline, unless the caller closes the group.

    Raises: CommError as ``Work.wait``, and whatever a piece raises; with a note that says where
    """
    lanes = [_Lane(number, steps, deadline, meter) for number, steps in enumerate(pieces)]
    running = lanes
    try:
        while running:
            for lane in running:
                lane.advance()
            running = [lane for lane in running if not lane.results]
    except BaseException:
        if meter is not None:
            meter.forget()
        with ExitStack() as endings:
            # Runs the last one first: all are closed, then what is in flight is waited for, in order.
            for lane in reversed(lanes):
                endings.callback(lane.settle)
            for lane in reversed(lanes):
                endings.callback(lane.close)
        raise
    return [lane.results[0] for lane in lanes]


class _Lane(Generic[ResultT]):
    """One piece, the work that it waits for, those that it has begun besides, and its result once there is one."""

    def __init__(
        self, number: int, steps: Steps[ResultT], deadline: Deadline | None, meter: OverlapMeter | None
    ) -> None:
        self.results: list[ResultT] = []
        self._number = number
        self._steps = steps
        self._deadline = deadline
        self._meter = meter
        self._work: Work | None = None
        self._begun: list[Work] = []
        self._yields = 0

    def advance(self) -> None:
        """Wait for the piece's work, if it has one, and run it until it yields the next or returns."""
        try:
            received = None if self._work is None else self._wait(self._work)
            if self._meter is not None:
                self._meter.compute_begins()
            work = self._run_on(received)
        except StopIteration as stop:
            assert not self._begun, "a piece waits for all that it has begun"
            self.results.append(stop.value)
            work = None
        except BaseException as error:
            error.add_note(f"in piece {self._number} of a forward pass, after its communication {self._yields}")
            raise
        if self._meter is not None:
            self._meter.compute_ends(work)
        self._work = work
        self._yields += 1

    def close(self) -> None:
        self._steps.close()

    def settle(self) -> None:
        """Wait for what is in flight, whatever comes of it."""
        works = [*([] if self._work is None else [self._work]), *self._begun]
        self._work, self._begun = None, []
        for work in works:
            # Where waiting fails the group is dead and nothing is in flight; the error that led here says why.
            with suppress(CommError):
                work.wait(self._timeout_s())

    def _run_on(self, received: Tensor | None) -> Work:
        """Run the piece until it has to wait, and return for what."""
        # A generator that has not begun takes no value; ``next`` is ``send(None)``.
        said = next(self._steps) if received is None else self._steps.send(received)
        while isinstance(said, Begun):
            self._begun.append(said.work)
            if self._meter is not None:
                self._meter.begun(said.work)
            said = next(self._steps)
        self._begun = [work for work in self._begun if work is not said]
        return said

    def _wait(self, work: Work) -> Tensor:
        if self._meter is not None:
            self._meter.wait_begins(work)
        # Forgotten first: a work that failed is not waited for again.
        self._work = None
        received = work.wait(self._timeout_s())
        if self._meter is not None:
            self._meter.wait_ends(received)
        return received

    def _timeout_s(self) -> float | None:
        return None if self._deadline is None else self._deadline.left_s()
