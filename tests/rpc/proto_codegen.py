"""Generate the Python code of the protocols: a program for ``make proto``, and what the test of it compares with.

Lives with the tests because the protobuf compiler is a developer's tool: what runs a model does without it. Only
messages are generated; the services' methods are a few lines in clients and servers, which read bytes themselves so
that a malformed message is theirs to answer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

RPC = Path(__file__).resolve().parents[2] / "runtime" / "rpc"
FOLDER = "slipstream/v1"


def generate() -> dict[str, str]:
    """Return file name → text of what belongs into ``runtime/rpc/generated``."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(f"{FOLDER}/{path.name}" for path in (RPC / "protos" / FOLDER).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"-I{RPC / 'protos'}", f"-I{well_known}", f"--python_out={folder}", f"--pyi_out={folder}"]
        if protoc.main(["protoc", *paths, *sources]) != 0:
            raise SystemExit(f"protoc could not read {', '.join(sources)}")
        # Flat: the folder is a package of ours, whatever the protocol's own package is called.
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).rglob("*_pb2.py*")}


if __name__ == "__main__":
    for name, text in generate().items():
        (RPC / "generated" / name).write_text(text, encoding="utf-8")
