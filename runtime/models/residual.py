"""The residual stream of a pass: what attentions and MLPs add to it, and what the next one reads of it.

Owns what follows a module, an attention or an MLP: the sum over ranks, the addition and the norm, and when each is
done. The decoder says what comes after what, and does not know which way it goes:

- ``WholeResidual``: every rank sums and normalizes all tokens. Where the next module reads the residual without what
  this one adds (a ladder), the sum stays on the wire while that one computes.
- ``ResidualInShares``: each rank sums and normalizes its share of the tokens (``comm.reduce_norm``).

Shapes: T tokens, H hidden size, S a rank's share of the tokens.
Source: Ladder-residual (arXiv 2501.06589), section 3
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...comm.collectives import Collectives, Work
from ...comm.overlap import Begun, Parts, Steps
from ...comm.reduce_norm import gather_shares, own_share, reduce_add_norm, reduce_to_share
from ...kernels.norm import add_rms_norm, rms_norm
from ...kernels.norm_quantized import add_rms_norm_quantized, rms_norm_quantized
from ...kernels.quantize_rows import ByteRows
from .parallel import Output


class Residual(Protocol):
    """What a pass has added up so far."""

    def add(
        self, output: Output, norm_H: Tensor, *, ladder: bool, takes: torch.dtype | None = None
    ) -> Steps[Tensor | ByteRows]:
        """Add a module's output, and return what the next module reads: of all tokens, normalized.

        ``ladder``: that one reads the residual as it was before this output. ``takes``: 8-bit numbers that it would
        turn all it reads into; it may get them at once.

        Shapes: norm_H [hidden]; returns [tokens, hidden]
        """
        ...

    def end(self, output: Output, *, ladder: bool) -> Parts:
        """Add the last output of a stage, and return what the next stage opens its residual with.

        Shapes: returns [tokens, hidden], with ``ladder`` [tokens, 2 * hidden]
        """
        ...


@dataclass(frozen=True, slots=True)
class _Late:
    """An output that is not added yet: whole, or a sum on the wire, and what it is normalized with then."""

    x_TH: Tensor | Work
    end_norm_H: Tensor | None

    def settled(self, epsilon: float) -> Parts:
        """Return what is to be added."""
        x_TH = self.x_TH if isinstance(self.x_TH, Tensor) else (yield self.x_TH)
        return x_TH if self.end_norm_H is None else rms_norm(x_TH, self.end_norm_H, epsilon)


class WholeResidual:
    """All tokens' residual, on every rank; what a ladder leaves out is added one module later."""

    def __init__(self, residual_TH: Tensor, late_TH: Tensor | None, *, epsilon: float) -> None:
        self._residual_TH = residual_TH
        self._epsilon = epsilon
        self._late: deque[_Late] = deque([] if late_TH is None else [_Late(late_TH, None)])
        """Outputs that are not added yet, the oldest first."""

    def add(
        self, output: Output, norm_H: Tensor, *, ladder: bool, takes: torch.dtype | None = None
    ) -> Steps[Tensor | ByteRows]:
        """As ``Residual.add``."""
        due_TH = yield from self._due(output, ladder=ladder)
        if due_TH is None:
            return normalized_for(takes, self._residual_TH, norm_H, self._epsilon)
        if takes is not None:
            values_TH, scales_T1, self._residual_TH = add_rms_norm_quantized(
                due_TH, self._residual_TH, norm_H, self._epsilon, takes
            )
            return ByteRows(values_TH, scales_T1, due_TH.dtype)
        normed_TH, self._residual_TH = add_rms_norm(due_TH, self._residual_TH, norm_H, self._epsilon)
        return normed_TH

    def end(self, output: Output, *, ladder: bool) -> Parts:
        """As ``Residual.end``; a ladder's next stage gets the last output by itself."""
        due_TH = yield from self._due(output, ladder=ladder)
        residual_TH = self._residual_TH if due_TH is None else self._residual_TH + due_TH
        if not ladder:
            return residual_TH
        late_TH = yield from self._late.popleft().settled(self._epsilon)
        return torch.cat((residual_TH, late_TH), dim=1)

    def _due(self, output: Output, *, ladder: bool) -> Steps[Tensor | None]:
        """Take an output in, and return what is to be added before the next module reads, if there is anything."""
        late: Tensor | Work = output.x_TH
        if output.group is not None:
            late = output.group.all_reduce(output.x_TH)
            if ladder or self._late:
                yield Begun(late)
        self._late.append(_Late(late, output.end_norm_H))
        due_TH = None
        while len(self._late) > int(ladder):
            if due_TH is not None:
                self._residual_TH = self._residual_TH + due_TH
            due_TH = yield from self._late.popleft().settled(self._epsilon)
        return due_TH


class ResidualInShares:
    """Each rank of ``group`` has its share of the tokens' residual, which no rank needs whole."""

    def __init__(self, group: Collectives, residual_TH: Tensor, *, epsilon: float) -> None:
        self._group = group
        self._residual_SH = own_share(group, residual_TH)
        self._epsilon = epsilon

    def add(
        self, output: Output, norm_H: Tensor, *, ladder: bool, takes: torch.dtype | None = None
    ) -> Steps[Tensor | ByteRows]:
        """As ``Residual.add``, as numbers of any bits; an output that is whole is added without being sent."""
        assert not ladder, "ladders keep their residual whole"
        if output.group is not None and output.end_norm_H is None:
            normed_TH, self._residual_SH = yield from reduce_add_norm(
                self._group, output.x_TH, self._residual_SH, norm_H, self._epsilon, sharded=True
            )
            return normed_TH
        own_SH = yield from self._own(output)
        normed_SH, self._residual_SH = add_rms_norm(own_SH, self._residual_SH, norm_H, self._epsilon)
        return (yield from gather_shares(self._group, normed_SH, output.x_TH.shape[0]))

    def end(self, output: Output, *, ladder: bool) -> Parts:
        """As ``Residual.end``: the next stage gets all shares."""
        assert not ladder, "ladders keep their residual whole"
        own_SH = yield from self._own(output)
        return (yield from gather_shares(self._group, self._residual_SH + own_SH, output.x_TH.shape[0]))

    def _own(self, output: Output) -> Parts:
        """Return this rank's share of what is to be added."""
        if output.group is not None:
            own_SH = yield from reduce_to_share(self._group, output.x_TH)
        else:
            own_SH = own_share(self._group, output.x_TH)
        return own_SH if output.end_norm_H is None else rms_norm(own_SH, output.end_norm_H, self._epsilon)


def normalized_for(takes: torch.dtype | None, x_TH: Tensor, norm_H: Tensor, epsilon: float) -> Tensor | ByteRows:
    """Return what a module reads of a residual to which nothing is added; ``takes`` as in ``Residual.add``.

    Shapes: x_TH [tokens, hidden]; norm_H [hidden]; returns [tokens, hidden]
    """
    if takes is None:
        return rms_norm(x_TH, norm_H, epsilon)
    return ByteRows(*rms_norm_quantized(x_TH, norm_H, epsilon, takes), x_TH.dtype)


def open_residual(
    hidden_TH: Tensor, *, hidden_size: int, epsilon: float, shares: Collectives | None
) -> tuple[Residual, Tensor]:
    """Begin a stage's residual with the embedding, or with what the stage before has returned from ``Residual.end``.

    Returns it, and what its first module reads before the norm. ``shares``: the ranks that keep it in shares.

    Shapes: hidden_TH [tokens, hidden], or [tokens, 2 * hidden] where a ladder crosses stages; returns [tokens, hidden]
    """
    if shares is not None:
        return ResidualInShares(shares, hidden_TH, epsilon=epsilon), hidden_TH
    residual_TH, *late = (half_TH.contiguous() for half_TH in hidden_TH.split(hidden_size, dim=1))
    return WholeResidual(residual_TH, late[0] if late else None, epsilon=epsilon), residual_TH
