"""Every way in which a checkpoint can be unusable gives an error that names the file and what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.runtime.models import weights
from slipstream.runtime.models.checkpoint import CheckpointReader
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.registry import FAMILIES, read_model_spec
from slipstream.sdk.errors import CheckpointError
from slipstream.tests.models.checkpoints import make_checkpoint

CPU = torch.device("cpu")
NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    for name in ("llama", "llama_sharded", "llama_tied", "mixtral", "qwen3_moe", "qwen3_mixed_layers"):
        make_checkpoint(name, directory / name)
    return directory


@pytest.fixture
def copy_of(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copy


def load(directory: Path) -> None:
    load_decoder(directory, read_model_spec(directory), dtype=torch.float32, device=CPU)


def failure(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return caught.value


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not ...:
            fields[name] = value
    file.write_text(json.dumps(fields))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def test_the_untouched_copies_load(copy_of: Callable[[str], Path]) -> None:
    for name in ("llama", "llama_sharded", "llama_tied", "mixtral", "qwen3_moe", "qwen3_mixed_layers"):
        load(copy_of(name))


# config.json


@pytest.mark.parametrize("name", ["no/such/directory", "."])
def test_no_config(tmp_path: Path, name: str) -> None:
    error = failure(tmp_path / name)
    assert error.file == str(tmp_path / name / "config.json")
    assert "no such file" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": }', "\x00\xff", "[" * 100_000])
def test_config_that_is_not_json(copy_of: Callable[[str], Path], text: str) -> None:
    directory = copy_of("llama")
    (directory / "config.json").write_text(text, encoding="latin-1")
    error = failure(directory)
    assert error.file.endswith("config.json")
    assert "JSON" in error.problem


@pytest.mark.parametrize("names", [..., None, [], ["GPT2LMHeadModel"], "LlamaForCausalLM", [3]])
def test_unknown_architecture_lists_the_known(copy_of: Callable[[str], Path], names: object) -> None:
    directory = copy_of("llama")
    edit_config(directory, architectures=names)
    error = failure(directory)
    assert "architectures" in error.problem
    if names != "LlamaForCausalLM":
        assert all(known in error.problem for known in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("quantization_config", "bitsandbytes")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config.bits", "missing")),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ("quantization_config.bits", "3 bits")),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}},
            ("quantization_config.version", "gemv"),
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            ("quantization_config.weight_block_size", "two sizes"),
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
            ("quantization_config.format", "int-quantized"),
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ("rope_scaling.rope_type", "longrope")),
        ({"rope_parameters": {"rope_type": "su"}}, ("rope_parameters.rope_type", "su")),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor", "missing")),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ("rope_scaling.factor", "above 0")),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, ("rope_scaling.factor", "at least 1")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ("rope_scaling.low_freq_factor", "missing")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "8"}}, ("rope_scaling.factor", "number")),
        ({"rope_parameters": {"full_attention": {}}}, ("rope_parameters.full_attention", "differ by layer")),
        ({"rope_scaling": []}, ("rope_scaling", "object")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ("partial_rotary_factor", "0.25")),
        ({"head_dim": 15}, ("head_dim", "even")),
        ({"hidden_size": ...}, ("hidden_size", "missing")),
        ({"hidden_size": 0}, ("hidden_size", "positive")),
        ({"hidden_size": "64"}, ("hidden_size", "positive integer")),
        ({"hidden_size": 64.0}, ("hidden_size", "positive integer")),
        ({"num_hidden_layers": -1}, ("num_hidden_layers", "positive")),
        ({"num_hidden_layers": True}, ("num_hidden_layers", "positive")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "more than")),
        ({"vocab_size": ...}, ("vocab_size", "missing")),
        ({"intermediate_size": None}, ("intermediate_size", "missing")),
        ({"num_attention_heads": 0}, ("num_attention_heads", "positive")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "shared")),
        ({"head_dim": None, "num_attention_heads": 6}, ("hidden_size", "multiple")),
        ({"rms_norm_eps": 0}, ("rms_norm_eps", "above 0")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "finite")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings", "true or false")),
        ({"dtype": "float8_e4m3fn"}, ("dtype", "float8_e4m3fn")),
        ({"eos_token_id": "2"}, ("eos_token_id", "token id")),
        ({"layer_types": ["sliding_attention", "full_attention"]}, ("layer_types", "architecture")),
    ],
)
def test_config_fields(copy_of: Callable[[str], Path], changes: dict[str, object], words: tuple[str, ...]) -> None:
    directory = copy_of("llama")
    edit_config(directory, **changes)
    error = failure(directory)
    assert error.file == str(directory / "config.json")
    assert all(word in error.problem for word in words), str(error)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 7}, ("num_experts_per_tok", "6 experts")),
        ("qwen3_moe", {"moe_intermediate_size": 0}, ("moe_intermediate_size", "positive")),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step", "positive")),
        ("qwen3_mixed_layers", {"layer_types": ["full_attention"]}, ("layer_types", "4 layers")),
        ("qwen3_mixed_layers", {"layer_types": ["chunked_attention"] * 4}, ("layer_types", "chunked")),
        ("qwen3_mixed_layers", {"use_sliding_window": False}, ("layer_types", "use_sliding_window")),
        ("qwen3_mixed_layers", {"sliding_window": 0}, ("sliding_window", "positive")),
    ],
)
def test_config_fields_of_other_families(
    copy_of: Callable[[str], Path], name: str, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    directory = copy_of(name)
    edit_config(directory, **changes)
    error = failure(directory)
    assert all(word in error.problem for word in words), str(error)


# Weight files


def test_no_weights(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama")
    (directory / "model.safetensors").unlink()
    error = failure(directory)
    assert error.file == str(directory)
    assert "model.safetensors" in error.problem


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_files_are_refused_unopened(copy_of: Callable[[str], Path], pickle: str) -> None:
    directory = copy_of("llama")
    (directory / "model.safetensors").rename(directory / pickle)
    (directory / pickle).chmod(0)
    error = failure(directory)
    assert error.file == str(directory / pickle)
    assert "pickle" in error.problem
    assert "save_pretrained" in error.problem


def test_a_pickle_file_beside_safetensors_does_not_matter(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama")
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    load(directory)


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.5, 0.999])
def test_truncated_file(copy_of: Callable[[str], Path], share: float) -> None:
    directory = copy_of("llama")
    file = directory / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    error = failure(directory)
    assert error.file == str(file)
    assert "truncated" in error.problem
    # Past the header the tensor that is cut is known.
    assert (error.tensor is not None) == (share >= 0.5)


def test_file_with_bytes_too_many(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"12345")
    error = failure(directory)
    assert error.file == str(file)
    assert "5 bytes" in error.problem


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
def test_broken_header(copy_of: Callable[[str], Path], header: bytes) -> None:
    directory = copy_of("llama")
    file = directory / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert failure(directory).file == str(file)


def test_missing_shard(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama_sharded")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    error = failure(directory)
    assert error.file.endswith("model.safetensors.index.json")
    assert error.tensor is not None
    assert shard.name in error.problem


def test_truncated_shard(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama_sharded")
    shard = sorted(directory.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])
    error = failure(directory)
    assert error.file == str(shard)
    assert error.tensor is not None


def test_index_that_names_the_wrong_shard(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama_sharded")
    index = directory / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    shards = sorted(set(fields["weight_map"].values()))
    wrong = next(shard for shard in shards if shard != fields["weight_map"][NORM])
    fields["weight_map"][NORM] = wrong
    index.write_text(json.dumps(fields))
    error = failure(directory)
    assert (error.file, error.tensor) == (str(directory / wrong), NORM)


@pytest.mark.parametrize("shard", ["../model-00001-of-00004.safetensors", "/etc/passwd", 3, None, ".."])
def test_index_that_leaves_the_directory(copy_of: Callable[[str], Path], shard: object) -> None:
    directory = copy_of("llama_sharded")
    index = directory / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"][NORM] = shard
    index.write_text(json.dumps(fields))
    error = failure(directory)
    assert error.file == str(index)
    assert error.tensor == NORM


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_broken_index(copy_of: Callable[[str], Path], text: str) -> None:
    directory = copy_of("llama_sharded")
    index = directory / "model.safetensors.index.json"
    index.write_text(text)
    assert failure(directory).file == str(index)


# Tensors


@pytest.mark.parametrize("name", [NORM, GATE, "model.embed_tokens.weight", "lm_head.weight"])
def test_missing_tensor(copy_of: Callable[[str], Path], name: str) -> None:
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors.__delitem__(name))
    error = failure(directory)
    assert error.tensor == name
    assert str(directory) in error.file
    assert "missing" in error.problem


def test_missing_expert(copy_of: Callable[[str], Path]) -> None:
    directory, name = copy_of("mixtral"), "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    edit_weights(directory, lambda tensors: tensors.__delitem__(name))
    assert failure(directory).tensor == name


@pytest.mark.parametrize("shape", [(112, 63), (64, 112), (112 * 64,), (1, 112, 64)])
def test_wrong_shape_names_both(copy_of: Callable[[str], Path], shape: tuple[int, ...]) -> None:
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors.__setitem__(GATE, torch.zeros(shape)))
    error = failure(directory)
    assert (error.file, error.tensor) == (str(directory / "model.safetensors"), GATE)
    assert str(list(shape)) in error.problem
    assert "[112, 64]" in error.problem


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.float64, torch.bool])
def test_unsupported_type(copy_of: Callable[[str], Path], dtype: torch.dtype) -> None:
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors.__setitem__(NORM, tensors[NORM].to(dtype)))
    error = failure(directory)
    assert error.tensor == NORM
    assert "BF16" in error.problem


def test_unexpected_tensor(copy_of: Callable[[str], Path]) -> None:
    directory, name = copy_of("llama"), "model.layers.0.self_attn.q_proj.bias"
    edit_weights(directory, lambda tensors: tensors.__setitem__(name, torch.zeros(64)))
    error = failure(directory)
    assert (error.file, error.tensor) == (str(directory / "model.safetensors"), name)
    assert "unexpected" in error.problem


def test_more_layers_than_configured(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama")
    edit_config(directory, num_hidden_layers=1)
    tensor = failure(directory).tensor
    assert tensor is not None
    assert tensor.startswith("model.layers.1.")


def test_tensors_that_hold_nothing_of_their_own_are_ignored(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("llama_tied")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(directory, add)
    load(directory)


# What stays


def test_nothing_is_allocated_before_everything_is_checked(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors.__setitem__("zzz", torch.zeros(1)))
    spec = read_model_spec(directory)
    monkeypatch.setattr(weights, "_load", lambda *_: pytest.fail("loaded before the check was over"))
    with pytest.raises(CheckpointError, match="zzz"):
        load_decoder(directory, spec, dtype=torch.float32, device=CPU)


def test_files_are_closed_when_reading_fails(copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = copy_of("llama_sharded")
    readers: list[CheckpointReader] = []
    read_into = CheckpointReader.read_into

    def fail_late(reader: CheckpointReader, name: str, target: torch.Tensor, *, region: tuple[slice, ...]) -> None:
        readers.append(reader)
        if len(readers) > 5:
            raise CheckpointError("shard", "the disk is gone", tensor=name)
        read_into(reader, name, target, region=region)

    monkeypatch.setattr(CheckpointReader, "read_into", fail_late)
    assert "the disk is gone" in failure(directory).problem
    assert not readers[0].has_open_files
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(directory) not in mapped.read_text()
