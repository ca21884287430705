"""A step's tensors in one copy: each comes out as it went in, at a place that kernels can load from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.runtime.models.forward import ForwardBatch, build_forward_batch
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.upload import Packed, upload
from slipstream.tests.models.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    mask: Tensor | None
    ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    numbers: Tensor
    inner: Mapping[int | None, Inner]
    several: tuple[Tensor, ...]


def example(seed: int) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (3, 5), generator=generator)
    return Outer(
        name="batch",
        numbers=torch.rand(7, generator=generator),
        inner={None: Inner(mask=None, ids=ids), 4: Inner(mask=torch.rand(2, 3, generator=generator) > 0.5, ids=ids)},
        several=(ids.t(), torch.empty(0, dtype=torch.int32), torch.tensor(3.5, dtype=torch.float64)),
    )


def tensors_of(value: Outer) -> list[Tensor]:
    inner = [each for part in value.inner.values() for each in (part.mask, part.ids) if each is not None]
    return [value.numbers, *inner, *value.several]


def copied(value: Outer) -> tuple[Packed[Outer], Outer]:
    """Return a value in memory that held something else, as a device would have it."""
    packed = Packed(value)
    memory = torch.full((packed.bytes,), 255, dtype=torch.uint8)
    packed.write(memory)
    return packed, packed.over(memory)


def test_each_tensor_comes_out_as_it_went_in(seed: int) -> None:
    value = example(seed)
    packed, there = copied(value)
    assert there.name == "batch"
    assert there.inner[None].mask is None
    for ours, theirs in zip(tensors_of(value), tensors_of(there), strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)
        assert theirs.is_contiguous()
        assert theirs.data_ptr() != ours.data_ptr() or not ours.numel()
    assert {place.first_byte % 64 for place in packed.layout} == {0}, "kernels load several numbers at once"


def test_a_tensor_that_comes_twice_is_copied_once(seed: int) -> None:
    packed, there = copied(example(seed))
    assert there.inner[None].ids is there.inner[4].ids
    assert len(packed.layout) == 6


def test_parts_of_a_tensor_are_parts_of_its_copy(seed: int) -> None:
    whole = torch.randint(0, 1000, (5, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    parts = (whole[1:3], whole.view(-1)[12:20].view(2, 4), whole[:, 2:4])
    packed, there = copied(Outer(name="", numbers=whole, inner={}, several=parts))
    assert packed.bytes == 192 + 64, "only what is no stretch of the whole is copied by itself"
    assert all(torch.equal(theirs, ours) for ours, theirs in zip(parts, there.several, strict=True))
    there.numbers[1, 4] = -1
    assert there.several[0][0, 4] == -1
    assert there.several[1][0, 0] == -1


def test_equal_layouts_take_each_others_place(seed: int) -> None:
    first, second = Packed(example(seed)), Packed(example(seed + 1))
    assert first.layout == second.layout
    memory = torch.zeros(first.bytes, dtype=torch.uint8)
    static = first.upload(CPU, into=memory)
    second.upload(CPU, into=memory)
    assert torch.equal(static.numbers, example(seed + 1).numbers)
    longer = Outer(name="", numbers=torch.zeros(8), inner={}, several=())
    assert Packed(longer).layout != first.layout


def test_nothing_is_copied_on_a_cpu(seed: int) -> None:
    value = example(seed)
    assert upload(value, CPU) is value


@pytest.mark.parametrize("name", ["llama_dynamic", "mistral_window"])
def test_a_batch_is_packed_whole(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of a batch is left behind on the host: a GPU's kernels would be given addresses that are not theirs."""
    spec = read_model_spec(make_checkpoint(name, tmp_path_factory.mktemp(name)))
    batch = build_forward_batch(
        token_ids=torch.arange(9),
        starts=np.array([4, 0, 3], np.int32),
        counts=np.array([1, 5, 3], np.int32),
        prompt_lengths=np.array([4, 5, 6], np.int32),
        block_tables=np.array([[3, 1], [2, 0], [5, 4]], np.int32),
        block_size=4,
        spec=spec,
        dtype=torch.float32,
        device=CPU,
    )
    packed = Packed(batch)
    there = packed.over(torch.zeros(packed.bytes, dtype=torch.uint8))
    names = ("token_ids_T", "positions_T", "rope_lengths_T", "slot_mapping_T", "fresh_blocks_F")
    for each in names:
        ours, theirs = getattr(batch, each), getattr(there, each)
        assert (ours is None) == (theirs is None)
        assert ours is None or not theirs.any()
    assert isinstance(there, ForwardBatch)
    assert len(packed.layout) >= len(names) - 1
