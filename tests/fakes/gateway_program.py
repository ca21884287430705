"""A gateway for tests of who keeps one: ``python -P -m slipstream.tests.fakes.gateway_program --host H --port P ...``.

Says what it was told, listens, and ends when it is asked to or nobody keeps it any more. With ``--fail`` it ends at
once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--watch", action="append", required=True)
    parser.add_argument("--api-key-file")
    parser.add_argument("--fail", action="store_true")
    options, others = parser.parse_known_args(arguments)
    keys = Path(options.api_key_file).read_text(encoding="utf-8").split() if options.api_key_file else []
    print(f"watches {options.watch[0]} with {len(keys)} keys, {len(others)} other arguments", flush=True)
    if options.fail:
        print("the port is taken", flush=True)
        return 3
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    with socket.create_server((options.host, options.port)) as listening:
        print(json.dumps({"ready": True, "address": f"{options.host}:{listening.getsockname()[1]}"}), flush=True)

        def until_nobody_keeps_it() -> None:
            sys.stdin.read()
            told.set()

        threading.Thread(target=until_nobody_keeps_it, daemon=True).start()
        told.wait()
        print("drained", flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
