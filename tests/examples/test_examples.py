"""The examples and the bundled checkpoints do what their texts say."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = ["demo_model", "demo_moe_model"]
MEGABYTE = 10**6
CODE = re.compile(
    r"^ *("
    r"(self|\w+)(\.\w+)*(\[.*\]|\(.*\))? [-+|]?= "
    r"|(return|if|elif|for|while|raise|def|class|import|from|with|assert) "
    r"|(else|try|finally|pass|break|continue|return)\b|except\b|@\w+|[\w.]+\("
    r")"
)
# Real Python, from a file that every machine has.
SOURCE = '''def copyfileobj(fsrc, fdst, length=0):
    """copy data from file-like object fsrc to file-like object fdst"""
    if not length:
        length = COPY_BUFSIZE
    # Localize variable access to minimize overhead.
    fsrc_read = fsrc.read
    fdst_write = fdst.write
    while True:
        buf = fsrc_read(length)
        if not buf:
            break
        fdst_write(buf)
'''


@pytest.mark.parametrize("script", ["generate.py", "chat.py"])
def test_an_example_runs(script: str) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_is_small_and_complete(name: str) -> None:
    directory = EXAMPLES / name
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 20 * MEGABYTE
    files = {file.name for file in directory.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert 4096 <= config["vocab_size"] <= 8192


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_has_learned_python(name: str) -> None:
    """Far better than chance on Python, worse on the same characters shuffled, and it writes lines of code."""
    with LLM(EXAMPLES / name, max_model_len=512) as llm:
        scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        backwards = "\n".join(reversed(SOURCE.splitlines()))[::-1]
        real, nonsense = (bits_per_byte(llm, text, scored) for text in (SOURCE, backwards))
        assert real < 1.8 and nonsense > 2 * real, (real, nonsense)
        sampled = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=80, n=4)
        prompts = ["def main():", "class Stack:\n    def __init__(self", "import os\nimport", "    for key, value in"]
        texts = [sample.text for output in llm.generate(prompts, sampled) for sample in output.outputs]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    code = [line for line in lines if CODE.match(line)]
    assert len(code) > len(lines) / 3, "\n".join(lines)


def bits_per_byte(llm: LLM, text: str, params: SamplingParams) -> float:
    output = llm.generate(text, params)[0]
    assert output.prompt_logprobs is not None
    total = 0.0
    for token, table in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert table is not None
        total -= table[token].logprob
    return total / math.log(2) / len(text.encode())
