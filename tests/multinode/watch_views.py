"""Prints who serves, whenever that changes: a line of JSON for each view, with the moment on the monotonic clock.

``python -P -m slipstream.tests.multinode.watch_views HOST:PORT``; the cluster's secret is in the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc.secret import secret_from
from slipstream.runtime.rpc.view_watch import ViewWatch


async def main(address: str) -> None:
    """Print views until this process is ended."""
    watch = ViewWatch([address], clock=monotonic_clock, jitter=lambda pause_s: pause_s, secret=secret_from(os.environ))
    async for view in watch.views():
        replicas = {each.replica: each.pool for each in view.replicas}
        print(json.dumps({"at_s": monotonic_clock(), "epoch": view.epoch, "replicas": replicas}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
