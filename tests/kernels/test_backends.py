"""The choice of backends, and that the table in docs/kernels.md is the one in the code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.backends import TABLE, Backend, backend_on, parse_choice, uses_triton_on
from slipstream.kernels.launch import HAS_TRITON

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_choice_left() -> Iterator[None]:
    yield
    backends.use("auto")


def test_without_a_choice_it_goes_by_device() -> None:
    for operation in TABLE:
        assert backend_on(operation, CPU) is Backend.TORCH
        assert backend_on(operation, GPU) is (Backend.TRITON if HAS_TRITON else Backend.TORCH)


def test_a_choice_holds_until_the_next() -> None:
    backends.use("norm=torch, sample=triton")
    assert backend_on("norm", GPU) is Backend.TORCH
    assert backend_on("sample", CPU) is Backend.TRITON
    assert uses_triton_on("sample", CPU) is HAS_TRITON, "tests run kernels in the interpreter"
    backends.use("torch")
    assert backend_on("sample", GPU) is Backend.TORCH


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("auto", {}),
        ("", {}),
        ("triton,norm=torch", {**dict.fromkeys(TABLE, Backend.TRITON), "norm": Backend.TORCH}),
        ("torch,norm=auto", {name: Backend.TORCH for name in TABLE if name != "norm"}),
    ],
)
def test_choices(text: str, chosen: dict[str, Backend]) -> None:
    assert parse_choice(text) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda", "'cuda' is no backend: use one of auto, torch, triton"),
        ("norm=fast", "'fast' is no backend"),
        ("attend=torch", "'attend' is no operation: use one of activation, attention"),
    ],
)
def test_what_is_not_known_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_choice(text)


def test_the_document_has_the_table() -> None:
    rows = ["| operation | what it is | own bits by Triton | own bits by torch |", "|---|---|---|---|"]
    for each in TABLE.values():
        invariant = ("yes" if each.batch_invariant[backend] else "no" for backend in (Backend.TRITON, Backend.TORCH))
        rows.append(f"| `{each.name}` | {each.summary} | {' | '.join(invariant)} |")
    assert "\n".join(rows) in DOCUMENT.read_text(), "docs/kernels.md: the table should be\n" + "\n".join(rows)
