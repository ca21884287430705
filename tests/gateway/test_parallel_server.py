"""A server whose replica is four processes: the same text as one, and a rank that is killed."""

from __future__ import annotations

from pathlib import Path

import psutil

from slipstream import LLM, SamplingParams
from slipstream.tests.gateway.server_process import eventually, make_model, running_server

PROMPT = "The quick brown fox"
TOKENS = 24


def test_four_ranks_serve_what_one_does_and_come_back_when_one_is_killed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with LLM(str(model), num_threads=1) as llm:
        output = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))[0]
    expected = output.outputs[0].text
    with running_server(model, tmp_path / "log", "-tp", "2", "-pp", "2", "--num-threads", "1") as server:

        def ask(tokens: int = TOKENS) -> str:
            answer = server.openai.completions.create(
                model="model", prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        assert ask() == expected
        for stage in range(2):
            wire_s, hidden_s = (
                server.metric(f'slipstream_{name}_seconds_total{{stage="{stage}"}}') for name in ("wire", "wire_hidden")
            )
            assert wire_s > 0.0, "each layer's sums"
            assert hidden_s == 0.0, "nothing to hide them behind was asked for"
        ranks = server.driver().children()
        assert len(ranks) == 3
        unbroken = ask(600)
        stream = server.openai.completions.create(
            model="model", prompt=PROMPT, max_tokens=600, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = next(iter(stream)).choices[0].text
        ranks[1].kill()
        # All ranks start again, and go on with the tokens that were drawn.
        assert text + "".join(event.choices[0].text for event in stream) == unbroken
        assert server.metric("slipstream_requests_moved_total") == 1
        eventually(lambda: not any(psutil.pid_exists(rank.pid) for rank in ranks), what="the other ranks ended")
        eventually(server.is_ready, what="ready again")
        assert ask() == expected
        assert server.everything_is_free()
