"""A real server for tests: a tiny checkpoint, ``slipstream serve`` in a process of its own, and clients for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
from transformers import LlamaConfig

from slipstream.tests.gateway.harness import TEMPLATE
from slipstream.tests.models.checkpoints import Case, random_model
from slipstream.tests.text.tiny_tokenizers import byte_level

PATIENCE_S = 60.0


def make_model(directory: Path) -> Path:
    """Write a tiny random model with a tokenizer and a chat template."""
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|im_end|>")
    fields = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1,
        "eos_token_id": end, "pad_token_id": None,
    }  # fmt: skip
    random_model(Case(config_class=LlamaConfig, fields=fields)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def eventually(condition: Callable[[], bool], *, within_s: float = PATIENCE_S, what: str = "") -> None:
    """Wait until a condition holds."""
    deadline, never = time.monotonic() + within_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        never.wait(0.02)


class Server:
    """``slipstream serve`` as it runs."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """Return a metric's value, 0 while it has none."""
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def everything_is_free(self) -> bool:
        return (
            self.metric("slipstream_gateway_in_flight") == 0
            and self.metric("slipstream_requests_running") == 0
            and self.metric("slipstream_kv_blocks_available") == self.metric("slipstream_kv_blocks") > 0
        )

    def driver(self) -> psutil.Process:
        (driver,) = psutil.Process(self.process.pid).children()
        return driver


@contextmanager
def running_server(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """Start a server and wait until it says that it is ready; end it, and its driver, whatever happens."""
    command = [sys.executable, "-P", "-m", "slipstream.runtime.cli", "serve", str(model), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1 +try: curl", line)
        assert found, f"{line!r}\n{log.read_text(encoding='utf-8')[-3000:]}"
        server = Server(process, found[1], log)
        yield server
        server.http.close()
        server.openai.close()
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children()
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            finally:
                process.kill()
                psutil.wait_procs(children, timeout=PATIENCE_S)
        process.stdout.close()
