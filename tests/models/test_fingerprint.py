"""A fingerprint is the same for the same model, and another for another: configuration, weights, quantization."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slipstream.runtime.models.fingerprint import model_fingerprint
from slipstream.runtime.models.registry import read_model_spec

MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


def of(directory: Path, quantization: str = "none") -> str:
    return model_fingerprint(directory, read_model_spec(directory), quantization=quantization)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "copy"))


def test_a_copy_is_the_same_model(copied: Path) -> None:
    assert of(copied) == of(MODEL)


def test_files_that_compute_nothing_do_not_count(copied: Path) -> None:
    (copied / "README.md").write_text("another model card")
    assert of(copied) == of(MODEL)


def test_quantization_counts() -> None:
    assert of(MODEL, "int8") != of(MODEL)


def test_configuration_counts(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (copied / "config.json").write_text(json.dumps(config))
    assert of(copied) != of(MODEL)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_weights_count(copied: Path, part: float) -> None:
    """A fine-tune has the same names, shapes and sizes."""
    path = copied / "model.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(int(len(data) * part), int(len(data) * (part + 0.05))):
        data[at] ^= 1
    path.write_bytes(data)
    assert of(copied) != of(MODEL)
