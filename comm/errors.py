"""What can go wrong between ranks.

    CommError           the message names the group, the operation and the rank that saw it
    ├── PeerLost        another rank ended, or its connection broke           blame: the peer or the network
    ├── CommTimeout     a rank did not take part within the deadline          blame: the peer or the network
    ├── GroupClosed     the group was closed, here or by a rank that failed   blame: whoever closed it
    ├── CommMisuse      shapes, counts or ranks that cannot be                blame: the caller
    │
    │   and, where messages rather than tensors pass:
    ├── HandshakeRefused  secret, version, replica or rank do not fit         blame: whoever configured the two
    ├── BadFrame        bytes that the protocol does not know, or too many    blame: the peer
    ├── StepGap         a rank missed or repeated a step                      blame: the peer, or the caller there
    ├── RankFailed      a rank could not carry out a step, and says why       blame: that rank
    ├── TooFarAhead     a rank is too many steps behind; nothing was sent     blame: nobody: collect results first
    │
    │   and, where KV passes from replica to replica:
    └── KvMismatch      the KV of one is not the KV of the other              blame: whoever joined the two

After any of the first three a group is dead: every later operation raises, and the ranks build a new one. So it is
after CommMisuse where ranks did not agree with one another, which only ``local_groups`` can see; what one rank sees
alone is refused before anything is sent, and the group lives on. A step bus is dead after any but CommMisuse,
RankFailed, TooFarAhead and a CommTimeout of one of its waits (``result``, ``next_step``), which may be called again.
"""

from __future__ import annotations


class CommError(Exception):
    """Base of everything that fails between ranks."""


class PeerLost(CommError):
    """A rank of the group ended, or its connection broke."""


class CommTimeout(CommError):
    """An operation was not complete within the deadline: some rank did not take part in time."""


class GroupClosed(CommError):
    """The group was closed before, or while, the operation ran."""


class CommMisuse(CommError):
    """An operation that no group could carry out: shapes, counts or ranks do not fit."""


class HandshakeRefused(CommError):
    """Who connected is not who may, or does not speak the same protocol."""


class BadFrame(CommError):
    """A peer sent what the protocol does not know, or more than it allows."""


class StepGap(CommError):
    """A rank missed a step or repeated one: its state is no longer the driver's."""


class RankFailed(CommError):
    """A rank could not carry out a step; ``rank`` and ``text`` are what it said."""

    def __init__(self, where: str, *, rank: int, seq: int, text: str) -> None:
        super().__init__(f"{where}: rank {rank} failed at step {seq}: {text}")
        self.rank = rank
        self.seq = seq
        self.text = text


class TooFarAhead(CommError):
    """The slowest rank is as many steps behind as is allowed; nothing was sent, and the bus lives."""


class KvMismatch(CommError):
    """Two replicas hold different models, or the same in different numbers: no KV can pass between them."""
