"""Ask the bundled model through its chat template, and look at what it costs.

python -P examples/chat.py [QUESTION ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from slipstream import LLM, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
QUESTION = "Write the function `count_lines(path)`. Return the number of lines in a file."


def main() -> None:
    """Ask one question and print answer and timings."""
    question = " ".join(sys.argv[1:]) or QUESTION
    with LLM(DEMO_MODEL) as llm:
        messages = [{"role": "user", "content": question}]
        output = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=120))[0]
        sample = output.outputs[0]
        print(sample.text)
        metrics = output.metrics
        print(
            f"-- {len(output.prompt_token_ids)} prompt tokens, {len(sample.token_ids)} new ones, ended by "
            f"{sample.finish_reason}; first token after {(metrics.ttft_s or 0) * 1e3:.0f} ms, "
            f"{(metrics.tpot_s(len(sample.token_ids)) or 0) * 1e3:.1f} ms per token",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
