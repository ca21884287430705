"""A cluster's gateway: ``python -P -m slipstream.runtime.gateway.cluster_main --watch HOST:PORT --port P ...``.

Follows the views that the controller publishes and spreads requests over the replicas in them; starts none itself. It
prints one line of JSON, ``{"ready": true, "address": "H:PORT"}``, when it listens: whether a replica serves is what
``/ready`` says. The first SIGTERM or SIGINT, or the end of standard input, drains; a second signal stops at once. The
cluster's secret is taken from the environment.

Exit status: 0 after a drain; 1 when something was cut; 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import socket
import sys
from pathlib import Path

from ...comm.handshake import SECRET_VARIABLE
from ...sdk.errors import ConfigError
from ..clock import monotonic_clock, wall_clock
from ..rpc.client import GrpcEngineClient
from ..rpc.secret import secret_from
from ..rpc.tls import tls_from
from ..rpc.view_watch import ViewWatch
from .auth import read_api_keys
from .gateway import make_gateway
from .inference import grpc_server
from .model_files import ModelFiles
from .process import GatewayProcess, bound, event_loop, prepare_process, shown_address
from .replica_set import SPLIT_FROM_TOKENS, ReplicaSet
from .settings import TOOL_CALL_PARSERS, GatewaySettings, RequestLimits

logger = logging.getLogger(__name__)

EXIT_REFUSED = 2

_STDIN = 0
_STDIN_CHUNK_BYTES = 4096


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    options = _parser().parse_args(arguments)
    prepare_process(options.log_level)
    try:
        settings = _settings(options)
        with bound(options.host, options.port) as listening, event_loop() as runner:
            return runner.run(_serve(options, settings, listening))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED


async def _serve(options: argparse.Namespace, settings: GatewaySettings, listening: socket.socket) -> int:
    secret, tls = secret_from(os.environ), tls_from(os.environ)
    if secret is None:
        logger.warning("%s is not set: whoever answers at a replica's address is taken for it", SECRET_VARIABLE)
    replicas = ReplicaSet(
        ViewWatch(options.watch, clock=monotonic_clock, jitter=_jitter, secret=secret, tls=tls),
        # One more than clients may have: the readiness probe must not be refused by them.
        make_client=lambda address: GrpcEngineClient(
            address, secret=secret, tls=tls, max_live_requests=settings.limits.max_concurrent_requests + 1
        ),
        read_model=ModelFiles(tokenizer=options.tokenizer).read,
        clock=monotonic_clock,
        jitter=_jitter,
        seed=options.seed,
        on_ready=lambda: gateway.metrics.engine_starts.inc(),
        split_from_tokens=options.split_from_tokens,
        # Several gateways that all drew alike would all find the same replicas.
        salt=random.getrandbits(64),
    )
    gateway = make_gateway(settings, replicas, clock=monotonic_clock, wall_clock=wall_clock)

    async def announce() -> None:
        host, port = shown_address(listening)
        print(json.dumps({"ready": True, "address": f"{host}:{port}"}), flush=True)

    process = GatewayProcess(
        gateway,
        replicas,
        listening,
        drain_timeout_s=options.drain_timeout_s,
        announce=announce,
        inference=grpc_server(gateway, options.host, options.grpc_port, tls=tls),
    )
    _end_with_stdin(process.told)
    return await process.run()


def _jitter(pause_s: float) -> float:
    """Spread gateways that lost the same peer at the same time."""
    return pause_s * random.uniform(0.5, 1.0)


def _end_with_stdin(told: asyncio.Event) -> None:
    """Set an event when standard input ends: nobody keeps this process any more. A file or a device never ends it."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        if not os.read(_STDIN, _STDIN_CHUNK_BYTES):
            loop.remove_reader(_STDIN)
            told.set()

    try:
        loop.add_reader(_STDIN, look)
    except OSError:
        return


# ------------------------------------------------------------------ options


def _settings(options: argparse.Namespace) -> GatewaySettings:
    limits = RequestLimits(
        max_concurrent_requests=options.max_concurrent_requests,
        max_body_bytes=options.max_body_bytes,
        request_timeout_s=options.request_timeout_s,
    )
    return GatewaySettings(
        served_model_names=tuple(options.served_model_name),
        api_keys=() if options.api_key_file is None else read_api_keys(options.api_key_file),
        tool_call_parser=options.tool_call_parser,
        limits=limits,
    )


def _parser() -> argparse.ArgumentParser:
    description = f"Serve a cluster's replicas over HTTP. {SECRET_VARIABLE} has the cluster's secret."
    parser = argparse.ArgumentParser(prog="python -m slipstream.runtime.gateway.cluster_main", description=description)
    parser.allow_abbrev = False
    limits = RequestLimits()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes any free one")
    add("--grpc-port", type=int, metavar="N", help="port of the gRPC inference service; without it there is none")
    add(
        "--watch",
        nargs="+",
        action="extend",
        required=True,
        metavar="HOST:PORT",
        help="where views are published; tried in turn",
    )
    add(
        "--served-model-name",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="what clients call the model",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="API keys that are let in, one a line")
    add("--max-concurrent-requests", type=int, default=limits.max_concurrent_requests, metavar="N")
    add("--max-body-bytes", type=int, default=limits.max_body_bytes, metavar="N")
    add("--request-timeout-s", type=float, default=limits.request_timeout_s, metavar="S")
    add("--drain-timeout-s", type=float, default=60.0, metavar="S", help="to finish what runs before the end")
    add("--tool-call-parser", choices=TOOL_CALL_PARSERS, default="auto")
    add(
        "--split-from-tokens",
        type=int,
        default=SPLIT_FROM_TOKENS,
        metavar="N",
        help="shorter prompts, or with less that is not cached, are not split over prefill and decode replicas",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add("--tokenizer", metavar="DIR", help="another tokenizer than the model's own")
    add("--seed", type=int, help="makes requests without a seed repeat from run to run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
