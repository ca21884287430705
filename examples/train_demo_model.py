"""Train a demo checkpoint (dense Llama or mixture-of-experts Mixtral) on the Python standard library.

    python examples/train_demo_model.py --kind dense --out examples/demo_model --minutes 30
    python examples/train_demo_model.py --kind moe --out examples/demo_moe_model --minutes 30

The learning rate follows the clock (or the step count with --steps): a short warm-up, then a straight line
to zero. Weights are bf16 with an fp32 master copy in the optimiser, which is Muon for the projection
matrices and AdamW for everything else. The output folder is written whole every few minutes, so an
interrupted run leaves a loadable checkpoint.

Training allocates and frees large buffers all the time. Where fresh pages are slow, let glibc keep them:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_ARENA_MAX=1 python ...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slipstream.examples.demo_corpus import (
    ASSISTANT,
    END,
    ENDOFTEXT,
    SPECIAL_TOKENS,
    USER,
    VOCAB_SIZE,
    WindowSampler,
    chat_samples,
    encode_all,
    load_corpus,
    packed,
    save_tokenizer,
    train_tokenizer,
)

GenerationSettings: Any = GenerationConfig  # typed by hand: its constructor is not
Model = Any  # transformers' model classes are only partly typed

SHORT, LONG = 512, 1024
MICRO_TOKENS = 2048
REPORT = "training_report.json"
RAW_PROMPT = "def read_lines(path):"
CHAT_PROMPT = "Write the function `count_words(text)`. Return the number of words in the text."


@dataclass
class Data:
    """Everything a run reads: the tokenizer, the training rows and the held-out stream."""

    tokenizer: Tokenizer
    sampler: WindowSampler
    heldout: torch.Tensor
    heldout_bytes: int
    facts: dict[str, int]


@dataclass
class Run:
    """Progress of a training run."""

    minutes: float
    steps: int
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    tokens: int = 0

    def progress(self) -> float:
        """Share of the run that is done: by steps when they are given, else by the clock."""
        if self.steps:
            return self.step / self.steps
        return (time.monotonic() - self.started) / (60 * self.minutes)


def prepare_data(seed: int) -> Data:
    """Read the corpus, train the tokenizer and encode all texts."""
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.train)
    files = encode_all(tokenizer, corpus.train)
    chats = encode_all(tokenizer, chat_samples(corpus.train, seed))
    endoftext = SPECIAL_TOKENS.index(ENDOFTEXT)
    heldout = packed(encode_all(tokenizer, corpus.heldout), endoftext)
    facts = {
        "train_files": len(corpus.train),
        "heldout_files": len(corpus.heldout),
        "train_bytes": sum(len(text.encode()) for text in corpus.train),
        "train_tokens": sum(len(ids) for ids in files),
        "chat_samples": len(chats),
        "chat_tokens": sum(len(ids) for ids in chats),
        "heldout_tokens": len(heldout),
    }
    heldout_bytes = sum(len(text.encode()) for text in corpus.heldout)
    sampler = WindowSampler(files, chats, endoftext, seed)
    return Data(tokenizer, sampler, torch.from_numpy(heldout), heldout_bytes, facts)


def all_experts(layer: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Run every expert on every token and weigh the results, zero for those not chosen.

    For experts this small, on a CPU, that is faster than sorting the tokens by expert.
    """
    shares = hidden.new_zeros(len(hidden), layer.num_experts).scatter(1, chosen, weights.to(hidden.dtype))
    both = F.linear(hidden, layer.gate_up_proj.flatten(0, 1)).view(len(hidden), layer.num_experts, -1)
    gate, up = both.chunk(2, dim=-1)
    inner = layer.act_fn(gate) * up * shares[..., None]
    return F.linear(inner.flatten(1), layer.down_proj.transpose(0, 1).flatten(1))


def build_model(kind: str, init: Path | None = None) -> Model:
    """Make an untrained model of about 7 million parameters, or load one to go on with."""
    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
    loaded: Any = LlamaForCausalLM if kind == "dense" else MixtralForCausalLM
    model = loaded.from_pretrained(init) if init else loaded(make_config(kind))
    if kind == "moe":
        model.set_experts_implementation("all_experts")
    return model


def make_config(kind: str) -> LlamaConfig | MixtralConfig:
    """Describe the model: the two kinds differ in depth and in the feed-forward part only."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(ENDOFTEXT),
        "pad_token_id": SPECIAL_TOKENS.index(ENDOFTEXT),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if kind == "dense":
        return LlamaConfig(**shared, intermediate_size=768, num_hidden_layers=8)
    experts: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
    sizes: dict[str, Any] = {"intermediate_size": 128, "num_hidden_layers": 6}
    return MixtralConfig(**shared, **experts, **sizes, sliding_window=None)


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a matrix (or a stack of them) close to one, by Newton-Schulz steps."""
    wide = update.shape[-2] <= update.shape[-1]
    x = update.bfloat16() if wide else update.mT.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = (x if wide else x.mT).float()
    return result


class MasterOptimiser:
    """Muon for the projection matrices, AdamW for the rest, on an fp32 copy of the bf16 parameters."""

    def __init__(self, model: Model, weight_decay: float, muon_ratio: float = 6.0) -> None:
        self.working = list(model.parameters())
        self.master = [parameter.detach().float().clone() for parameter in self.working]
        self.weight_decay, self.muon_ratio = weight_decay, muon_ratio
        named = list(zip((name for name, _ in model.named_parameters()), self.master, strict=True))
        self.muon = [(weight, torch.zeros_like(weight)) for name, weight in named if "proj" in name]
        self.adam = torch.optim.AdamW(
            [weight for name, weight in named if "proj" not in name], betas=(0.9, 0.95), weight_decay=0.0
        )

    def accumulate(self) -> None:
        """Add the gradients of one backward pass to the master gradients."""
        for working, master in zip(self.working, self.master, strict=True):
            if working.grad is None:
                continue
            if master.grad is None:
                master.grad = working.grad.float()
            else:
                master.grad.add_(working.grad)
            working.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Clip, update the master weights and copy them to the model."""
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for weight, momentum in self.muon:
            if weight.grad is None:
                continue
            momentum.lerp_(weight.grad, 0.05)
            update = orthogonalised(weight.grad.lerp(momentum, 0.95))
            rate = lr * self.muon_ratio
            weight.mul_(1 - rate * self.weight_decay)
            weight.add_(update, alpha=-rate * max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5)
        for working, master in zip(self.working, self.master, strict=True):
            working.copy_(master)
            master.grad = None


def learning_rate(progress: float, peak: float, warmup: float = 0.04) -> float:
    """Linear warm-up, then linear decay to zero at the end of the run."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    return peak * max(0.0, 1.0 - progress) / (1.0 - warmup)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Load balancing loss, layer by layer: transformers' own balances only the sum over all layers."""
    logits = torch.stack(router_logits).float()
    chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, logits.shape[-1]).float().sum(2).mean(1)
    return (chosen * logits.softmax(-1).mean(1)).sum(-1).mean() * logits.shape[-1]


def train_step(model: Model, optimiser: MasterOptimiser, ids: torch.Tensor, lr: float) -> float:
    """One optimiser step over a batch, in micro-batches; returns the mean next-token loss."""
    parts = torch.split(ids, max(1, MICRO_TOKENS // ids.shape[1]))
    config, total = model.config, 0.0
    for part in parts:
        if config.model_type == "mixtral":
            output = model(input_ids=part, labels=part, use_cache=False, output_router_logits=True)
            token_loss = output.loss - config.router_aux_loss_coef * output.aux_loss
            balance = balance_loss(output.router_logits, config.num_experts_per_tok)
            loss = token_loss + config.router_aux_loss_coef * balance
        else:
            loss = token_loss = model(input_ids=part, labels=part, use_cache=False).loss
        (loss / len(parts)).backward()
        optimiser.accumulate()
        total += float(token_loss.detach()) / len(parts)
    optimiser.step(lr)
    return total


@torch.no_grad()
def evaluate(model: Model, data: Data, rows: int | None, length: int = SHORT) -> tuple[float, float]:
    """Held-out loss per token and in bits per byte, over at most `rows` windows of `length` tokens."""
    model.eval()
    windows = data.heldout[: len(data.heldout) // length * length].view(-1, length)[:rows]
    losses = [
        float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part) for part in torch.split(windows, 4)
    ]
    model.train()
    loss = sum(losses) / len(windows)
    return loss, loss * len(data.heldout) / data.heldout_bytes / math.log(2)


@torch.no_grad()
def expert_load(model: Model, data: Data, rows: int = 64) -> list[list[float]]:
    """Share of the routed tokens that each expert takes on held-out text, layer by layer."""
    model.eval()
    windows = data.heldout[: rows * SHORT].view(-1, SHORT)
    output = model(input_ids=windows, use_cache=False, output_router_logits=True)
    top_k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    loads = []
    for logits in output.router_logits:
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        loads.append([round(share, 4) for share in (chosen.bincount(minlength=experts) / len(chosen)).tolist()])
    return loads


@torch.no_grad()
def sample(model: Model, data: Data, prompt: str, temperature: float, seed: int = 0) -> str:
    """Complete a prompt, greedily when the temperature is zero."""
    model.eval()
    torch.manual_seed(seed)
    ids = torch.tensor([data.tokenizer.encode(prompt).ids])
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    ends = [SPECIAL_TOKENS.index(token) for token in (ENDOFTEXT, END)]
    config = GenerationSettings(max_new_tokens=160, eos_token_id=ends, pad_token_id=ends[0], **how)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return str(data.tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=False))


def save(model: Model, data: Data, out: Path, report: dict[str, Any]) -> None:
    """Write the checkpoint beside `out`, then move its files into place."""
    staging = out.parent / f".{out.name}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationSettings(
        eos_token_id=[SPECIAL_TOKENS.index(ENDOFTEXT), SPECIAL_TOKENS.index(END)],
        pad_token_id=SPECIAL_TOKENS.index(ENDOFTEXT),
    )
    model.save_pretrained(staging)
    save_tokenizer(data.tokenizer, staging)
    (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):
        os.replace(path, out / path.name)
    staging.rmdir()


def train(model: Model, data: Data, args: argparse.Namespace) -> tuple[Run, float]:
    """Train until the time or the steps run out; returns the progress and the last mean training loss."""
    optimiser, run = MasterOptimiser(model, args.weight_decay), Run(args.minutes, args.steps)
    average, next_eval, next_save = 0.0, 60.0 * args.eval_minutes, 60.0 * args.save_minutes
    while (progress := run.progress()) < 1.0:
        length = LONG if progress > 0.5 and run.step % 2 else SHORT
        rows = args.batch_tokens // length
        ids = torch.from_numpy(data.sampler.batch(rows, length, args.chat_share))
        loss = train_step(model, optimiser, ids, learning_rate(progress, args.lr))
        run.step, run.tokens = run.step + 1, run.tokens + ids.numel()
        average = loss if run.step == 1 else average + (loss - average) * max(0.02, 1 / run.step)
        elapsed = time.monotonic() - run.started
        if run.step % 20 == 0:
            rate = run.tokens / elapsed
            print(f"step {run.step} {progress:.1%} loss {average:.3f} {rate:.0f} tokens/s", flush=True)
        if elapsed >= next_eval:
            loss, bits = evaluate(model, data, rows=32)
            print(f"step {run.step} held-out loss {loss:.3f}, {bits:.3f} bits per byte", flush=True)
            next_eval = elapsed + 60.0 * args.eval_minutes
        if elapsed >= next_save:
            save(model, data, args.out, {"kind": args.kind, "unfinished": True, "steps": run.step})
            next_save = elapsed + 60.0 * args.save_minutes
    return run, average


def final_report(model: Model, data: Data, args: argparse.Namespace, run: Run, loss: float) -> dict[str, Any]:
    """Measure the trained model and collect what its README states."""
    minutes = round((time.monotonic() - run.started) / 60, 1)
    heldout, bits = evaluate(model, data, rows=None)
    long_loss, _ = evaluate(model, data, rows=None, length=LONG)
    chat = f"{USER}\n{CHAT_PROMPT}{END}\n{ASSISTANT}\n"
    report: dict[str, Any] = {
        "kind": args.kind,
        "continued_from": json.loads((args.init / REPORT).read_text()) if args.init else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": args.seed,
        "peak_lr": args.lr,
        "batch_tokens": args.batch_tokens,
        "steps": run.step,
        "tokens_seen": run.tokens,
        "minutes": minutes,
        "train_loss": round(loss, 4),
        "heldout_loss": round(heldout, 4),
        "heldout_bits_per_byte": round(bits, 4),
        "heldout_loss_1024": round(long_loss, 4),
        "corpus": data.facts,
        "samples": {
            f"{name}, temperature {temperature}": sample(model, data, prompt, temperature)
            for name, prompt in ((RAW_PROMPT, RAW_PROMPT), (CHAT_PROMPT, chat))
            for temperature in (0.0, 0.8)
        },
    }
    if args.kind == "moe":
        report["expert_load"] = expert_load(model, data)
    return report


def parse_args() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description="Train a demo checkpoint on the standard library.")
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint of this kind to go on from")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time by the clock")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps, not by the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per optimiser step")
    parser.add_argument("--chat-share", type=float, default=0.22, help="share of chat rows")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-minutes", type=float, default=2.0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    return parser.parse_args()


def main() -> None:
    """Train, measure and save one checkpoint."""
    args = parse_args()
    torch.manual_seed(args.seed)
    data = prepare_data(args.seed)
    print(json.dumps(data.facts), flush=True)
    model = build_model(args.kind, args.init).to(torch.bfloat16).train()
    run, loss = train(model, data, args)
    report = final_report(model, data, args, run, loss)
    print(json.dumps(report, indent=2), flush=True)
    save(model, data, args.out, report)


if __name__ == "__main__":
    main()
