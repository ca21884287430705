"""What all architectures' config.json have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from slipstream.runtime.models.model_spec import ModelSpec
from slipstream.runtime.models.registry import read_model_spec

SIZES: dict[str, object] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
SpecOf = Callable[..., ModelSpec]


def spec_from(directory: Path, architecture: str, **fields: object) -> ModelSpec:
    """Write a config.json of the common sizes and some fields, and read it."""
    config = {"architectures": [architecture], **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return read_model_spec(directory)
