"""When Python looks for garbage in a gateway.

Reference counts free what a request held, all of it: a test sees to that. The collector only looks for cycles. By
default it looks each time 700 objects more are there than before, which a step of a thousand streams makes several
times over, and now and then at everything that was ever imported: together a tenth of the processor time, in pauses
that every stream waits for.
"""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 10_000
_YOUNG_ROUNDS = 10
# Whatever does make cycles, in a library perhaps, is found when it has left half a million objects.
_OLD_ROUNDS = 5


def collect_seldom() -> None:
    """Look for garbage seldom from now on, and never among what is there now. Call it once all is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, _YOUNG_ROUNDS, _OLD_ROUNDS)
