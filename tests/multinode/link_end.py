"""One end of a measured link, on a host of its own, as lines on standard output.

link_end listen ADDRESS TOKEN LIMITS     {"where": ...} at once; ends with standard input
link_end measure WHERE TOKEN LIMITS      a ``LinkAnswer``
"""

from __future__ import annotations

import sys

from slipstream.runtime.controller.link_actor import LinkActor


def main(what: str, where: str, token: str, limits: str) -> int:
    if what == "measure":
        print(LinkActor("", limits).measure(where, token), flush=True)
        return 0
    actor = LinkActor(where, limits)
    print(actor.listen(token), flush=True)
    sys.stdin.read()
    actor.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
