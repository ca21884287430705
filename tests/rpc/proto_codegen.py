"""Generate the Python code of the engine protocol: a program for ``make proto``, and what the test of it compares with.

Lives with the tests because the protobuf compiler is a developer's tool: what runs a model does without it. Only
messages are generated; the service's methods are a few lines in ``client`` and ``server``, which read bytes themselves
so that a malformed message is theirs to answer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

RPC = Path(__file__).resolve().parents[2] / "runtime" / "rpc"
SOURCE = "slipstream/v1/engine.proto"


def generate() -> dict[str, str]:
    """Return file name → text of what belongs into ``runtime/rpc/generated``."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"-I{RPC / 'protos'}", f"-I{well_known}", f"--python_out={folder}", f"--pyi_out={folder}", SOURCE]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit(f"protoc could not read {SOURCE}")
        # Flat: the folder is a package of ours, whatever the protocol's own package is called.
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).rglob("engine_pb2.py*")}


if __name__ == "__main__":
    for name, text in generate().items():
        (RPC / "generated" / name).write_text(text, encoding="utf-8")
