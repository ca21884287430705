"""Checkpoints that were quantized elsewhere: the same as plain ones of what they stand for; whole, and rank by rank."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.comm.mesh import MeshShape
from slipstream.kernels import backends
from slipstream.kernels.float8_codes import Float8Codes
from slipstream.kernels.int4_codes import Int4Codes
from slipstream.runtime.models.codes_format import CodesFormat
from slipstream.runtime.models.linear_format import PlainFormat, choose_format
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import WHOLE, Shard
from slipstream.runtime.models.weights import read_expert, read_parameters
from slipstream.sdk.errors import CheckpointError, ConfigError
from slipstream.tests.models.checkpoints import CASES, random_model
from slipstream.tests.models.quantized import CONFIGS, quantize_checkpoint

CPU = torch.device("cpu")
KINDS = list(CONFIGS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    more = {"deepseek_v3": {"moe_intermediate_size": 64, "v_head_dim": 16}}
    for name in ("llama_biases", "mixtral", "deepseek_v3"):
        case = CASES[name]
        # Columns that can be cut at groups.
        fields = {**case.fields, "intermediate_size": 128, **more.get(name, {})}
        model = random_model(replace(case, fields=fields)).float()
        model.config.dtype = torch.float32
        model.save_pretrained(directory / name)
    return directory


def twins(originals: Path, tmp_path: Path, name: str, kind: str, seed: int) -> tuple[Path, Path]:
    """Return a quantized checkpoint, and a plain one of what it stands for."""
    quantized, plain = (Path(shutil.copytree(originals / name, tmp_path / each)) for each in ("quantized", "plain"))
    save_file(quantize_checkpoint(quantized, kind, seed=seed), plain / "model.safetensors")
    return quantized, plain


def parameters(directory: Path, shard: Shard = WHOLE) -> dict[str, Tensor]:
    """Return all parameters as plain numbers."""
    found = {}
    spec = read_model_spec(directory)
    for parameter, loaded in read_parameters(directory, spec, dtype=torch.float32, device=CPU, shard=shard):
        if not isinstance(loaded, Tensor):
            weights = [codes.weight() for codes in loaded]
            loaded = torch.stack(weights) if len(parameter.shape) == 3 else weights[0]
        assert loaded.shape == parameter.shape, parameter.name
        found[parameter.name] = loaded
    return found


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama_biases", "mixtral"])
def test_parameters_are_what_the_codes_stand_for(
    originals: Path, tmp_path: Path, name: str, kind: str, seed: int
) -> None:
    quantized, plain = twins(originals, tmp_path, name, kind, seed)
    check_same(parameters(quantized), parameters(plain))
    assert read_model_spec(quantized).stored_as is not None


@pytest.mark.parametrize("kind", ["awq", "gptq", "fp8", "fp8_whole", "fp8_blocks"])
@pytest.mark.parametrize("name", ["llama_biases", "mixtral"])
def test_every_rank_reads_its_part(originals: Path, tmp_path: Path, name: str, kind: str, seed: int) -> None:
    quantized, plain = twins(originals, tmp_path, name, kind, seed)
    shape = MeshShape(tp=2, pp=2)
    for rank in range(shape.size):
        shard = Shard(place=shape.place(rank))
        check_same(parameters(quantized, shard), parameters(plain, shard))


def test_parts_of_heads_are_read_out_of_blocks(originals: Path, tmp_path: Path, seed: int) -> None:
    """What makes keys and values of a latent is one weight on disk, and is cut head by head; on every rank."""
    quantized, plain = twins(originals, tmp_path, "deepseek_v3", "fp8_blocks", seed)
    check_same(parameters(quantized), parameters(plain))
    shape = MeshShape(tp=2)
    for rank in range(shape.size):
        shard = Shard(place=shape.place(rank))
        check_same(parameters(quantized, shard), parameters(plain, shard))


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_read_as_plain_numbers(originals: Path, tmp_path: Path, kind: str, seed: int) -> None:
    quantized, plain = twins(originals, tmp_path, "mixtral", kind, seed)
    spec = read_model_spec(quantized)
    found, expected = (
        read_expert(each, spec, layer=1, expert=4, dtype=torch.float32, device=CPU, shard=WHOLE)
        for each in (quantized, plain)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def failure(directory: Path, shard: Shard = WHOLE) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parameters(directory, shard)
    return caught.value


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "suffix", "words"),
    [
        ("awq", "qzeros", "missing"),
        ("gptq", "scales", "missing"),
        ("awq", "qweight", "unexpected"),
        ("fp8", "weight_scale", "no scales"),
    ],
)
def test_a_missing_part_is_named(
    originals: Path, tmp_path: Path, kind: str, suffix: str, words: str, seed: int
) -> None:
    quantized, _ = twins(originals, tmp_path, "llama_biases", kind, seed)
    tensors = load_file(quantized / "model.safetensors")
    del tensors[f"{Q}.{suffix}"]
    if suffix == "qweight":
        # The layer is then a plain one, of which the other parts are left over.
        tensors[f"{Q}.weight"] = torch.zeros(64, 64)
    save_file(tensors, quantized / "model.safetensors")
    error = failure(quantized)
    assert words in error.problem and Q in (error.tensor or "")


def test_parts_that_do_not_fit_are_named(originals: Path, tmp_path: Path, seed: int) -> None:
    quantized, _ = twins(originals, tmp_path, "llama_biases", "awq", seed)
    tensors = load_file(quantized / "model.safetensors")
    for changed, words in (
        (tensors[f"{Q}.qzeros"][:1], "has shape [1, 8]"),
        (tensors[f"{Q}.qzeros"].float(), "has type F32, wanted I32"),
    ):
        save_file({**tensors, f"{Q}.qzeros": changed.contiguous()}, quantized / "model.safetensors")
        error = failure(quantized)
        assert words in error.problem and error.tensor == f"{Q}.qzeros"


def test_what_cannot_be_divided_is_refused(originals: Path, tmp_path: Path, seed: int) -> None:
    halves = [Shard(place=MeshShape(tp=2).place(rank)) for rank in range(2)]
    quantized, _ = twins(originals, tmp_path / "order", "llama_biases", "gptq_order", seed)
    assert "act-order" in failure(quantized, halves[1]).problem
    quantized, _ = twins(originals, tmp_path / "whole", "llama_biases", "gptq_v2", seed)
    assert "inputs share a scale: use another degree" in failure(quantized, halves[1]).problem


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_codes(originals: Path, tmp_path: Path, kind: str, seed: int) -> None:
    """On a CPU they are multiplied with as plain numbers; as they are stored where kernels take them."""
    quantized, plain = twins(originals, tmp_path, "llama_biases", kind, seed)
    spec, x = read_model_spec(quantized), torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).half()
    name = "layers.0.attention.qkv.weight"
    loaded = next(
        loaded
        for parameter, loaded in read_parameters(quantized, spec, dtype=torch.float16, device=CPU)
        if parameter.name == name
    )
    assert not isinstance(loaded, Tensor)
    (codes,) = loaded
    assert isinstance(codes, Float8Codes if kind.startswith("fp8") else Int4Codes)
    expected = x.float() @ parameters(plain)[name].t()
    form = CodesFormat(dtype=torch.float16, device=CPU, keep=True, one_way=False)
    plainly = form.prepare(codes, PlainFormat(), is_summed=False)(x, None)
    torch.testing.assert_close(plainly.float(), expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))
    backends.use("triton")
    try:
        kept = form.prepare(codes, PlainFormat(), is_summed=False)(x, None)
        fixed = replace(form, one_way=True).prepare(codes, PlainFormat(), is_summed=True)(x, None)
    finally:
        backends.use("auto")
    assert torch.equal(fixed, plainly), "sums over ranks in a fixed order are of plain numbers"
    # Activations of 8 bits have a step of 1/16 in float8.
    close = 5e-3 if kind not in ("fp8", "fp8_whole") else 5e-2
    torch.testing.assert_close(kept.float(), expected, rtol=close, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize(("quantization", "close"), [("int8", 0.03), ("fp8", 0.08), ("int4", 0.2)])
def test_formats_where_kernels_run(quantization: str, close: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, generator=generator).bfloat16() for shape in ((48, 64), (3, 64)))
    backends.use("triton")
    try:
        form = choose_format(quantization, dtype=torch.bfloat16, device=CPU)
        products = [form.prepare(weight)(x, None), form.prepare_head(weight)(x, None)]
        wide = form.prepare(weight, wide=True)(x, None)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide.bfloat16(), products[0])
        # No whole groups: 8 bits instead.
        products.append(form.prepare(weight[:, :40].contiguous())(x[:, :40], None))
    finally:
        backends.use("auto")
    expected = [x.float() @ weight.float().t()] * 2 + [x[:, :40].float() @ weight[:, :40].float().t()]
    for product, exact, bound in zip(products, expected, (close, min(close, 0.08), min(close, 0.08)), strict=True):
        assert float((product.float() - exact).norm() / exact.norm()) < bound


def test_what_a_device_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization: 'fp8' is for GPUs"):
        choose_format("fp8", dtype=torch.bfloat16, device=CPU)
    backends.use("triton")
    try:
        with pytest.raises(ConfigError, match="'int4' needs dtype bfloat16 or float16"):
            choose_format("int4", dtype=torch.float32, device=CPU)
    finally:
        backends.use("auto")
