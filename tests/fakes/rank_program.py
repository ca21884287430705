"""A rank for tests of the controller: ``python -P -m slipstream.tests.fakes.rank_program ADDRESS RANK [fail]``.

Rank 0 is a driver with an engine that draws tokens from a hash. The others are ready when they have been told where it
is, and wait to be ended.
"""

from __future__ import annotations

import json
import sys

from slipstream.runtime.worker.main import main as driver_main


def main(address: str, rank: str, *how: str) -> int:
    if "fail" in how:
        print("the checkpoint is cut short", flush=True)
        return 2
    if rank == "0":
        print(json.dumps({"meeting": f"at {address}"}), flush=True)
        return driver_main(["--null", "--listen", f"{address}:0"])
    if not sys.stdin.readline().startswith("at "):
        return 3
    print(json.dumps({"ready": True}), flush=True)
    # The pipe ends with whoever keeps this process.
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
