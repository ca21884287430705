"""A rank's process on its driver's host: ``python -m slipstream.runtime.worker.rank_main``, started by the driver.

Reads one line of JSON from standard input (``RankOrder``) and is a rank (``rank_life``). It ends with its driver: the
bus is a socket, and standard input is a pipe that ends when the driver's process does, whatever this one is doing.

Exit status: 0 when the driver closed the bus; 1 when a step or a peer failed; 2 for a wrong option or checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from ...comm.errors import CommError
from ...sdk.errors import CheckpointError, ConfigError
from .keeper_pipe import KeeperPipe
from .rank_life import live
from .rank_order import RankOrder, Seat

EXIT_CLOSED, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2

_ORDER_TIMEOUT_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Run a rank until its driver needs it no more; return the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m slipstream.runtime.worker.rank_main", allow_abbrev=False)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--ranks-on-host", type=int, required=True)
    parser.add_argument("--kv-address")
    options = parser.parse_args(arguments)
    seat = Seat(
        rank=options.rank,
        address=options.address,
        ranks_on_host=options.ranks_on_host,
        kv_address=options.kv_address,
    )
    # The driver may end while this process is in a wait that nobody else would end.
    pipe = KeeperPipe(sys.stdin.fileno(), lambda: os._exit(EXIT_FAILED))
    try:
        return EXIT_CLOSED if live(RankOrder.from_json(pipe.line(_ORDER_TIMEOUT_S)), seat) else EXIT_FAILED
    except (ConfigError, CheckpointError) as error:
        print(f"rank {seat.rank}: error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except CommError as error:
        print(f"rank {seat.rank}: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
