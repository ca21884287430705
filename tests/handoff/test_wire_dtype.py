"""Numbers of 8 bits between ranks' ends: what either kind of cache has of them, and who is refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from slipstream.comm.kv.transfer import RankBroken, RankDone
from slipstream.tests.handoff.rank_beds import Replica, layout_with, prompt

TOKENS = 37
FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind", ["tcp", "shm"])
@pytest.mark.parametrize(("cache", "wire"), [(FLOAT8, "auto"), (FLOAT8, "fp8"), (torch.bfloat16, "fp8")])
def test_numbers_of_8_bits_cross_to_either_cache(cache: torch.dtype, wire: str, kind: str, seed: int) -> None:
    """Half the bytes; what has no fraction left to lose comes as it was."""
    ours, theirs = layout_with(tp=2), layout_with(block_size=3)
    small = prompt(ours, TOKENS, seed) & 0xF7
    kept = {FLOAT8: small, torch.bfloat16: torch.from_numpy(small).view(FLOAT8).bfloat16().view(torch.uint8).numpy()}
    with ExitStack() as stack:
        prefill, decode = (
            Replica(name, layout, kinds=(kind,), row_bytes=8 * dtype.itemsize, dtype=dtype, wire_dtype=wire)
            for name, layout, dtype, wire in (
                ("prefill-0", ours, torch.bfloat16, "fp8"),
                ("decode-0", theirs, cache, wire),
            )
        )
        for replica in (prefill, decode):
            stack.callback(replica.ranks.close)
        transfer, tokens = prefill.transfer(1), range(TOKENS)
        blocks, there = list(range(20, 0, -1)), list(range(3, 20))
        decode.open_receive(transfer, ours, tokens, there)
        prefill.open_send(1, decode, tokens, there)
        prefill.compute(1, tokens, blocks, kept[torch.bfloat16])
        decode.wait_all(RankDone, transfer)
        assert decode.caches[0].holds(tokens, there, kept[cache])
        decode.shut(transfer)
        prefill.shut(transfer)
        assert decode.ranks.moved().bytes_in == 2 * ours.layers * ours.kv_heads * TOKENS * 8
        assert prefill.ranks.moved().bytes_out == decode.ranks.moved().bytes_in


def test_who_sends_numbers_of_another_type_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        prefill, decode = (
            Replica(name, layout_with(), row_bytes=16, dtype=torch.bfloat16, wire_dtype=wire)
            for name, wire in (("prefill-0", "fp8"), ("decode-0", "auto"))
        )
        for replica in (prefill, decode):
            stack.callback(replica.ranks.close)
        prefill.open_send(1, decode, range(TOKENS), list(range(10)))
        prefill.wait(lambda said: any(isinstance(word, RankBroken) for word in said))
        assert "dtype is 'bfloat16' here and 'float8_e4m3fn' there" in caplog.text
