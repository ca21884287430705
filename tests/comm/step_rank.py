"""A rank of a step bus as a process of its own: answers every step with its own payload.

python -P -m slipstream.tests.comm.step_rank ADDRESS REPLICA RANK
"""

from __future__ import annotations

import os
import sys

from slipstream.comm.errors import GroupClosed
from slipstream.comm.handshake import Identity, secret_from
from slipstream.comm.step_endpoint import connect_rank
from slipstream.runtime.clock import monotonic_clock

PATIENCE_S = 60.0


def main() -> None:
    address, replica, rank = sys.argv[1:]
    identity = Identity(replica=replica, secret=secret_from(os.environ))
    endpoint = connect_rank(address, identity, rank=int(rank), timeout_s=PATIENCE_S, clock=monotonic_clock)
    try:
        while True:
            seq, payload = endpoint.next_step(PATIENCE_S)
            endpoint.send_result(seq, payload)
    except GroupClosed:
        pass
    finally:
        endpoint.close()


if __name__ == "__main__":
    main()
