"""The layer rules as data: who may import whom, who owns what. ``checker`` holds the code against them.

To add a folder or a dependency, add it here, with the reason in the commit. The words are those of ARCHITECTURE.md.
"""

from __future__ import annotations

ROOT = "slipstream"

NOT_PACKAGES = frozenset({"tests", "benchmarks", "examples", "docs", "cluster_configs", "helm"})
"""Folders at the root that are not part of the package."""

TOP_MAY_IMPORT: dict[str, frozenset[str]] = {
    # "" is the root's own __init__.py, the public face.
    "": frozenset({"sdk", "runtime"}),
    "sdk": frozenset(),
    "placement": frozenset(),
    "kernels": frozenset(),
    "comm": frozenset({"placement", "kernels"}),
    "runtime": frozenset({"sdk", "placement", "kernels", "comm"}),
}
"""Folder → the other folders it may import."""

_VALUES = frozenset({"messages", "config", "errors", "clock", "lock", "metrics", "driver_command"})

_BELOW_SHELLS = frozenset({"engine", "models", "text", "rpc", "prompts", "collector", "reconcile"})

RUNTIME_MAY_IMPORT: dict[str, frozenset[str]] = {
    # Values, which all the rest speaks in. They may use one another; cycles are caught anyway.
    **dict.fromkeys(_VALUES, _VALUES),
    # Cores, models, text and rpc know values and not one another, but for views.
    "engine": _VALUES,
    "reconcile": _VALUES,
    "models": _VALUES,
    "text": _VALUES,
    # Views travel as they are, so rpc knows the values that they are made of.
    "rpc": _VALUES | {"reconcile"},
    # Between text and engine: what a caller hands in becomes a request, tokens become a result.
    "prompts": _VALUES | {"text"},
    "collector": _VALUES | {"text"},
    # KV between replicas, seen from a driver: what it decides and its ranks do.
    "handoff": _VALUES | {"engine", "rpc"},
    # Shells never import one another: they talk in messages.
    "worker": _VALUES | _BELOW_SHELLS | {"handoff"},
    "controller": _VALUES | _BELOW_SHELLS | {"cluster"},
    "gateway": _VALUES | _BELOW_SHELLS,
    # Files about a cluster that a person writes, and plans made from them; models' sizes come from their config.json.
    "cluster": _VALUES | {"models"},
    # Commands around the controller: they see the cluster through it.
    "operations": _VALUES | {"reconcile", "cluster", "controller", "ending"},
    # Steps of a rank, measured for planning.
    "profiler": _VALUES | {"models", "worker", "cluster"},
    # Clients of any server's HTTP API: they know nothing of how ours works.
    "api_client": _VALUES,
    "load_test": _VALUES | {"api_client"},
    "chat": _VALUES | {"api_client", "ending"},
    "demo": _VALUES | {"api_client", "load_test", "ending", "local_cluster"},
    # How commands end at a signal.
    "ending": _VALUES,
    # Starts our own server as a process and hands out its address; it imports none of it.
    "local_server": _VALUES | {"ending"},
    # The same for a deployment on a Ray of its own.
    "local_cluster": _VALUES | {"ending"},
    # Commands about links between nodes; the command line registers them.
    "link_commands": _VALUES | {"controller", "cluster", "operations"},
    # The ways in.
    "llm": _VALUES | _BELOW_SHELLS | {"worker"},
    "cli": _VALUES
    | _BELOW_SHELLS
    | {"worker", "controller", "gateway", "load_test", "chat", "llm", "demo", "local_server", "cluster", "profiler"}
    | {"link_commands", "operations", "local_cluster"},
}
"""Inside ``runtime/``: module or folder → the others it may import. Any other name in ``runtime/`` is refused."""

THIRD_PARTY: dict[str, frozenset[str]] = {
    "": frozenset(),
    "sdk": frozenset(),
    "placement": frozenset(),
    "kernels": frozenset({"torch", "triton", "numpy"}),
    # xxhash: checksums of KV on its way, at the speed of memory. nixl: optional, moves KV by RDMA.
    "comm": frozenset({"torch", "numpy", "xxhash", "nixl"}),
}
"""Folder → what it may import from outside the standard library. ``runtime`` is held by ``OWNERS`` instead."""

PURE = (
    "placement",
    "runtime/engine",
    "runtime/reconcile",
    *(
        f"comm/kv/{name}.py"
        for name in (
            "transfer", "sender", "receiver", "outgoing", "incoming", "coverage", "parked", "endings", "frame", "layout"
        )
    ),
    *(
        f"runtime/gateway/{name}.py"
        for name in (
            "router", "routes", "standing", "prompt_digests", "prefix_index", "link_speeds", "decode_pace", "breaker",
            "fair_share",
        )
    ),
)  # fmt: skip
"""Cores that decide, folders or single files: synchronous and deterministic; time, randomness and membership are
arguments."""

PURE_NEVER = frozenset(
    {
        "torch", "triton", "ray", "grpc", "asyncio", "threading", "multiprocessing", "concurrent", "socket",
        "time", "datetime", "random", "secrets", "uuid", "numpy.random",
    }
)  # fmt: skip
"""What a pure core does not import or reach for, itself."""

PURE_NEVER_REACHES = frozenset({"torch", "triton", "ray", "grpc", "asyncio"})
"""What importing a pure core must not load either, through anything of ours."""

OWNERS: dict[str, tuple[str, ...]] = {
    # What the controller does on Ray, what operators' commands do there, and how either reaches it.
    "ray": (
        "runtime/controller/ray_cluster.py",
        "runtime/controller/ray_connection.py",
        "runtime/controller/ray_operator.py",
    ),
    "grpc": ("runtime/rpc/", "sdk/"),
    "torch.distributed": ("comm/",),
    "triton": ("kernels/",),
    "safetensors": ("runtime/models/",),
    "tokenizers": ("runtime/text/",),
    "jinja2": ("runtime/text/",),
    "psutil": ("runtime/worker/", "runtime/controller/marked_processes.py"),
    "nixl": ("comm/kv/nixl.py",),
    "xxhash": ("comm/kv/checksum.py", "runtime/models/fingerprint.py"),
    "msgpack": ("runtime/worker/step_codec.py", "runtime/handoff/"),
    "llguidance": ("runtime/worker/grammar.py",),
    "google.protobuf": ("runtime/rpc/", "sdk/"),
    "grpc_health": ("runtime/rpc/",),
    "grpc_reflection": ("runtime/rpc/",),
    "fastapi": ("runtime/gateway/",),
    "starlette": ("runtime/gateway/",),
    "uvicorn": ("runtime/gateway/process.py", "runtime/gateway/http_protocol.py", "runtime/gateway/body_writer.py"),
    "pydantic": ("runtime/gateway/", "runtime/cluster/"),
    "yaml": ("runtime/cluster/sections.py",),
    "orjson": ("runtime/gateway/",),
    "prometheus_client": ("runtime/gateway/metrics.py", "runtime/gateway/process.py"),
    "httpx": ("runtime/api_client/",),
    # Commands of one subject may have a file of their own, which cli registers: otherwise that would have to hold all.
    "typer": ("runtime/cli.py", "runtime/link_commands.py", "runtime/operations/commands.py"),
    "rich": (
        "runtime/cli.py",
        "runtime/demo/",
        "runtime/llm.py",
        "runtime/load_test/",
        "runtime/operations/screen.py",
    ),
    "time": ("runtime/clock.py",),
    # comm/timeouts.py says how long to wait in torch's terms; it asks no clock.
    "datetime": ("runtime/clock.py", "comm/timeouts.py"),
}
"""Dependency → the files, or folders ending in a slash, that may import it."""

DISTRIBUTIONS = {
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "google": "protobuf",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "typing_extensions": "typing-extensions",
}
"""Imported package → the distribution that it comes with, where the names differ."""

LOADED_BY_OTHERS = {"httptools": "uvicorn, whose protocol on it ours builds on"}
"""Distribution that no file of ours imports → who does."""

FORBIDDEN = {
    "transformers": "it is the reference that tests compare with, never a dependency",
    "pickle": "nothing that we read is ever unpickled",
    "cloudpickle": "nothing that we read is ever unpickled",
    "dill": "nothing that we read is ever unpickled",
    "marshal": "nothing that we read is ever unpickled",
    "shelve": "nothing that we read is ever unpickled",
}
"""Dependency → why no file of the package imports it."""

MAY_IMPORT_IN_FUNCTIONS = frozenset(
    {
        "__init__.py",
        "runtime/cli.py",
        "runtime/link_commands.py",
        "runtime/operations/commands.py",
        "runtime/worker/main.py",
    }
)
"""Files that load what they need when it is asked for."""

FORBIDDEN_FILE_NAMES = frozenset({"utils.py", "util.py", "helpers.py", "misc.py", "common.py"})

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_FOLDERS_BELOW_TOP = 2
