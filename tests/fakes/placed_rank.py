"""A rank as commands place it, without a model: ``python -P -m slipstream.tests.fakes.placed_rank --replica ...``.

Takes what a real one takes, says how much it has loaded, and then does as ``rank_program``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from slipstream.runtime.driver_command import DRIVER_MODULE
from slipstream.tests.fakes.rank_program import main as rank_main


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("replica", "rank", "address", "ranks-on-host", "ranks-per-host", "listen"):
        parser.add_argument(f"--{name}", required=True)
    options, _ = parser.parse_known_args(arguments)
    secret = "a secret" if os.environ.get("SLIPSTREAM_SECRET") else "no secret"
    print(f"{options.replica} rank {options.rank} stands in for {DRIVER_MODULE}, with {secret}", flush=True)
    for share in (0.25, 0.5, 1.0):
        print(json.dumps({"loaded": share}), flush=True)
    return rank_main(options.address, options.rank)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
