"""The checker itself: it must see what is planted, say where, and stay quiet on what is allowed."""

from __future__ import annotations

import pytest

from slipstream.tests.architecture import checker, rules

DOC = '"""A module."""\n'

INNOCENT = {
    "__init__.py": DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .runtime.llm import LLM\n",
    "sdk/__init__.py": DOC,
    "sdk/params.py": DOC + "import math\n",
    "kernels/__init__.py": DOC,
    "kernels/norm.py": DOC + "import torch\nimport triton.language as tl\n",
    "placement/__init__.py": DOC,
    "placement/plan.py": DOC + "import heapq\n",
    "comm/__init__.py": DOC,
    "comm/mesh.py": DOC + "import torch.distributed as dist\nfrom ..kernels import norm\n",
    "runtime/__init__.py": DOC,
    "runtime/clock.py": DOC + "import time\n",
    "runtime/messages.py": DOC + "import numpy as np\nfrom ..sdk.params import SamplingParams\n",
    "runtime/engine/__init__.py": DOC,
    "runtime/engine/scheduler.py": DOC
    + "from ..clock import Clock\nfrom ..messages import StepPlan\nfrom . import blocks\n",
    "runtime/engine/blocks.py": DOC + "import numpy as np\n",
    "runtime/models/__init__.py": DOC,
    "runtime/models/decoder.py": DOC + "import torch\nfrom ...kernels.norm import norm\n",
    "runtime/worker/__init__.py": DOC,
    "runtime/worker/executor.py": DOC
    + "from ..engine.scheduler import Scheduler\nfrom ..models.decoder import Decoder\n",
    "runtime/llm.py": DOC + "from .worker.executor import Executor\nimport torch\n",
    "runtime/cli.py": DOC + "import typer\nfrom .. import __version__\ndef main():\n    from .llm import LLM\n",
}
"""A small tree that keeps every rule."""


def violations(path: str, text: str) -> list[checker.Violation]:
    return checker.check({**INNOCENT, path: DOC + text})


def test_an_innocent_tree_has_no_violations() -> None:
    assert checker.check(INNOCENT) == []


PLANTED = [
    # Layers between top folders.
    ("sdk/client.py", "from ..runtime.messages import StepPlan", "layers", "sdk imports runtime"),
    ("sdk/client.py", "from ..placement import plan", "layers", "sdk imports placement"),
    ("sdk/client.py", "from .. import comm", "layers", "sdk imports comm"),
    ("placement/search.py", "from ..sdk.params import SamplingParams", "layers", "placement imports sdk"),
    ("kernels/linear.py", "from ..comm import mesh", "layers", "kernels imports comm"),
    ("comm/overlap.py", "from ..runtime.clock import Clock", "layers", "comm imports runtime"),
    (
        "comm/overlap.py",
        "if True:\n    from ..sdk.params import SamplingParams",
        "layers",
        "comm imports sdk",
    ),
    ("runtime/llm.py", "from .. import LLM", "layers", "public face"),
    ("tools/x.py", "from ..sdk.params import SamplingParams", "layers", "tools/ is not a layer"),
    # Layers inside the runtime.
    (
        "runtime/engine/scheduler.py",
        "from ..worker.executor import Executor",
        "layers",
        "engine imports runtime/worker",
    ),
    (
        "runtime/engine/scheduler.py",
        "from ..models.decoder import Decoder",
        "layers",
        "engine imports runtime/models",
    ),
    (
        "runtime/models/moe.py",
        "from ..engine.blocks import Blocks",
        "layers",
        "models imports runtime/engine",
    ),
    ("runtime/text/chat.py", "from ..worker import executor", "layers", "text imports runtime/worker"),
    ("runtime/messages.py", "from .engine.blocks import Blocks", "layers", "messages imports runtime/engine"),
    ("runtime/worker/main.py", "from ..llm import LLM", "layers", "worker imports runtime/llm"),
    (
        "runtime/worker/main.py",
        "from ..gateway.router import Router",
        "layers",
        "worker imports runtime/gateway",
    ),
    (
        "runtime/gateway/main.py",
        "from ..controller import reconcile",
        "layers",
        "gateway imports runtime/controller",
    ),
    ("runtime/llm.py", "from .cli import main", "layers", "llm imports runtime/cli"),
    ("runtime/odds/ends.py", "from ..messages import StepPlan", "layers", "runtime/odds has no layer"),
    ("runtime/__init__.py", "from .llm import LLM", "layers", "__init__.py imports runtime/llm"),
    # Pure cores.
    ("runtime/engine/scheduler.py", "import torch", "pure", "torch"),
    ("runtime/engine/scheduler.py", "import time", "pure", "time"),
    ("runtime/engine/scheduler.py", "from time import monotonic", "pure", "time.monotonic"),
    ("runtime/engine/scheduler.py", "from datetime import datetime", "pure", "datetime"),
    ("runtime/engine/scheduler.py", "import random", "pure", "random"),
    ("runtime/engine/scheduler.py", "import asyncio", "pure", "asyncio"),
    ("runtime/engine/scheduler.py", "import grpc.aio", "pure", "grpc"),
    ("runtime/engine/scheduler.py", "import ray", "pure", "ray"),
    ("runtime/engine/scheduler.py", "import numpy as np\nx = np.random.rand()", "pure", "random numbers"),
    (
        "runtime/engine/scheduler.py",
        "from ...kernels.norm import norm",
        "pure",
        "loads torch, at kernels/norm.py:2",
    ),
    ("runtime/messages.py", "import torch", "pure", "loads torch, at runtime/messages.py:2"),
    ("placement/search.py", "import random", "pure", "random"),
    ("comm/kv/sender.py", "import threading", "pure", "threading"),
    ("comm/kv/sender.py", "from ..mesh import dist", "pure", "loads torch, at comm/mesh.py:2"),
    # Dependencies and their owners.
    ("sdk/client.py", "import torch", "third-party", "sdk imports torch"),
    ("sdk/client.py", "import numpy as np", "third-party", "sdk imports numpy"),
    ("placement/search.py", "import numpy as np", "third-party", "placement imports numpy"),
    ("kernels/linear.py", "import safetensors", "third-party", "kernels imports safetensors"),
    ("__init__.py", "import numpy", "third-party", "the root imports numpy"),
    ("runtime/worker/main.py", "import ray", "owner", "ray is imported only in"),
    (
        "runtime/controller/controller.py",
        "from ray.util import placement_group",
        "owner",
        "ray is imported only in",
    ),
    ("runtime/gateway/main.py", "import grpc", "owner", "grpc is imported only in"),
    ("runtime/models/decoder.py", "import torch.distributed as dist", "owner", "torch.distributed"),
    ("runtime/models/decoder.py", "from torch import distributed", "owner", "torch.distributed"),
    ("runtime/models/decoder.py", "import torch\ntorch.distributed.barrier()", "owner", "torch.distributed"),
    ("runtime/models/decoder.py", "import triton", "owner", "triton"),
    ("runtime/llm.py", "import time", "owner", "time is imported only in runtime/clock.py"),
    ("runtime/llm.py", "import transformers", "forbidden", "reference"),
    ("runtime/models/weights.py", "import pickle", "forbidden", "unpickled"),
    # How to import.
    ("runtime/llm.py", "from slipstream.sdk.params import SamplingParams", "relative", "relative"),
    ("runtime/llm.py", "import slipstream.sdk", "relative", "relative"),
    ("runtime/llm.py", "def f():\n    import json", "in-function", "json is imported inside a function"),
    (
        "runtime/llm.py",
        "class A:\n    async def f(self):\n        from . import clock",
        "in-function",
        "clock",
    ),
    ("runtime/llm.py", "import importlib\nimportlib.import_module('json')", "in-function", "import_module"),
    ("kernels/__init__.py", "def f():\n    import torch", "in-function", "torch"),
    # Names and sizes.
    ("runtime/utils.py", "", "file-name", "one idea"),
    ("comm/kv/deep/deeper/x.py", "", "depth", "at most 2 folders"),
    ("comm/long.py", "x = 1\n" * rules.MAX_MODULE_LINES, "size", "a module has at most"),
    ("comm/long.py", "def f():\n" + "    x = 1\n" * rules.MAX_FUNCTION_LINES, "size", "f has 71 lines"),
]


@pytest.mark.parametrize(
    ("path", "text", "rule", "message"), PLANTED, ids=[f"{p[2]}-{i}" for i, p in enumerate(PLANTED)]
)
def test_a_planted_violation_is_found(path: str, text: str, rule: str, message: str) -> None:
    found = violations(path, text)
    assert any(v.rule == rule and message in v.message for v in found), (text, [*map(str, found)])


def test_a_single_file_may_be_pure() -> None:
    assert violations("comm/kv/line.py", "import threading\n") == []


def test_a_violation_names_file_line_and_rule() -> None:
    found = violations("runtime/engine/scheduler.py", "import json\nimport time\n")
    assert "runtime/engine/scheduler.py:3: [pure] time: a pure core takes time and randomness as arguments" in map(
        str, found
    )


def test_a_missing_docstring_is_found() -> None:
    found = checker.check({**INNOCENT, "sdk/client.py": "x = 1\n"})
    assert [(v.path, v.rule) for v in found] == [("sdk/client.py", "docstring")]


def test_sizes_at_the_limit_are_allowed() -> None:
    module = "x = 1\n" * (rules.MAX_MODULE_LINES - 1)
    function = "def f():\n" + "    x = 1\n" * (rules.MAX_FUNCTION_LINES - 1)
    assert violations("comm/long.py", module) == []
    assert violations("comm/long.py", function) == []


def test_parameters_of_a_kernel_do_not_count() -> None:
    parameters = "".join(f"    x{place}_ptr,\n" for place in range(50))
    kernel = f"@jit\ndef _x_kernel(\n{parameters}):\n" + "    x = 1\n" * rules.MAX_FUNCTION_LINES
    assert violations("comm/long.py", kernel) == []
    (longer,) = violations("comm/long.py", kernel + "    x = 1\n")
    assert "_x_kernel has 71 lines" in longer.message
    assert [each.rule for each in violations("comm/long.py", kernel.removeprefix("@jit\n"))] == ["size"]


@pytest.mark.parametrize("first", ["from . import b", "from .b import x", "if True:\n    from . import b"])
@pytest.mark.parametrize("second", ["from . import c", "from .c import y"])
def test_cycles_are_found(first: str, second: str) -> None:
    tree = {
        **INNOCENT,
        "comm/a.py": DOC + first,
        "comm/b.py": DOC + second,
        "comm/c.py": DOC + "from .a import z",
    }
    cycles = [v for v in checker.check(tree) if v.rule == "cycle"]
    assert [v.path for v in cycles] == ["comm/a.py"]
    assert cycles[0].message == "slipstream.comm.a → slipstream.comm.b → slipstream.comm.c → slipstream.comm.a"


def test_a_cycle_through_a_package_is_found() -> None:
    tree = {
        **INNOCENT,
        "comm/__init__.py": DOC + "from .mesh import Mesh",
        "comm/mesh.py": DOC + "from . import name",
    }
    assert [v.rule for v in checker.check(tree)] == ["cycle"]


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for _, _, rule, _ in PLANTED} | {"docstring", "cycle"} == {
        "layers", "pure", "third-party", "owner", "forbidden", "relative", "in-function",
        "file-name", "depth", "size", "docstring", "cycle",
    }  # fmt: skip
