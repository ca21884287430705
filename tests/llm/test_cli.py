"""The command line as a user types it, and the list of its options (adding one means editing the list here)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from slipstream import LLM, SamplingParams, __version__
from slipstream.runtime.cli import app, main

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")

OPTIONS = {
    "generate": {
        # what to generate for, and how to print it
        *("prompt", "prompts_file", "chat", "as_json"),
        # sampling, named as in SamplingParams
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "ignore_eos"),
        # engine, named as in EngineOptions
        *(
            "dtype",
            "device",
            "quantization",
            # to compare ways with one another; a cache in fewer bits changes tokens; graphs take memory
            *("kernels", "kv_cache_dtype", "enforce_eager"),
            "num_threads",
            "deterministic",
            *("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "enable_expert_parallel"),
            "sequence_parallel_size",
            *("overlap", "sharded_norm"),
            "even_chunks",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
        ),
        "enable_prefix_caching",
    },
    "serve": {
        # where, as what, and for whom
        *("host", "port", "grpc_port", "served_model_name", "api_key_file", "tool_call_parser", "log_level"),
        # what clients may cost, and how long starting and stopping may take
        *("max_concurrent_requests", "max_body_bytes", "request_timeout_s", "drain_timeout_s", "start_timeout_s"),
        # engine, named as in EngineOptions
        *(
            "tokenizer",
            "seed",
            "dtype",
            "device",
            "quantization",
            # to compare ways with one another; a cache in fewer bits changes tokens; graphs take memory
            *("kernels", "kv_cache_dtype", "enforce_eager"),
            "num_threads",
            "deterministic",
            *("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "enable_expert_parallel"),
            "sequence_parallel_size",
            *("overlap", "sharded_norm"),
            "even_chunks",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
        ),
        *("max_queued_requests", "block_size", "kv_cache_memory_bytes", "gpu_memory_utilization"),
        *("enable_prefix_caching", "scheduling_policy", "step_timeout_s"),
        *("enable_eplb", "num_redundant_experts", "eplb_step_interval", "eplb_policy"),
        # tried at the start; forced where it is to be compared
        "expert_exchange",
        # several replicas, each with a part to do
        *("prefill", "decode", "kv_transport", "kv_transfer_dtype", "split_from_tokens"),
    },
    # where it would run, what has been measured there, how it is told
    "plan": {"topology", "address", "profile", "as_json"},
    # where, how much it may cost, where it goes
    "measure-links": {"address", "seconds", "streams", "timeout_s", "save", "as_json"},
    # what is measured, as an engine would hold it, and where the table goes
    "profile": {"output", "device_type", "dtype", "device", "quantization", "num_threads", "positions"},
    "bench serve": {
        # whom, and as who
        *("base_url", "model", "api_key_file"),
        # how much load, in which loop, repeatable; where the figures go
        *("num_prompts", "max_concurrency", "request_rate", "prompt_tokens", "output_tokens", "request_timeout_s"),
        *("seed", "json_file"),
    },
    # whom to talk to, and how it answers
    "chat": {"base_url", "model", "api_key_file", "system", "max_tokens", "temperature"},
    "demo": {"max_tokens", "temperature", "seed"},
    # a deployment: where, which, whether and how long to wait, how it is told
    "up": {"detach", "address", "timeout", "port", "as_json"},
    "update": {"detach", "address", "timeout", "as_json"},
    "status": {"name", "address", "as_json"},
    "scale": {"name", "detach", "address", "timeout", "as_json"},
    "drain": {"undo", "name", "detach", "address", "timeout", "as_json"},
    # of which process, how much of it
    "logs": {"rank", "follow", "lines", "name", "address", "as_json"},
    "down": {"now", "name", "address", "timeout", "as_json"},
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["slipstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_the_options_are_frozen() -> None:
    commands = {
        " ".join(filter(None, (name, below))): command
        for name, group in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
        for below, command in getattr(group, "commands", {"": group}).items()
    }
    found = {
        name: {parameter.name for parameter in command.params if parameter.param_type_name == "option"} - {"help"}
        for name, command in commands.items()
    }
    assert found == OPTIONS


def test_version_and_help_answer_without_torch() -> None:
    program = (
        "import sys; from slipstream.runtime.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'the runtime was loaded'\n"
    )
    for argument, expected in [("--version", __version__), ("--help", "generate")]:
        command = [sys.executable, "-P", "-c", program, argument]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_generate_prints_json_for_several_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("x = \n\nfor i in\n", encoding="utf-8")
    arguments = ["--prompts-file", str(file), "-p", "def f", "--json", "--temperature", "0", "--max-tokens", "5"]
    run(monkeypatch, "generate", DEMO_MODEL, *arguments)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["def f", "x = ", "for i in"]
    assert all(0 < len(row["outputs"][0]["token_ids"]) <= 5 and row["finished"] for row in rows)


def test_generate_streams_one_prompt_as_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-p", "import", "--temperature", "0", "--max-tokens", "12"]
    run(monkeypatch, "generate", DEMO_MODEL, *arguments)
    streamed = capsys.readouterr().out
    run(monkeypatch, "generate", DEMO_MODEL, *arguments, "--json")
    assert streamed == json.loads(capsys.readouterr().out)["outputs"][0]["text"] + "\n"


def test_generate_as_a_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "generate", DEMO_MODEL, "--chat", "-p", "Write `add`.", "--json", "--max-tokens", "3", "-n", "2")
    row = json.loads(capsys.readouterr().out)
    assert "<|user|>" in row["prompt"] and len(row["outputs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/such/model", "-p", "x"], "/no/such/model: is not a directory"),
        (["generate", DEMO_MODEL], "--prompt: give at least one"),
        (["generate", DEMO_MODEL, "-p", "x", "--temperature", "-1"], "temperature: must be"),
        (["generate", DEMO_MODEL, "-p", "x", "--dtype", "int3"], "dtype: must be one of"),
        (["generate", DEMO_MODEL, "-p", "x", "--block-size", "0"], "block_size: must be"),
        (["generate", DEMO_MODEL, "--prompts-file", "/no/such/file"], "/no/such/file"),
        (["chat", DEMO_MODEL, "--base-url", "http://localhost:8000"], "--base-url: is for a server that runs"),
        (["chat", "--base-url", "http://127.0.0.1:1"], "`slipstream chat MODEL` starts one"),
    ],
)
def test_an_error_is_one_clear_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["slipstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and printed.count("\n") == 1


def test_a_chat_with_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["Write `add`.", "And `subtract`."]
    typed = iter([*questions, "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    run(monkeypatch, "chat", DEMO_MODEL, "--max-tokens", "12", "--temperature", "0")
    greeting, shown = capsys.readouterr().out.split("stops an answer.\n")
    assert f"starting a server for {DEMO_MODEL}" in greeting and "demo_model at http://127.0.0.1:" in greeting
    messages, expected = [], ""
    with LLM(DEMO_MODEL) as llm:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            expected += answer + "\n"
    assert shown == expected
