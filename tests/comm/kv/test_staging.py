"""KV of a device on its way through buffers of the host. The contract of transports is kept in ``test_transports``."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from slipstream.comm.errors import CommMisuse, CommTimeout
from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.incoming import Outcome
from slipstream.comm.kv.memory import KvMemory
from slipstream.comm.kv.staging import HostCopier, StagedStore, StagingLimits
from slipstream.comm.kv.tensor_memory import memory_of, store_of
from slipstream.placement.kv_routes import KvLayout, token_cuts
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, truth
from slipstream.tests.comm.kv.kv_ends import join_staged, staged
from slipstream.tests.contracts.kv_transport import NUM_BLOCKS, ROW_BYTES, Bed, End, end_of

LAYOUT = KvLayout(layers=2, kv_heads=4, block_size=4)
FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("parts", [2, 1])
def test_staged_runs_are_those_of_memory(parts: int, seed: int) -> None:
    """For whole blocks and parts of them, all heads and some, neighbours and none."""
    draw = np.random.default_rng(seed)
    end = end_of("decode-0", LAYOUT, 0, parts=parts)
    end.kv.array[:] = draw.integers(0, 256, end.kv.array.shape, dtype=np.uint8)
    store, memory = staged(end), end.kv.memory
    for first, stop, other, heads in [
        (0, 16, 4, range(4)),
        (3, 17, 4, range(1, 3)),
        (0, 12, 3, range(3, 4)),
        (0, 12, 4, range(4)),
    ]:
        for blocks in ([5, 6, 7, 9, 1], [0, 1, 2, 9, 4], draw.permutation(NUM_BLOCKS)[:5].tolist()):
            cuts = token_cuts(range(first, stop), (4, other))
            passage = store.outward(1, heads, cuts, blocks)
            assert b"".join(passage.runs) == b"".join(memory.runs(1, heads, cuts, blocks))
            passage.end()
            what = draw.integers(0, 256, passage.runs.num_bytes, dtype=np.uint8).tobytes()
            inward = store.inward(1, heads, cuts, blocks)
            before = end.kv.array.copy()
            inward.runs[0][:] = what
            assert np.array_equal(before, end.kv.array), "nothing is stored before it is said"
            inward.store()
            inward.end()
            assert b"".join(memory.runs(1, heads, cuts, blocks)) == what


def caches(dtype: torch.dtype, parts: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(parts, 7, 3, 4, 8, generator=draw) * 100).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("parts", [2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_of_8_bits_cross_and_are_rounded_once(dtype: torch.dtype, parts: int, seed: int) -> None:
    """What is sent is what a cache of 8 bits sends as it is, and a cache of either kind takes it."""
    wide = caches(dtype, parts, seed)
    rounded = [layer.float().clamp(-448, 448).to(FLOAT8) for layer in wide]
    other = [torch.zeros_like(layer) for layer in wide]
    sender, small, receiver = (
        store_of(layers, first_layer=5, heads=range(3), wire=FLOAT8) for layers in (wide, rounded, other)
    )
    assert isinstance(sender, StagedStore) and isinstance(small, KvMemory)
    assert sender.shape == small.shape and sender.shape.entry_bytes == parts * 8
    for first, stop, heads in ((0, 12, range(3)), (3, 18, range(1, 3)), (1, 2, range(1))):
        cuts, blocks = token_cuts(range(first, stop), (4, 3)), [2, 3, 4, 6, 1]
        out, inward = sender.outward(6, heads, cuts, blocks), receiver.inward(6, heads, cuts, blocks)
        assert out.runs.num_bytes == parts * len(heads) * (stop - first) * 8
        assert b"".join(out.runs) == b"".join(small.runs(6, heads, cuts, blocks))
        inward.runs[0][:] = out.runs[0]
        inward.store()
        for each in (out, inward):
            each.end()
        for position in range(first, stop):
            at = (slice(None), blocks[position // 4], slice(heads.start, heads.stop), position % 4)
            assert torch.equal(other[1][at], rounded[1].to(dtype)[at])
    assert not other[0].any() and not other[1][:, [0, 5]].any()


def test_what_crosses_as_it_is_is_not_staged() -> None:
    layers = caches(torch.bfloat16, 2, 1)
    for wire in (None, torch.bfloat16):
        assert isinstance(store_of(layers, first_layer=0, heads=range(3), wire=wire), KvMemory)


def test_class_12_buffers_run_out_and_come_back() -> None:
    store = staged(end_of("decode-0", LAYOUT, 0), buffers=2, timeout_s=0.05)
    asked = (0, range(4), [0, 4], [3])
    lent = [store.inward(*asked), store.inward(*asked)]
    with pytest.raises(CommTimeout, match="all 2 buffers for staging KV are in use"):
        store.inward(*asked)
    # What goes out has its own.
    store.outward(*asked).end()
    lent[0].end()
    lent[0].end()
    store.inward(*asked).end()
    with pytest.raises(CommMisuse, match="staging needs buffers"):
        StagingLimits(buffers=0)


def test_class_15_what_is_not_right_does_not_reach_the_cache(seed: int) -> None:
    """Its checksum is looked at while it is still in a buffer."""
    with ExitStack() as stack:
        source, target = end_of("prefill-0", LAYOUT, 0), end_of("decode-0", LAYOUT, 0)
        bed = Bed(source, target, join_staged(stack, "tcp", source, target, limits=StreamLimits(streams=1)))
        source.kv.write(0, range(4), [1], truth(LAYOUT, 4, ROW_BYTES, seed))
        post = bed.open(1, range(4), [1], [2])[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slipstream.comm.kv.line.frame_checksum", lambda frame, runs: 1)
            bed.post_all([post])
            bed.wait(lambda: len(target.written()) == 1, "the write ends")
        assert target.written()[0].outcome is Outcome.BAD_CHECKSUM
        assert (target.kv.array == UNTOUCHED).all()


def test_a_fetch_comes_after_what_was_marked() -> None:
    """The step's thread says so before the frames are posted."""
    said: list[str] = []

    class Noting(HostCopier):
        def mark(self) -> None:
            said.append("mark")

        def fetch(self, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
            said.append("fetch")
            super().fetch(rows, index, out)

    end: End = end_of("prefill-0", LAYOUT, 0)
    layers = [torch.from_numpy(layer) for layer in end.kv.array]
    store = StagedStore(end.kv.memory.shape, layers, Noting())
    store.mark()
    store.outward(0, range(4), [0, 4], [3]).end()
    assert said == ["mark", "fetch"]
    with pytest.raises(CommMisuse, match="1 layers of a device's KV are not what its shape says"):
        StagedStore(end.kv.memory.shape, layers[:1], Noting())


def test_which_caches_are_memory() -> None:
    layers = [torch.zeros(2, 5, 3, 4, 8) for _ in range(2)]
    assert isinstance(store_of(layers, first_layer=0, heads=range(3)), KvMemory)
    elsewhere = [layer.to("meta") for layer in layers]
    for make in (store_of, memory_of):
        with pytest.raises(CommMisuse, match="not meta"):
            make(elsewhere, first_layer=0, heads=range(3))
    mixed = [layers[0], cast(torch.Tensor, SimpleNamespace(device="x", is_contiguous=lambda: True))]
    with pytest.raises(CommMisuse, match="on one device"):
        store_of(mixed, first_layer=0, heads=range(3))


@pytest.mark.gpu
def test_a_gpu_gives_and_takes(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.randn(2, 9, 4, 4, 8, generator=draw).to("cuda", torch.bfloat16) for _ in range(2)]
    host = [layer.cpu() for layer in layers]
    store, memory = (store_of(each, first_layer=0, heads=range(4)) for each in (layers, host))
    assert isinstance(memory, KvMemory)
    layers[1].mul_(2)
    host[1].mul_(2)
    store.mark()
    cuts, blocks = token_cuts(range(1, 19), (4, 4)), [3, 4, 8, 1, 0]
    out = store.outward(1, range(1, 3), cuts, blocks)
    assert b"".join(out.runs) == b"".join(memory.runs(1, range(1, 3), cuts, blocks))
    inward = store.inward(0, range(1, 3), cuts, blocks)
    inward.runs[0][:] = out.runs[0]
    inward.store()
    at = 0
    for run in memory.runs(0, range(1, 3), cuts, blocks):
        run[:] = out.runs[0][at : at + len(run)]
        at += len(run)
    inward.end()
    out.end()
    assert torch.equal(layers[0].cpu(), host[0])
