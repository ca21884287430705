"""From routes to bytes: in any two layouts each byte of a target is written once, with the right one of the source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from slipstream.comm.errors import BadFrame, CommMisuse
from slipstream.comm.kv.checksum import frame_checksum
from slipstream.comm.kv.coverage import Claim, Coverage, Part
from slipstream.comm.kv.frame import HEADER_BYTES, KvFrame, pack_header, token_runs, unpack_header
from slipstream.comm.kv.memory import KvMemory
from slipstream.comm.kv.runs import KvShape
from slipstream.comm.kv.tensor_memory import memory_of
from slipstream.comm.kv.transfer import TransferId
from slipstream.comm.mesh import MeshShape
from slipstream.placement.kv_routes import KvLayout, kv_routes, token_cuts
from slipstream.runtime.models.model_spec import ModelSpec
from slipstream.runtime.models.sharding import Shard
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, RankKv, truth

DEGREES = (1, 2, 4, 8, 16)
ROW_BYTES = 2
FRAME = KvFrame(
    transfer=TransferId("prefill-0", 7, 1 << 40),
    generation=2,
    receiver=1 << 50,
    layer=3,
    first_head=4,
    num_heads=2,
    first_token=1 << 33,
    num_tokens=5,
)


def move(source: KvLayout, target: KvLayout, tokens: int, first: int, seed: int, *, parts: int = 2) -> None:
    """Move a prompt's KV from all ranks to all ranks, and check every byte of every target."""
    draw = np.random.default_rng(seed)
    what = truth(source, tokens, ROW_BYTES, seed, parts=parts)
    ends, tables = [], []
    for layout in (source, target):
        count = -(-tokens // layout.block_size)
        sizes = {"num_blocks": count + 3, "row_bytes": ROW_BYTES, "parts": parts}
        ends.append([RankKv(layout, rank, **sizes) for rank in range(layout.ranks)])
        tables.append(draw.permutation(count + 3)[:count].tolist())
    written = [RankKv(target, rank, **sizes) for rank in range(target.ranks)]
    for kv in ends[0]:
        for layer in kv.layers:
            kv.write(layer, range(tokens), tables[0], what)
    for kv in written:
        kv.array[:] = 0
    cuts = token_cuts(range(first, tokens), (source.block_size, target.block_size))
    for route in kv_routes(source, target):
        for layer in route.layers:
            sent = b"".join(ends[0][route.source].memory.runs(layer, route.heads, cuts, tables[0]))
            stored(ends[1][route.target].memory.runs(layer, route.heads, cuts, tables[1]), sent)
            for run in written[route.target].memory.runs(layer, route.heads, cuts, tables[1]):
                np.frombuffer(run, dtype=np.uint8)[:] += 1
    for kv, counts in zip(ends[1], written, strict=True):
        assert kv.holds(range(first, tokens), tables[1], what)
        # Every byte of the prompt was written once, and no other byte at all.
        for layer in kv.layers:
            assert (counts.read(layer, range(first, tokens), tables[1]) == 1).all()
        own = len(kv.layers) * parts * len(kv.heads) * (tokens - first) * ROW_BYTES
        assert counts.array.sum() == own and (kv.array != UNTOUCHED).sum() == own


def stored(runs: Sequence[memoryview], data: bytes) -> None:
    assert sum(map(len, runs)) == len(data)
    at = 0
    for run in runs:
        run[:] = data[at : at + len(run)]
        at += len(run)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("target", DEGREES)
@pytest.mark.parametrize("source", DEGREES)
def test_class_7_every_byte_once_for_all_degrees(source: int, target: int, heads: int, seed: int) -> None:
    plain = KvLayout(layers=2, kv_heads=heads, block_size=4)
    move(replace(plain, tp=source), replace(plain, tp=target), 11, 0, seed)


@pytest.mark.parametrize("target", DEGREES[:3])
@pytest.mark.parametrize("source", DEGREES[:3])
def test_class_7_latents_are_one_part_that_all_ranks_hold(source: int, target: int, seed: int) -> None:
    plain = KvLayout(layers=5, kv_heads=1, block_size=4)
    move(replace(plain, tp=source), replace(plain, tp=target), 11, 3, seed, parts=1)
    move(replace(plain, tp=source, pp=2), replace(plain, tp=target, block_size=3, copies=2), 38, 7, seed, parts=1)


@pytest.mark.parametrize("source", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("target", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (16, 4), (4, 16)])
def test_class_7_every_byte_once_with_stages_and_block_sizes(
    source: tuple[int, int], target: tuple[int, int], sizes: tuple[int, int], seed: int
) -> None:
    plain = KvLayout(layers=5, kv_heads=2, block_size=4)
    ours = replace(plain, tp=source[0], pp=source[1], block_size=sizes[0])
    theirs = replace(plain, tp=target[0], pp=target[1], block_size=sizes[1], copies=2)
    move(ours, theirs, 38, 7, seed)
    move(theirs, ours, 38, 0, seed)


def test_layouts_are_where_the_models_put_their_kv() -> None:
    """The runtime's own rules, for all kinds of meshes; ranks that share tokens or experts are copies."""
    for heads, shape in itertools.product(
        (1, 2, 4, 8),
        (MeshShape(tp=4, pp=3), MeshShape(tp=2, ep=2, pp=2), MeshShape(tp=1, sp=3, pp=2), MeshShape(tp=16)),
    ):
        spec = cast(ModelSpec, SimpleNamespace(num_layers=7, num_kv_heads=heads))  # all that these rules read
        layout = KvLayout(layers=7, kv_heads=heads, block_size=16, tp=shape.tp, pp=shape.pp, copies=shape.sp * shape.ep)
        assert layout.ranks == shape.size
        for rank in range(shape.size):
            shard = Shard(place=shape.place(rank))
            assert (layout.layers_of(rank), layout.heads_of(rank)) == (shard.layers(spec), shard.kv_heads(spec))


# ------------------------------------------------------------------ memory


def test_runs_are_as_long_as_can_be() -> None:
    kv = RankKv(KvLayout(layers=1, kv_heads=4, block_size=4), 0, num_blocks=8, row_bytes=2)
    block = 4 * 4 * 2
    cuts = token_cuts(range(16), (4, 4))
    lengths = [len(run) for run in kv.memory.runs(0, range(4), cuts, [2, 3, 4, 6])]
    assert lengths == [3 * block, block] * 2, "blocks that are neighbours are one run"
    assert [len(run) for run in kv.memory.runs(0, range(1, 3), cuts, [2, 3, 4, 6])] == [block // 2] * 8
    assert [len(run) for run in kv.memory.runs(0, range(4), [0, 4, 6], [2, 5])] == [block, 4, 4, 4, 4] * 2
    latents = RankKv(KvLayout(layers=1, kv_heads=1, block_size=4), 0, num_blocks=8, row_bytes=2, parts=1).memory
    assert [len(run) for run in latents.runs(0, range(1), [*cuts, 18], [2, 3, 4, 6, 1])] == [3 * 8, 8, 4]
    assert (latents.shape.entry_bytes, latents.shape.layer_bytes) == (2, 8 * 8)


def test_class_11_memory_that_cannot_be_is_refused() -> None:
    shape = KvShape(layers=range(2), heads=range(1), num_blocks=2, block_size=2, row_bytes=2)
    good = [memoryview(bytearray(shape.layer_bytes)) for _ in range(2)]
    KvMemory(shape, good)
    buffer = memoryview(bytearray(3 * shape.layer_bytes))
    half = shape.layer_bytes // 2
    for layers, text in [
        (good[:1], "memory for 1 layers was registered, the rank has 2"),
        ([*good, good[0]], "memory for 3 layers"),
        ([good[0], good[0]], "overlaps, or one was registered twice"),
        ([buffer[: 2 * half], buffer[half : 3 * half]], "overlaps"),
        ([good[0], good[1][:-1]], "has 15 bytes, its shape says 16"),
        ([good[0], memoryview(bytes(16))], "writable and contiguous"),
        ([good[0], buffer[: 4 * half : 2]], "writable and contiguous"),
    ]:
        with pytest.raises(CommMisuse, match=text):
            KvMemory(shape, layers)


def test_tensors_are_memory_without_a_copy(seed: int) -> None:
    layers = [torch.zeros(2, 5, 3, 4, 8, dtype=torch.bfloat16) for _ in range(2)]
    memory = memory_of(layers, first_layer=6, heads=range(3, 6))
    for run in memory.runs(7, range(4, 5), [4, 8], [0, 2]):
        run[:] = np.full(len(run) // 2, 0x3F80, dtype="<u2").tobytes()
    assert (layers[1][:, 2, 1] == 1).all() and layers[1].sum() == 2 * 4 * 8 and not layers[0].any()
    latents = memory_of([layers[0][:1]], first_layer=0, heads=range(3))
    assert (memory.shape.entry_bytes, latents.shape.entry_bytes) == (2 * 8 * 2, 8 * 2)
    with pytest.raises(CommMisuse, match="a cache of 3 heads was named heads 0 to 1"):
        memory_of(layers, first_layer=0, heads=range(2))
    with pytest.raises(CommMisuse, match="contiguous"):
        memory_of([layers[0].transpose(1, 2)], first_layer=0, heads=range(5))


# ------------------------------------------------------------------ frames


def test_a_header_is_read_as_it_was_written() -> None:
    data = pack_header(FRAME, 640, 1 << 63)
    assert len(data) == HEADER_BYTES
    header = unpack_header(data, "prefill-0", max_payload_bytes=640)
    assert (header.frame, header.payload_bytes, header.checksum) == (FRAME, 640, 1 << 63)
    assert FRAME.payload_bytes(64) == 640
    with pytest.raises(BadFrame, match="640 bytes, more than the limit of 639"):
        unpack_header(data, "prefill-0", max_payload_bytes=639)
    with pytest.raises(BadFrame, match="no KV frame"):
        unpack_header(bytes(HEADER_BYTES), "prefill-0", max_payload_bytes=639)


def test_a_checksum_covers_what_a_frame_is_called_and_all_its_bytes() -> None:
    runs = [memoryview(bytearray(b"some bytes")), memoryview(bytearray(b"of a block"))]
    right = frame_checksum(FRAME, runs)
    assert right == frame_checksum(FRAME, [memoryview(b"some bytesof a block")])
    changed = [replace(FRAME, first_token=1), replace(FRAME, generation=1), replace(FRAME, layer=1)]
    assert all(frame_checksum(each, runs) != right for each in changed)
    runs[1][9] ^= 1
    assert frame_checksum(FRAME, runs) != right


@pytest.mark.parametrize("max_bytes", [1, 10, 16, 40, 64, 1000])
def test_tokens_are_cut_into_frames_at_blocks(max_bytes: int) -> None:
    for first, stop in ((0, 37), (5, 37), (16, 32), (3, 4)):
        runs = list(token_runs(range(first, stop), token_bytes=2, block_size=4, max_bytes=max_bytes))
        assert [token for run in runs for token in run] == list(range(first, stop))
        assert all(0 < len(run) <= max(max_bytes // 2, 1) for run in runs)
        if max_bytes >= 8:
            assert all(run.stop % 4 == 0 for run in runs[:-1])


# ------------------------------------------------------------------ coverage


def test_claims_against_a_plain_set(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(200):
        parts = [Part(layer, 0, 1, 0) for layer in range(2)]
        coverage, claimed = Coverage(parts, range(3, 30)), {part: set[int]() for part in parts}
        for _ in range(40):
            part = parts[draw.integers(2)]
            first = int(draw.integers(0, 32))
            stop = first + int(draw.integers(0, 7))
            wanted, known = set(range(first, stop)), claimed[part]
            if not wanted or first < 3 or stop > 30:
                expected = Claim.OUTSIDE
            elif wanted <= known:
                expected = Claim.DUPLICATE
            else:
                expected = Claim.OUTSIDE if wanted & known else Claim.NEW
            assert coverage.claim(part, first, stop) is expected
            if expected is Claim.NEW:
                known |= wanted
                coverage.applied(len(wanted))
            assert coverage.complete == (sum(map(len, claimed.values())) == 2 * 27)
        assert coverage.claim(Part(0, 0, 2, 0), 3, 4) is Claim.OUTSIDE
        assert coverage.claim(Part(0, 0, 1, 1), 3, 4) is Claim.OUTSIDE
