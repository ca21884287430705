"""Ray's part of a host: one raylet in a namespace, with devices of its own and a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from slipstream.runtime.controller.node_facts import DEVICE_RESOURCE, NAME_LABEL
from slipstream.tests.fakes.count_ray import sitecustomize as count_ray
from slipstream.tests.multinode.namespaces import Host

RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "PYTHONSAFEPATH": "1",
}


_WAIT_TIMEOUT_S = 120.0
_WAIT = """
import sys, threading, ray
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.cluster import ClusterError
from slipstream.runtime.controller.ray_cluster import list_nodes
from slipstream.runtime.controller.ray_connection import connected
address, count = sys.argv[1], int(sys.argv[2])
ends_s, never = monotonic_clock() + 60, threading.Event()
while True:
    try:
        with connected(address):
            while len(list_nodes()) < count and monotonic_clock() < ends_s:
                never.wait(0.1)
            sys.exit(len(list_nodes()) != count)
    except ClusterError:
        if monotonic_clock() > ends_s:
            raise
        never.wait(0.2)
"""


def counting_calls(folder: Path) -> dict[str, str]:
    """Return the environment in which each process counts its calls of Ray, in a file of its own in a folder."""
    path = [str(Path(count_ray.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), count_ray.COUNTS: str(folder)}


def start_raylet(
    host: Host, name: str, head: str | None, *, devices: int = 2, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start Ray's part of a host, in the foreground; it ends with the host.

    ``head``: the first one's address, None for the first. ``environment``: of all that runs there, over the usual one.
    """
    where = ["--head", "--port=6379", "--include-dashboard=false"] if head is None else [f"--address={head}:6379"]
    resources = json.dumps({f"{DEVICE_RESOURCE}{index}": 1 for index in range(devices)})
    command = [
        *(str(RAY), "start", *where, f"--node-ip-address={host.address}", "--num-cpus=2", "--block"),
        *(f"--resources={resources}", f"--labels={NAME_LABEL}={name}", "--object-store-memory=80000000"),
        "--disable-usage-stats",
    ]
    return subprocess.Popen(
        host.command(*command),
        env={**ENVIRONMENT, **(environment or {})},
        cwd=tempfile.gettempdir(),
        stdout=subprocess.DEVNULL,
        stderr=2,
    )


def wait_for_nodes(host: Host, ray: str, count: int) -> None:
    """Wait on a host until the Ray at an address has so many nodes."""
    done = subprocess.run(
        host.command(sys.executable, "-P", "-c", _WAIT, ray, str(count)),
        env=ENVIRONMENT,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=_WAIT_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"there are not {count} nodes: {done.stdout}{done.stderr}"
