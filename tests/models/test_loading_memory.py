"""Loading holds the parameters and at most two more tensors, measured as anonymous memory of a process: the one that is
brought into its format, and what the allocator keeps of the one before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from slipstream.tests.models.checkpoints import Case, random_model

SLACK_BYTES = 8 * 2**20

# A thread samples while the main thread loads: copying releases the interpreter's lock.
LOADER = """
import json, sys, threading
import torch
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.registry import read_model_spec

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.zeros(1) + 1
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
spec = read_model_spec(path)
before, peak, done = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
decoder = load_decoder(path, spec, dtype=dtype, device=torch.device("cpu"))
done.set()
watcher.join()
print(json.dumps([max(peak, anonymous_bytes()) - before, anonymous_bytes() - before]))
"""

_SIZES = {
    "vocab_size": 12_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BIG_DENSE = Case(config_class=LlamaConfig, fields={**_SIZES, "num_hidden_layers": 12})
BIG_MOE = Case(
    config_class=MixtralConfig,
    fields={**_SIZES, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("case", "stored", "loaded"),
    [
        (BIG_DENSE, torch.float32, "float32"),
        (BIG_DENSE, torch.bfloat16, "float32"),
        (BIG_MOE, torch.float32, "bfloat16"),
    ],
    ids=["dense", "dense converted", "experts converted"],
)
def test_loading_holds_at_most_two_tensors_more(tmp_path: Path, case: Case, stored: torch.dtype, loaded: str) -> None:
    model = random_model(case).to(stored)
    model.save_pretrained(tmp_path, max_shard_size="80MB")
    element_bytes = 2 if loaded == "bfloat16" else 4
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    final = sum(parameter.numel() for parameter in model.parameters()) * element_bytes
    del model
    result = subprocess.run(
        [sys.executable, "-P", "-c", LOADER, str(tmp_path), loaded],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, stays = json.loads(result.stdout)
    mib = 2**20
    print(f"final {final // mib} MiB, largest {largest // mib}, peak {peak // mib}, stays {stays // mib}")
    assert peak <= final + 2 * largest + SLACK_BYTES
    assert stays <= final + largest + SLACK_BYTES
