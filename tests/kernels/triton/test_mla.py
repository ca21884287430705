"""Multi-head latent attention: kernels against the reference, the reference against transformers' DeepSeek-V2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.attention_items import decode_items, prefill_items
from slipstream.kernels.mla import mla_decode
from slipstream.kernels.mla_prefill import mla_prefill, mla_prefill_tile_rows
from slipstream.kernels.mla_span import MlaOptions, mla_reference

CPU = torch.device("cpu")
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WAYS = [*((dtype, False) for dtype in CLOSE), (torch.bfloat16, True)]
"""Types, and whether the bits are to be the same in decoding and prefill."""
LATENT, ROPE, BLOCK = 32, 16, 8
OPTIONS = MlaOptions(scale=0.2, latent=LATENT)


def random_cache(last_positions: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Return a cache and block tables of rows: what no row has written is NaN, tables' rests are no blocks."""
    counts = [position // BLOCK + 1 for position in last_positions]
    tables = np.full((len(counts), max(counts, default=0) + 1), 1 << 30, np.int32)
    blocks = torch.randperm(sum(counts) + 3).numpy().astype(np.int32)
    cache_BSW = torch.full((len(blocks), BLOCK, LATENT + ROPE), math.nan)
    for row, (count, last) in enumerate(zip(counts, last_positions, strict=True)):
        own, blocks = blocks[:count], blocks[count:]
        tables[row, :count] = own
        latents = torch.randn(count * BLOCK, LATENT + ROPE)
        latents[last + 1 :] = math.nan
        cache_BSW[torch.from_numpy(own).long()] = latents.view(count, BLOCK, -1)
    return cache_BSW.to(dtype), tables


def decode(
    q_TNW: torch.Tensor, cache_BSW: torch.Tensor, positions: list[int], tables: np.ndarray, options: MlaOptions
) -> torch.Tensor:
    tokens = np.arange(len(positions))
    items = decode_items(np.array(positions), tokens, tables, window=None, device=CPU)
    out_TNL = torch.empty(*q_TNW.shape[:2], LATENT, dtype=q_TNW.dtype)
    mla_decode(q_TNW, cache_BSW, items, options, out_TNL)
    return out_TNL


def prefill(
    q_TNW: torch.Tensor,
    cache_BSW: torch.Tensor,
    chunks: list[tuple[int, int]],
    tables: np.ndarray,
    options: MlaOptions,
    capacity: int | None = None,
) -> torch.Tensor:
    """Chunks are (first position, number), side by side in the batch."""
    starts, counts = np.array(chunks, np.int32).reshape(-1, 2).T
    heads = q_TNW.shape[1]
    items = prefill_items(
        starts,
        counts,
        np.cumsum(counts) - counts,
        tables,
        heads_per_kv=heads,
        tile_rows=mla_prefill_tile_rows(heads, q_TNW.dtype, options),
        device=CPU,
        capacity=capacity,
    )
    out_TNL = torch.empty(*q_TNW.shape[:2], LATENT, dtype=q_TNW.dtype)
    mla_prefill(q_TNW, cache_BSW, items, options, out_TNL)
    return out_TNL


def expected(
    q_TNW: torch.Tensor, cache_BSW: torch.Tensor, positions: list[int], tables: np.ndarray, options: MlaOptions
) -> torch.Tensor:
    return mla_reference(q_TNW, cache_BSW, torch.tensor(positions), torch.from_numpy(tables), options)


@pytest.mark.parametrize(("dtype", "deterministic"), WAYS)
@pytest.mark.parametrize(("heads", "positions"), [(16, [0, 512, 7]), (3, [40, 0]), (70, [3])])
def test_decode(heads: int, positions: list[int], deterministic: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    if dtype == torch.float16:
        # Interpreted, keys take their time.
        positions = [min(position, 50) for position in positions]
    cache_BSW, tables = random_cache(positions, dtype)
    q_TNW = torch.randn(len(positions), heads, LATENT + ROPE, dtype=dtype)
    options = MlaOptions(scale=0.2, latent=LATENT, deterministic=deterministic)
    found = decode(q_TNW, cache_BSW, positions, tables, options)
    torch.testing.assert_close(
        found, expected(q_TNW, cache_BSW, positions, tables, options), rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )


@pytest.mark.parametrize(("dtype", "deterministic"), WAYS)
@pytest.mark.parametrize("heads", [3, 70])
def test_prefill(heads: int, deterministic: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    chunks = [(0, 5), (511, 2), (30, 1)] if heads == 3 else [(14, 3), (0, 1)]
    cache_BSW, tables = random_cache([start + count - 1 for start, count in chunks], dtype)
    positions = [start + place for start, count in chunks for place in range(count)]
    rows = [row for row, (_, count) in enumerate(chunks) for _ in range(count)]
    # Neither heads nor tokens side by side.
    q_TNW = torch.randn(heads, len(positions), LATENT + ROPE, dtype=dtype).transpose(0, 1)
    options = MlaOptions(scale=0.2, latent=LATENT, deterministic=deterministic)
    found = prefill(q_TNW, cache_BSW, chunks, tables, options, capacity=40)
    torch.testing.assert_close(
        found, expected(q_TNW, cache_BSW, positions, tables[rows], options), rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )


def test_a_float8_cache(seed: int) -> None:
    torch.manual_seed(seed)
    positions, dtype = [70, 3], torch.bfloat16
    cache_BSW, tables = random_cache(positions, torch.float32)
    cache_BSW = (cache_BSW * 4).to(torch.float8_e4m3fn)
    q_TNW = torch.randn(2, 4, LATENT + ROPE, dtype=dtype)
    options = MlaOptions(scale=0.2, latent=LATENT, cache_scale=0.25)
    want = expected(q_TNW, cache_BSW, positions, tables, options)
    for found in (
        decode(q_TNW, cache_BSW, positions, tables, options),
        prefill(q_TNW, cache_BSW, [(70, 1), (3, 1)], tables, options),
    ):
        torch.testing.assert_close(found, want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize(("heads", "dtype", "longest"), [(20, torch.float32, 40), (5, torch.bfloat16, 512)])
def test_a_row_has_the_same_bits_in_any_company_and_any_chunk(
    heads: int, dtype: torch.dtype, longest: int, seed: int
) -> None:
    torch.manual_seed(seed)
    options = MlaOptions(scale=0.2, latent=LATENT, deterministic=True)
    last = [3, longest, 20]
    cache_BSW, tables = random_cache(last, dtype)
    q_TNW = torch.randn(3, heads, LATENT + ROPE, dtype=dtype)
    together = decode(q_TNW, cache_BSW, last, tables, options)
    for rows in ([0], [1], [2, 0]):
        found = decode(q_TNW[rows], cache_BSW, [last[row] for row in rows], tables[rows], options)
        assert torch.equal(found, together[rows])
    # A chunk that ends where the longest row stands, in the span behind its beginning.
    chunk_TNW = torch.randn(3, heads, LATENT + ROPE, dtype=dtype)
    chunk_TNW[-1] = q_TNW[1]
    found = prefill(chunk_TNW, cache_BSW, [(longest - 2, 3)], tables[1:2], options)
    assert torch.equal(found[-1], together[1])
    assert torch.equal(found[:1], decode(chunk_TNW[:1], cache_BSW, [longest - 2], tables[1:2], options))


def test_nothing_to_do_and_padding() -> None:
    cache_BSW = torch.full((2, BLOCK, LATENT + ROPE), math.nan)
    tables = np.zeros((0, 1), np.int32)
    assert decode(torch.empty(0, 4, LATENT + ROPE), cache_BSW, [], tables, OPTIONS).shape == (0, 4, LATENT)
    assert prefill(torch.empty(0, 4, LATENT + ROPE), cache_BSW, [], tables, OPTIONS).shape == (0, 4, LATENT)
    items = decode_items(
        np.array([-1]), np.zeros(1, int), np.zeros((1, 1), np.int32), window=None, device=CPU, capacity=6
    )
    out_TNL = torch.empty(1, 4, LATENT)
    mla_decode(torch.randn(1, 4, LATENT + ROPE), cache_BSW, items, OPTIONS, out_TNL)
    assert not out_TNL.any()


def test_on_a_cpu_it_is_the_reference(seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    backends.use("torch")
    cache_BSW, tables = random_cache([20, 9], torch.float32)
    q_TNW = torch.randn(2, 4, LATENT + ROPE)
    want = expected(q_TNW, cache_BSW, [20, 9], tables, OPTIONS)
    assert torch.equal(decode(q_TNW, cache_BSW, [20, 9], tables, OPTIONS), want)
    assert torch.equal(prefill(q_TNW, cache_BSW, [(20, 1), (9, 1)], tables, OPTIONS), want)
    assert not launches


def test_what_does_not_fit_is_refused() -> None:
    cache_BSW, tables = torch.zeros(2, BLOCK, LATENT + ROPE), np.zeros((1, 1), np.int32)
    q_TNW = torch.zeros(1, 4, LATENT + ROPE)
    with pytest.raises(ValueError, match="powers of two"):
        decode(torch.zeros(1, 4, LATENT + 24), cache_BSW, [0], tables, OPTIONS)
    with pytest.raises(ValueError, match="cache must be"):
        decode(q_TNW, cache_BSW[..., 1:], [0], tables, OPTIONS)
    with pytest.raises(ValueError, match="float8"):
        decode(q_TNW, cache_BSW.half(), [0], tables, OPTIONS)
    with pytest.raises(ValueError, match="out must be"):
        mla_decode(
            q_TNW,
            cache_BSW,
            decode_items(np.zeros(1, int), np.zeros(1, int), tables, window=None, device=CPU),
            OPTIONS,
            torch.empty(1, 4, LATENT + 1),
        )
    items = prefill_items(
        np.zeros(1, int), np.ones(1, int), np.zeros(1, int), tables, heads_per_kv=4, tile_rows=128, device=CPU
    )
    with pytest.raises(ValueError, match="tiles of 128 rows"):
        mla_prefill(q_TNW, cache_BSW, items, OPTIONS, torch.empty(1, 4, LATENT))


def test_the_reference_is_what_transformers_compute(seed: int) -> None:
    """Absorbed queries over latents are the heads' own queries, keys and values (arXiv 2405.04434, section 2.1.2)."""
    from transformers import DeepseekV2Config  # noqa: PLC0415 (slow to import, and only needed here)
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import (  # noqa: PLC0415
        DeepseekV2Attention,
        apply_rotary_emb,
    )

    torch.manual_seed(seed)
    heads, nope, values, tokens = 4, 24, 20, 11
    config = DeepseekV2Config(
        hidden_size=48,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=nope,
        v_head_dim=values,
        attn_implementation="eager",
    )
    attention = DeepseekV2Attention(config, layer_idx=0).eval()
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x_1TH = torch.randn(1, tokens, 48)
    angles_TR = torch.rand(tokens, ROPE // 2) * 6
    rotations = torch.polar(torch.ones_like(angles_TR), angles_TR)[None]
    causal = torch.full((tokens, tokens), -math.inf).triu(1)[None, None]
    with torch.no_grad():
        want_TH = attention(x_1TH, attention_mask=causal, position_embeddings=rotations)[0][0]
        q_TND = attention.q_proj(x_1TH).view(1, tokens, heads, -1)
        latent_TL, k_rope = attention.kv_a_proj_with_mqa(x_1TH).split([LATENT, ROPE], -1)
        latent_TL = attention.kv_a_layernorm(latent_TL)
        q_rope, k_rope = apply_rotary_emb(q_TND[..., nope:].transpose(1, 2), k_rope[:, None], rotations)
        up_NOL = attention.kv_b_proj.weight.view(heads, nope + values, LATENT)
        absorbed_TNL = torch.einsum("tnd,ndl->tnl", q_TND[0, ..., :nope], up_NOL[:, :nope])
        q_TNW = torch.cat((absorbed_TNL, q_rope[0].transpose(0, 1)), -1)
        cache_BSW = torch.full((2 * BLOCK, LATENT + ROPE), math.nan)
        cache_BSW[:tokens] = torch.cat((latent_TL[0], k_rope[0, 0]), -1)
        options = MlaOptions(scale=attention.scaling, latent=LATENT)
        found_TNL = prefill(
            q_TNW, cache_BSW.view(2, BLOCK, -1), [(0, tokens)], np.arange(2, dtype=np.int32)[None], options
        )
        heads_TNV = torch.einsum("tnl,nvl->tnv", found_TNL, up_NOL[:, nope:])
        found_TH = attention.o_proj(heads_TNV.flatten(1))
    torch.testing.assert_close(found_TH, want_TH, rtol=1e-4, atol=1e-4)
