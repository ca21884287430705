"""How the process of a driver or of a placed rank ends, as its exit status."""

from __future__ import annotations

EXIT_DRAINED = 0
"""All was done: a driver has drained, a rank's driver has closed the bus."""
EXIT_STOPPED = 1
"""It was stopped at once, or nobody keeps it any more."""
EXIT_REFUSED = 2
"""A wrong option, secret or checkpoint: another process would end the same way."""
EXIT_ENGINE_FAILED = 3
"""A step or a peer failed, which a new process can mend."""
