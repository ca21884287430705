"""Slipstream: an inference runtime for large language models.

The public face, and lazy: ``import slipstream`` loads neither torch nor numpy, so that a light client stays light.
What needs them is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .sdk.errors import (
    Blame,
    CheckpointError,
    ConfigError,
    EngineError,
    InvalidRequest,
    Overloaded,
    SlipstreamError,
)
from .sdk.params import SamplingParams
from .sdk.results import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput
from .sdk.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from .runtime.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "SamplingParams",
    "StructuredOutputsParams",
    "RequestOutput",
    "CompletionOutput",
    "StreamOutput",
    "Logprob",
    "RequestMetrics",
    "SlipstreamError",
    "InvalidRequest",
    "ConfigError",
    "CheckpointError",
    "Overloaded",
    "EngineError",
    "Blame",
    "__version__",
]

_LAZY = {"LLM": ".runtime.llm"}
"""Public names whose module needs the extra ``[runtime]``."""


def __getattr__(name: str) -> object:
    """Load a name of ``_LAZY`` when it is first asked for.

    Raises: ImportError when the extra ``[runtime]`` is not installed; it says what to install.
    """
    if name not in _LAZY:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    try:
        value: object = getattr(import_module(_LAZY[name], __name__), name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # A module of our own that is missing is a broken installation, not a missing extra.
        if not missing or missing.partition(".")[0] == __name__:
            raise
        raise ImportError(
            f"slipstream.{name} needs {missing!r}, which is not installed: pip install 'slipstream-serve[runtime]'",
            name=missing,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
