"""The base install is the light client: importing it loads nothing heavy, and says what to install for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import slipstream

HEAVY = {
    "torch",
    "numpy",
    "ray",
    "grpc",
    "transformers",
    "tokenizers",
    "safetensors",
    "jinja2",
    "triton",
    "rich",
}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_slipstream_loads_nothing_heavy() -> None:
    out = run("import json, sys, slipstream; slipstream.SamplingParams(); print(json.dumps(sorted(sys.modules)))")
    loaded = {name.partition(".")[0] for name in json.loads(out)}
    assert not loaded & HEAVY


def test_asking_for_a_wrong_name_loads_nothing_heavy() -> None:
    out = run("import sys, slipstream; print(hasattr(slipstream, 'Nonsense'), 'torch' in sys.modules)")
    assert out.split() == ["False", "False"]


WITHOUT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # what the import system takes for "not installed"
import slipstream
slipstream.SamplingParams(temperature=0.5)
try:
    slipstream.LLM
except ImportError as error:
    print(type(error).__name__, error.name, error)
"""


@pytest.mark.parametrize("missing", ["torch", "numpy"])
def test_llm_without_the_extra_says_what_to_install(missing: str) -> None:
    out = run(WITHOUT.format(blocked=[missing]))
    assert out.startswith(f"ImportError {missing} slipstream.LLM needs '{missing}', which is not installed")
    assert "pip install 'slipstream-serve[runtime]'" in out


def test_llm_is_loaded_when_asked_for() -> None:
    out = run("import sys, slipstream; print(slipstream.LLM.__module__, slipstream.LLM is slipstream.LLM)")
    assert out.split() == ["slipstream.runtime.llm", "True"]


def test_every_public_name_is_listed_and_there() -> None:
    assert set(slipstream.__all__) <= set(dir(slipstream))
    for name in slipstream.__all__:
        assert getattr(slipstream, name) is not None


def test_the_version_has_one_source() -> None:
    assert slipstream.__version__ == version("slipstream-serve")
