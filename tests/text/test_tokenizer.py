"""Loading tokenizers, and the errors of directories that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.sdk.errors import CheckpointError, InvalidRequest
from slipstream.tests.text.tiny_tokenizers import FAMILIES, byte_fallback, byte_level, with_bos


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with_bos(byte_level()).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "model_max_length": 16}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_and_decode_equal_transformers(name: str, tmp_path: Path) -> None:
    backend = with_bos(FAMILIES[name]())
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_directory(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("The quick fox", "  def f(x):\n\treturn x  ", "Grüße 你好 😀<|im_end|>", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        ids = ours.encode(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.vocab_size == len(theirs)


def test_special_tokens_have_ids(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.bos_token_id == tokenizer.token_to_id("<s>") == tokenizer.encode("x")[0]
    assert tokenizer.eos_token_id == tokenizer.token_to_id("</s>")
    assert tokenizer.id_to_token(tokenizer.eos_token_id or 0) == "</s>"
    assert tokenizer.id_to_token(10**6) is None
    assert not tokenizer.has_chat_template


def test_special_tokens_from_the_old_file(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.from_directory(str(directory))
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.bos_token_id is None


def test_prompts_are_never_cut_or_padded(tmp_path: Path) -> None:
    backend = with_bos(byte_fallback())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
    assert len(tokenizer.encode("T")) < 9


def test_text_that_is_no_unicode_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode") as caught:
        Tokenizer.from_directory(directory).encode("\ud800")
    assert caught.value.field == "prompt"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: does not exist$"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"convert tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="nor does its directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", "{", "no tokenizer that can be read"),
        ("tokenizer.json", '{"version": "1.0"}', "no tokenizer that can be read"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template must be a string or a list"),
        ("tokenizer_config.json", '{"chat_template": []}', "empty list"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template 'default', line 1"),
        ("chat_template.jinja", "{% for x in %}", "chat template 'default', line 1"),
        ("chat_template.json", '{"chat_template": [{"name": "default"}]}', "list of {name, template}"),
    ],
)
def test_a_bad_file_is_named(directory: Path, file: str, content: str, problem: str) -> None:
    (directory / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_directory(directory)
    assert caught.value.file == str(directory / file)
    assert problem in str(caught.value)
