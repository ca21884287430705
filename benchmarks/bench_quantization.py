"""What quantization costs in quality: perplexity of the demo model on text that it was not trained on.

Scores the held-out files of the demo model's corpus (Python's standard library; which files is decided by a hash, as in
training) in windows of the model's length, with each ``quantization``, and prints perplexity per token, bits per byte,
and the change against no quantization.

    python -P benchmarks/bench_quantization.py --json benchmarks/results/quantization.json
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from slipstream import LLM, SamplingParams
from slipstream.benchmarks.report import write_report

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WINDOW = 512
FORMATS = (("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well one format predicts the text."""

    quantization: str
    dtype: str
    tokens: int
    perplexity: float
    bits_per_byte: float


def held_out_texts(most_chars: int) -> list[str]:
    """Return the beginnings of held-out files, ``most_chars`` in all."""
    # The script that trained the model lies beside the package, not in it.
    sys.path.append(str(EXAMPLES))
    from demo_corpus import load_corpus  # type: ignore[import-not-found]  # noqa: PLC0415

    texts, left = [], most_chars
    for text in load_corpus().heldout:
        texts.append(text[: min(left, 4000)])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def measure(model: Path, quantization: str, dtype: str, texts: list[str]) -> Quality:
    """Score every text in windows; the first token of each is given."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with LLM(str(model), quantization=quantization, dtype=dtype, max_model_len=WINDOW + 1) as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the demo model has a tokenizer"
        windows = []
        for text in texts:
            ids = tokenizer.encode(text)
            windows += [ids[begin : begin + WINDOW] for begin in range(0, len(ids) - 1, WINDOW)]
        windows = [window for window in windows if len(window) > 1]
        outputs = llm.generate([{"prompt_token_ids": window} for window in windows], params)
        total, scored, size = 0.0, 0, 0
        for window, output in zip(windows, outputs, strict=True):
            tables = (output.prompt_logprobs or [])[1:]
            total -= sum((table or {})[token].logprob for token, table in zip(window[1:], tables, strict=True))
            scored += len(tables)
            size += len(tokenizer.decode(window[1:]).encode())
    return Quality(
        quantization=quantization,
        dtype=dtype,
        tokens=scored,
        perplexity=math.exp(total / scored),
        bits_per_byte=total / math.log(2) / size,
    )


def main() -> None:
    """Measure and print every format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a little text")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "demo_model")
    options = parser.parse_args()
    texts = held_out_texts(6_000 if options.quick else 120_000)
    results: list[Quality] = []
    for quantization, dtype in FORMATS:
        quality = measure(options.model, quantization, dtype, texts)
        results.append(quality)
        change = quality.perplexity / results[0].perplexity - 1
        print(
            f"{quantization:5} {dtype:9} perplexity {quality.perplexity:8.4f} ({change:+.2%}), "
            f"{quality.bits_per_byte:.4f} bits per byte, {quality.tokens} tokens",
            flush=True,
        )
    if options.json:
        write_report(options.json, "quantization", {"formats": [asdict(quality) for quality in results]})


if __name__ == "__main__":
    main()
