"""Generate for several prompts at once, then stream one, on the bundled model.

python -P examples/generate.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

from slipstream import LLM, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
PROMPTS = ["def read_config(path):", "class Node:\n    def __init__(self", "import os\nimport sys\nimport"]


def main() -> None:
    """Show the two ways to generate."""
    model = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL
    with LLM(model) as llm:
        sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=48, n=2)
        for output in llm.generate(PROMPTS, sampled):
            for sample in output.outputs:
                print(f"--- {output.prompt!r}, sample {sample.index} ({sample.finish_reason})")
                print(sample.text)

        print("--- streamed, greedy")
        for piece in llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=48)):
            print(piece.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
