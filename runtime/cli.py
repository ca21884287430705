"""The command line ``slipstream``: reads arguments, calls the runtime, prints.

A process entry point: the runtime (and torch with it) is imported inside the commands, so that ``--help`` answers at
once and the light client can be installed alone.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..sdk.errors import ConfigError, InvalidRequest, SlipstreamError
from ..sdk.results import RequestOutput
from .link_commands import AddressOption, measure_links, read_running
from .operations.commands import register as register_operations

if TYPE_CHECKING:
    from ..sdk.params import SamplingParams
    from .gateway.main import ServeOptions
    from .llm import LLM
    from .prompts import Prompt

app = typer.Typer(
    name="slipstream",
    help="Slipstream: a distributed inference runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

register_operations(app)

bench = typer.Typer(help="Measure a server.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command("measure-links")(measure_links)

_DEMO_CLUSTER = Path(__file__).resolve().parent.parent / "cluster_configs" / "laptop.yaml"
_DEMO_START_TIMEOUT_S = 120.0
_CHAT_START_TIMEOUT_S = 1800.0
_DEFAULT_URL = "http://127.0.0.1:8000"

ModelArgument = Annotated[str, typer.Argument(help="directory of a Hugging Face model", metavar="MODEL")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
KernelsOption = Annotated[str, typer.Option(help="auto, torch, triton, or operation=backend with commas")]
KvCacheDtypeOption = Annotated[str, typer.Option(help="numbers of the KV cache: auto is dtype; fp8 on GPUs")]
QuantizationOption = Annotated[str, typer.Option(help="weights: none, int8, int4, or fp8 on a GPU")]
EagerOption = Annotated[bool, typer.Option(help="on a GPU: no captured graphs")]
DeterministicOption = Annotated[bool, typer.Option(help="the same bits whatever else runs, on -tp 1, 2, 4 or 8")]
ThreadsOption = Annotated[int | None, typer.Option(help="threads that compute on a CPU; default: as many as help")]
TensorOption = Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="ranks that share every layer")]
PipelineOption = Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", help="stages with some layers each")]
ExpertOption = Annotated[int, typer.Option("--expert-parallel-size", "-ep", help="ranks that experts are spread over")]
SequenceOption = Annotated[int, typer.Option("--sequence-parallel-size", "-sp", help="ranks that share long prompts")]
ExpertsOverTensorOption = Annotated[bool, typer.Option(help="spread experts over the tensor-parallel ranks")]
OverlapOption = Annotated[bool, typer.Option(help="hide exchanges between ranks behind arithmetic")]
ShardedNormOption = Annotated[
    bool | None, typer.Option(help="each tensor-parallel rank normalizes its share of the tokens; default: if faster")
]
EvenOption = Annotated[bool, typer.Option(help="with stages: steps that take equally long")]
LengthOption = Annotated[int | None, typer.Option(help="tokens of prompt and output together")]
ServedNamesOption = Annotated[
    list[str] | None, typer.Option(help="what clients call the model; may be repeated. Default: the folder's name")
]
TransferDtypeOption = Annotated[
    str,
    typer.Option(help="numbers from one to the other: auto; fp8: half the bytes of bfloat16, tokens may differ"),
]
ExpertBalanceOption = Annotated[bool, typer.Option(help="move experts between ranks so that all have as much to do")]
ExpertPolicyOption = Annotated[str, typer.Option(help="balance, or affinity: together what the same tokens choose")]
ExpertExchangeOption = Annotated[
    str, typer.Option(help="auto, all_to_all or gather: how experts on several ranks get their tokens")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    """Slipstream: a distributed inference runtime for large language models."""
    if version:
        typer.echo(f"slipstream {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; may be repeated")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a file, one prompt a line; - is standard input")] = None,
    chat: Annotated[bool, typer.Option(help="send each prompt as a user message through the chat template")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a prompt")] = False,
    max_tokens: Annotated[int, typer.Option(help="most new tokens a prompt")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus; default: the model's own")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off; default: the model's own")] = None,
    min_p: Annotated[float | None, typer.Option(help="0 is off; default: the model's own")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="samples a prompt")] = 1,
    seed: Annotated[int | None, typer.Option(help="makes the sampling repeat")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends the text; may be repeated")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on after the end token")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = "none",
    kernels: KernelsOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    enforce_eager: EagerOption = False,
    num_threads: ThreadsOption = None,
    deterministic: DeterministicOption = False,
    tensor_parallel_size: TensorOption = 1,
    pipeline_parallel_size: PipelineOption = 1,
    expert_parallel_size: ExpertOption = 1,
    sequence_parallel_size: SequenceOption = 1,
    enable_expert_parallel: ExpertsOverTensorOption = False,
    overlap: OverlapOption = False,
    sharded_norm: ShardedNormOption = None,
    even_chunks: EvenOption = True,
    max_model_len: LengthOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="sequences that run at once")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="token budget of a step")] = 2048,
    block_size: Annotated[int, typer.Option(help="token positions of a KV block")] = 16,
    enable_prefix_caching: Annotated[bool, typer.Option(help="reuse the KV of shared prefixes")] = True,
) -> None:
    """Generate text for prompts and print it, streamed when there is one prompt."""
    options = _engine_options(locals())
    from .llm import LLM

    texts = _read_prompts(prompt, prompts_file)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen |= {"max_tokens": max_tokens, "n": n, "stop": tuple(stop or ()), "ignore_eos": ignore_eos}
    with LLM(model, **options) as llm:
        prompts: list[Prompt] = [
            llm.render_chat([{"role": "user", "content": text}]) if chat else text for text in texts
        ]
        _generate(llm, prompts, replace(llm.get_default_sampling_params(), **chosen), as_json=as_json)


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return those of a command's arguments that are the engine's; a seed is the prompts'."""
    from .config import EngineOptions

    known = {field.name for field in fields(EngineOptions)} - {"model", "seed"}
    return {name: value for name, value in given.items() if name in known}


def _generate(llm: LLM, prompts: list[Prompt], params: SamplingParams, *, as_json: bool) -> None:
    if len(prompts) == 1 and params.n == 1 and not as_json:
        for piece in llm.stream(prompts, params):
            typer.echo(piece.text, nl=False)
        typer.echo()
    else:
        _print_outputs(llm.generate(prompts, params), as_json=as_json)


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is all of them")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes any free one")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="port of the gRPC service; without it there is none")] = None,
    served_model_name: ServedNamesOption = None,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys that are let in, one a line")] = None,
    max_concurrent_requests: Annotated[int, typer.Option(help="prompts on their way at once; more get 429")] = 2048,
    max_body_bytes: Annotated[int, typer.Option(help="largest request body")] = 8 << 20,
    request_timeout_s: Annotated[float, typer.Option(help="seconds that a request may take")] = 600.0,
    drain_timeout_s: Annotated[float, typer.Option(help="seconds to finish what runs after SIGTERM")] = 60.0,
    start_timeout_s: Annotated[float, typer.Option(help="seconds that loading the model may take")] = 1800.0,
    tool_call_parser: Annotated[str, typer.Option(help="auto, none, hermes, llama3_json or mistral")] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    tokenizer: Annotated[str | None, typer.Option(help="directory of another tokenizer")] = None,
    seed: Annotated[int | None, typer.Option(help="makes requests without a seed repeat from run to run")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = "none",
    kernels: KernelsOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    enforce_eager: EagerOption = False,
    num_threads: ThreadsOption = None,
    deterministic: DeterministicOption = False,
    tensor_parallel_size: TensorOption = 1,
    pipeline_parallel_size: PipelineOption = 1,
    expert_parallel_size: ExpertOption = 1,
    sequence_parallel_size: SequenceOption = 1,
    enable_expert_parallel: ExpertsOverTensorOption = False,
    overlap: OverlapOption = False,
    sharded_norm: ShardedNormOption = None,
    even_chunks: EvenOption = True,
    max_model_len: LengthOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="sequences that run at once")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="token budget of a step")] = 2048,
    max_queued_requests: Annotated[int, typer.Option(help="requests that wait in the engine; more get 429")] = 4096,
    block_size: Annotated[int, typer.Option(help="token positions of a KV block")] = 16,
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="size of the KV cache")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="share of free memory to use")] = 0.9,
    enable_prefix_caching: Annotated[bool, typer.Option(help="reuse the KV of shared prefixes")] = True,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority")] = "fcfs",
    enable_eplb: ExpertBalanceOption = False,
    num_redundant_experts: Annotated[int, typer.Option(help="slots in every layer for replicas of experts")] = 0,
    eplb_step_interval: Annotated[int, typer.Option(help="steps between two looks at the experts' loads")] = 3000,
    eplb_policy: ExpertPolicyOption = "balance",
    expert_exchange: ExpertExchangeOption = "auto",
    step_timeout_s: Annotated[float, typer.Option(help="seconds that a step of the engine may take")] = 600.0,
    prefill: Annotated[int, typer.Option(help="replicas that only compute prompts; goes with --decode")] = 0,
    decode: Annotated[int, typer.Option(help="replicas that go on with them; goes with --prefill")] = 0,
    kv_transport: Annotated[str, typer.Option(help="from one to the other: auto, tcp or shm")] = "auto",
    kv_transfer_dtype: TransferDtypeOption = "auto",
    split_from_tokens: Annotated[int | None, typer.Option(help="shorter prompts stay where they are decoded")] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API. SIGTERM or Ctrl-C finishes what runs; a second one stops at once.

    With --prefill N and --decode M, N + M engines share the work: each has the whole model and a KV cache of its own.
    """
    given = locals()
    from .gateway.main import serve as serve_gateway

    raise typer.Exit(serve_gateway(_serve_options(given), announce=typer.echo))


def _serve_options(given: dict[str, Any]) -> ServeOptions:
    """Return what `slipstream serve` was told, by the names of its options. Raises: ConfigError; OSError"""
    from .config import EngineOptions
    from .gateway.auth import read_api_keys
    from .gateway.local_pools import LocalSplit
    from .gateway.main import ServeOptions
    from .gateway.settings import GatewaySettings, RequestLimits

    # The engine's options have the engine's names.
    engine = EngineOptions(**{field.name: given[field.name] for field in fields(EngineOptions) if field.name in given})
    limits = RequestLimits(
        **{name: given[name] for name in ("max_concurrent_requests", "max_body_bytes", "request_timeout_s")}
    )
    settings = GatewaySettings(
        served_model_names=tuple(given["served_model_name"] or [Path(given["model"]).expanduser().resolve().name]),
        api_keys=() if given["api_key_file"] is None else read_api_keys(given["api_key_file"]),
        tool_call_parser=given["tool_call_parser"],
        limits=limits,
    )
    split = None
    if given["prefill"] or given["decode"]:
        names = ("prefill", "decode", "kv_transport", "kv_transfer_dtype", "split_from_tokens")
        split = LocalSplit(**{name: given[name] for name in names if given[name] is not None})
    others = {
        name: given[name] for name in ("host", "port", "grpc_port", "start_timeout_s", "drain_timeout_s", "log_level")
    }
    return ServeOptions(engine=engine, settings=settings, split=split, **others)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a cluster file")],
    topology: Annotated[
        Path | None,
        typer.Option(help="a topology file. Default: NAME.topology.yaml beside NAME.yaml, else the Ray that runs"),
    ] = None,
    address: AddressOption = None,
    profile: Annotated[
        list[Path] | None, typer.Option(help="measured steps, from `slipstream profile`; may be repeated")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show plans for a cluster file, the best first, with what they are predicted to do and what limits each."""
    from .cluster.plan_command import plan_command

    text, found = plan_command(
        file, topology=topology, address=address, running=read_running, profiles=profile or (), as_json=as_json
    )
    typer.echo(text)
    if not found:
        raise typer.Exit(1)


@app.command("profile")
def profile_steps(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="the table to write")] = Path("profile.json"),
    device_type: Annotated[str, typer.Option(help="what the topology calls a device like this one")] = "cpu-core",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = "none",
    num_threads: ThreadsOption = None,
    positions: Annotated[int, typer.Option(help="token positions that the KV cache gets")] = 16_384,
) -> None:
    """Measure steps of a model on the device at hand, for `slipstream plan --profile`."""
    from .profiler.main import run_profile
    from .profiler.measure import ProfileOptions

    options = ProfileOptions(
        model=model, dtype=dtype, device=device, quantization=quantization, num_threads=num_threads,
        positions=positions,
    )  # fmt: skip
    run_profile(options, device_type=device_type, path=output, announce=typer.echo)
    typer.echo(f"wrote {output}")


@bench.command("serve")
def bench_serve(
    base_url: Annotated[str, typer.Option(help="the server, with or without /v1")] = _DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="default: the first that the server lists")] = None,
    num_prompts: Annotated[int, typer.Option(help="requests to send")] = 100,
    max_concurrency: Annotated[
        int | None, typer.Option(help="requests on their way at once. Default: 32; with a rate 4096")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="requests per second, at random times. Default: each client waits its turn")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of a prompt, about")] = 128,
    output_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 64,
    request_timeout_s: Annotated[float, typer.Option(help="seconds that a request may take")] = 300.0,
    seed: Annotated[int, typer.Option(help="makes prompts and arrivals repeat")] = 0,
    api_key_file: Annotated[Path | None, typer.Option(help="a file with the API key")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures to")] = None,
) -> None:
    """Put load on any server with OpenAI's API and show how it bore it."""
    from .load_test.main import run_load_test
    from .load_test.plan import LoadPlan

    plan = LoadPlan(
        num_prompts=num_prompts, max_concurrency=max_concurrency, request_rate=request_rate,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, request_timeout_s=request_timeout_s, seed=seed,
    )  # fmt: skip
    if not run_load_test(base_url, plan, model=model, api_key_file=api_key_file, json_file=json_file):
        raise typer.Exit(1)


@app.command("chat")
def chat_with(
    directory: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="directory of a model: chat with a server of its own")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help=f"a server that runs, with or without /v1. Default: {_DEFAULT_URL}")
    ] = None,
    model: Annotated[str | None, typer.Option(help="default: the first that the server lists")] = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the server's own")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="a file with the API key")] = None,
) -> None:
    """Chat in the terminal: with MODEL, served for as long as the chat lasts, or with any server with OpenAI's API.

    /reset forgets the conversation, /exit ends it, Ctrl-C stops an answer.
    """
    from .chat import run_chat

    options: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    with _own_or_running(directory, base_url=base_url, model=model, api_key_file=api_key_file) as url:
        run_chat(
            url, model=model, api_key_file=api_key_file, system=system, options=options, read=_read_line, show=_show
        )


def _own_or_running(
    directory: str | None, *, base_url: str | None, model: str | None, api_key_file: Path | None
) -> AbstractContextManager[str]:
    """Return a server for a model directory, or the address of one that runs."""
    if directory is None:
        return nullcontext(base_url or _DEFAULT_URL)
    for name, value in (("--base-url", base_url), ("--model", model), ("--api-key-file", api_key_file)):
        if value is not None:
            raise ConfigError(name, f"is for a server that runs: leave it out, or MODEL ({directory})")
    from .local_server import running_server

    typer.echo(f"starting a server for {directory} ...")
    return running_server(directory, start_timeout_s=_CHAT_START_TIMEOUT_S)


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _show(text: str) -> None:
    typer.echo(text, nl=False)


@app.command()
def demo(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="a cluster file")] = _DEMO_CLUSTER,
    max_tokens: Annotated[int, typer.Option(help="most new tokens a prompt")] = 96,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.6,
    seed: Annotated[int, typer.Option(help="makes the sampling repeat")] = 0,
) -> None:
    """Bring a deployment up on this machine, send it several prompts at once, show answers and costs, take it down.

    What it starts, a Ray included, is its own and ends with it.
    """
    from .demo.main import run_demo
    from .local_cluster import running_cluster

    typer.echo(f"slipstream up {file}")
    body = {"max_tokens": max_tokens, "temperature": temperature, "top_p": 0.95, "seed": seed}
    with running_cluster(file, start_timeout_s=_DEMO_START_TIMEOUT_S, told=typer.echo) as cluster:
        run_demo(cluster, body)
        typer.echo("taking it down")


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Return the prompts given as options and those in a file, one a line."""
    texts = list(prompts or [])
    if file is not None:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        texts += [line for line in content.splitlines() if line.strip()]
    if not texts:
        raise InvalidRequest("--prompt", "give at least one, or --prompts-file")
    return texts


def _print_outputs(outputs: list[RequestOutput], *, as_json: bool) -> None:
    for output in outputs:
        if as_json:
            typer.echo(json.dumps(asdict(output), ensure_ascii=False))
            continue
        for sample in output.outputs:
            typer.secho(f"{output.prompt}", fg="bright_black", nl=False)
            typer.echo(sample.text)
            typer.secho(f"-- {len(sample.token_ids)} tokens, {sample.finish_reason}", fg="bright_black")


def main() -> None:
    """Run the command line; errors that Slipstream raises on purpose are printed as one line, without a traceback."""
    try:
        app()
    except (SlipstreamError, ImportError, OSError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
