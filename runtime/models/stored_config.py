"""How a quantized checkpoint says that it is one: the ``quantization_config`` of config.json.

Owns the field names of AWQ, GPTQ, MXFP4 and float8 checkpoints, and refuses by name what is not read.
"""

from __future__ import annotations

from .config_fields import ConfigFields
from .model_spec import StoredAs

_FIELD = "quantization_config"
_FLOAT8 = ("fp8", "fbgemm_fp8", "compressed-tensors")
_METHODS = ("awq", "gptq", "mxfp4", *_FLOAT8)


def read_stored_as(fields: ConfigFields) -> StoredAs | None:
    """Return how the weights of linear layers are stored; None where they are plain numbers.

    Raises: CheckpointError naming the field
    """
    if not fields.is_set(_FIELD):
        return None
    table = fields.table(_FIELD)
    method = table.text("quant_method", "unknown")
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise fields.problem(_FIELD, f"checkpoints quantized by {method!r} are not supported; known are {known}")
    if method == "mxfp4":
        return StoredAs(method=method)
    if method in _FLOAT8:
        return _float8(table, method)
    if (bits := table.integer("bits")) != 4:
        raise table.problem("bits", f"{method} weights of {bits} bits are not supported; only 4 are")
    if method == "awq" and table.text("version", "gemm").lower() != "gemm":
        raise table.problem("version", f"{table.text('version')!r} is not supported; only 'gemm' is")
    # -1 is one group for all inputs.
    group = table.integer("group_size", 128, minimum=-1)
    if group == 0:
        raise table.problem("group_size", "must be a number of inputs, or -1 for all of them")
    less_one = method == "gptq" and table.text("checkpoint_format", "gptq") != "gptq_v2"
    return StoredAs(method=method, group=group if group > 0 else None, zeros_less_one=less_one)


def _float8(table: ConfigFields, method: str) -> StoredAs:
    if method == "compressed-tensors" and (kind := table.text("format", "unknown")) != "float-quantized":
        raise table.problem("format", f"{kind!r} is not supported; only 'float-quantized' is")
    block = table.items("weight_block_size")
    if block and not (len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise table.problem("weight_block_size", f"must be two sizes, got {list(block)}")
    outputs, inputs = (int(str(size)) for size in block) if block else (None, None)
    return StoredAs(method="fp8", block_outputs=outputs, group=inputs)
