"""What can go wrong between ranks.

    CommError           the message names the group, the operation and the rank that saw it
    ├── PeerLost        another rank ended, or its connection broke           blame: the peer or the network
    ├── CommTimeout     a rank did not take part within the deadline          blame: the peer or the network
    ├── GroupClosed     the group was closed, here or by a rank that failed   blame: whoever closed it
    └── CommMisuse      shapes, counts or ranks that cannot be                blame: the caller

After any of the first three a group is dead: every later operation raises, and the ranks build a new one. So it is
after CommMisuse where ranks did not agree with one another, which only ``local_groups`` can see; what one rank sees
alone is refused before anything is sent, and the group lives on.
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
