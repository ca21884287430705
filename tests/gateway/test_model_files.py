"""Models' text sides: read once, beside the event loop, and not too many of them."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from slipstream.runtime.gateway import model_files
from slipstream.runtime.gateway.model_files import ModelFiles
from slipstream.sdk.errors import CheckpointError
from slipstream.tests.gateway.harness import asynchronous
from slipstream.tests.text.tiny_tokenizers import byte_level


def make_model(directory: Path, *, temperature: float = 0.5) -> str:
    directory.mkdir()
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": temperature}), encoding="utf-8")
    return str(directory)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of a model's files, as it happens."""
    found: list[str] = []
    read = model_files.read_model_text

    def noted(model: str, *, tokenizer: str | None = None):
        assert threading.current_thread() is not threading.main_thread(), "the event loop waits for a file"
        found.append(Path(model).name)
        return read(model, tokenizer=tokenizer)

    monkeypatch.setattr(model_files, "read_model_text", noted)
    return found


@asynchronous
async def test_a_model_is_read_once_for_all_its_replicas(tmp_path: Path, reads: list[str]) -> None:
    one, two = make_model(tmp_path / "one"), make_model(tmp_path / "two", temperature=0.25)
    files = ModelFiles()
    texts = await asyncio.gather(*(files.read(model, 1) for model in (one, two, one, one)))
    assert sorted(reads) == ["one", "two"]
    assert texts[0] is texts[2] is texts[3] is await files.read(one, 1)
    assert [text.defaults.temperature for text in texts[:2]] == [0.5, 0.25]
    longest = max(len(texts[0].tokenizer.id_to_token(id) or "") for id in range(texts[0].tokenizer.vocab_size))
    assert texts[0].longest_token_chars == longest


@asynchronous
async def test_another_generation_is_read_anew(tmp_path: Path, reads: list[str]) -> None:
    model = make_model(tmp_path / "model")
    files = ModelFiles()
    assert (await files.read(model, 1)).defaults.temperature == 0.5
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.75}', encoding="utf-8")
    assert (await files.read(model, 1)).defaults.temperature == 0.5
    assert (await files.read(model, 2)).defaults.temperature == 0.75
    assert reads == ["model", "model"]


@asynchronous
async def test_those_used_longest_ago_are_let_go(tmp_path: Path, reads: list[str]) -> None:
    models = [make_model(tmp_path / name) for name in "abc"]
    files = ModelFiles(max_kept=2)
    for place in (0, 1, 0, 2, 0, 1):
        await files.read(models[place], 1)
    assert reads == ["a", "b", "c", "b"]


@asynchronous
async def test_what_cannot_be_read_is_named_and_tried_again(tmp_path: Path, reads: list[str]) -> None:
    files = ModelFiles()
    with pytest.raises(CheckpointError, match=r"late/tokenizer\.json"):
        await files.read(str(tmp_path / "late"), 1)
    make_model(tmp_path / "late")
    assert (await files.read(str(tmp_path / "late"), 1)).defaults.temperature == 0.5
    assert reads == ["late", "late"]


@asynchronous
async def test_another_tokenizer_may_be_named(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", temperature=0.125)
    (tmp_path / "model" / "tokenizer.json").unlink()
    text = await ModelFiles(tokenizer=make_model(tmp_path / "other")).read(model, 1)
    assert text.defaults.temperature == 0.125 and text.tokenizer.vocab_size > 0
