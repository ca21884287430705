"""Attention whose keys come in turns, against all of them at once: what has not come yet is never read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.attention_span import AttentionOptions
from slipstream.kernels.cpu import attention_prefill
from slipstream.kernels.cpu.attention_keys import KeyLayout
from slipstream.kernels.cpu.attention_partial import PartialAttention
from slipstream.kernels.cpu.attention_partial_plan import Run, build_partial_plan
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.tests.kernels.rounding import worst_error

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
HEAD = 16
PLAIN = AttentionOptions(scale=HEAD**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row from ``start`` on, cut at ``borders``; each turn brings the pieces of those numbers."""

    start: int
    borders: tuple[int, ...]
    queries: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]


CASES = {
    "own and nothing else": Case(start=0, borders=(0, 100), queries=(0,), turns=((0,),)),
    "first of two": Case(start=0, borders=(0, 64, 128, 192, 256), queries=(0, 3), turns=((0, 3), (1, 2))),
    "second of two": Case(start=0, borders=(0, 64, 128, 192, 256), queries=(1, 2), turns=((1, 2), (0, 3))),
    "behind a prefix": Case(start=130, borders=(130, 192, 288, 352, 431), queries=(1, 2), turns=((1, 2), (0, 3))),
    "one key behind": Case(start=1, borders=(1, 32, 64, 96, 97), queries=(0, 3), turns=((0, 3), (1, 2))),
    "four turns": Case(
        start=37, borders=(37, 64, 96, 128, 416, 448, 500), queries=(2, 5), turns=((2, 5), (4,), (0, 3), (1,))
    ),
}


@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_size", [4, 32])
def test_turns_add_up(name: str, heads: int, kv_heads: int, window: int | None, block_size: int, seed: int) -> None:
    check(CASES[name], heads=heads, kv_heads=kv_heads, window=window, block_size=block_size, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_other_types_add_up(dtype: torch.dtype, window: int | None, seed: int) -> None:
    for case in CASES.values():
        check(case, heads=4, kv_heads=2, window=window, block_size=16, seed=seed, dtype=dtype)


def test_heads_by_themselves_add_up(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    # No room for the keys of more than one head.
    monkeypatch.setattr(attention_prefill, "GATHER_BYTES", 1)
    check(CASES["behind a prefix"], heads=6, kv_heads=3, window=None, block_size=16, seed=seed)


@pytest.mark.parametrize("window", [None, 20])
def test_caps_and_sinks_add_up(window: int | None, seed: int) -> None:
    sinks_N = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    options = AttentionOptions(scale=HEAD**-0.5, soft_cap=1.5, sinks_N=sinks_N)
    for case in CASES.values():
        check(case, heads=6, kv_heads=2, window=window, block_size=16, seed=seed, options=options)


def check(
    case: Case,
    *,
    heads: int,
    kv_heads: int,
    window: int | None,
    block_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    options: AttentionOptions = PLAIN,
) -> None:
    random = np.random.default_rng(seed)
    end = case.borders[-1]
    blocks = -(-end // block_size)
    table = random.permutation(blocks + 3)[:blocks].astype(np.int32)
    complete = torch.full((2, blocks + 3, kv_heads, block_size, HEAD), float("nan"), dtype=dtype)
    complete[:, table] = torch.from_numpy(random.standard_normal((2, blocks, kv_heads, block_size, HEAD))).to(dtype)
    q_TND = torch.from_numpy(random.standard_normal((end - case.start, heads, HEAD))).to(dtype)
    expected_TND = at_once(case, q_TND, complete, table, window, options)

    layout = KeyLayout(block_size=block_size, kv_heads=kv_heads, window=window, dtype=dtype, device=CPU)
    pieces = [Run(start=first, end=last) for first, last in zip(case.borders, case.borders[1:], strict=False)]
    own = [pieces[number] for number in case.queries]
    places = np.concatenate([np.arange(run.start - case.start, run.end - case.start) for run in own])
    queries, token = [], 0
    for run in own:
        queries.append(Run(start=run.start, end=run.end, token=token))
        token += run.end - run.start
    cache = torch.full_like(complete, float("nan"))
    copy(complete, cache, table, Run(start=0, end=case.start))
    workspace = AttentionWorkspace(dtype=dtype, device=CPU)
    partial = PartialAttention(tokens=token, heads=heads, kv_heads=kv_heads, head_size=HEAD, device=CPU)
    for turn, numbers in enumerate(case.turns):
        keys = [pieces[number] for number in numbers]
        for run in keys:
            copy(complete, cache, table, run)
        if turn == 0 and case.start:
            keys = [Run(start=0, end=case.start), *keys]
        plan = build_partial_plan(queries, sorted(keys, key=lambda run: run.start), table, layout)
        if plan is not None:
            partial.attend(q_TND[places], cache, plan, options, first=turn == 0, workspace=workspace)
    found_TND = partial.finish(dtype, options)
    assert found_TND.dtype == dtype
    error = worst_error(found_TND, expected_TND[places].double().numpy())
    assert error <= BOUNDS[dtype], f"{error:.2e}"


def at_once(
    case: Case,
    q_TND: torch.Tensor,
    cache: torch.Tensor,
    table: np.ndarray,
    window: int | None,
    options: AttentionOptions,
) -> torch.Tensor:
    plan = build_attention_plan(
        starts=np.array([case.start], np.int32),
        counts=np.array([len(q_TND)], np.int32),
        block_tables=table[None],
        block_size=cache.shape[3],
        heads=q_TND.shape[1],
        kv_heads=cache.shape[2],
        head_size=q_TND.shape[2],
        window=window,
        dtype=cache.dtype,
        device=CPU,
    )
    workspace = AttentionWorkspace(dtype=cache.dtype, device=CPU)
    prepared = prepare_attention(plan, cache, tokens=len(q_TND), heads=q_TND.shape[1], workspace=workspace)
    return paged_attention(
        q_TND, cache, prepared, scale=options.scale, soft_cap=options.soft_cap, sinks_N=options.sinks_N
    )


def copy(source: torch.Tensor, target: torch.Tensor, table: np.ndarray, run: Run) -> None:
    """Write a run's keys; a block that it begins or ends in the middle of holds numbers elsewhere, as in the cache."""
    size = source.shape[3]
    for position in range(run.start, run.end):
        block, offset = int(table[position // size]), position % size
        if bool(target[:, block].isnan().all()):
            target[:, block] = 0.0 if run.start % size or run.end % size else float("nan")
        target[:, block, :, offset] = source[:, block, :, offset]


def test_a_turn_without_a_visible_key_is_left_out() -> None:
    layout = KeyLayout(block_size=16, kv_heads=1, window=8, dtype=torch.float32, device=CPU)
    table = np.arange(20, dtype=np.int32)
    queries = [Run(start=160, end=192)]
    for keys in (Run(start=192, end=256), Run(start=0, end=144)):
        assert build_partial_plan(queries, [keys], table, layout) is None
    assert build_partial_plan(queries, [Run(start=144, end=160)], table, layout) is not None
