"""Sampling parameters on the step bus: their fields by name, those that are not the default.

What they may be is ``SamplingParams``' own business: it checks everything when it is made. Pure, and knows nothing of
how names and values become bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import numpy as np

from ...sdk.errors import InvalidRequest
from ...sdk.params import MAX_LOGIT_BIAS, SamplingParams
from ...sdk.structured import StructuredOutputsParams
from .step_fields import Fields, StepCodecError, pack_array


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


_PARAMS = {field.name: _default(field) for field in fields(SamplingParams)}
_CONSTRAINT = {field.name: _default(field) for field in fields(StructuredOutputsParams)}


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """Return the parameters that are not the default, as plain values."""
    wire = _changed(params, _PARAMS)
    if params.logit_bias:
        tokens = np.fromiter(params.logit_bias.keys(), dtype=np.int32)
        amounts = np.fromiter(params.logit_bias.values(), dtype=np.float64)
        wire["logit_bias"] = {
            "tokens": pack_array("logit_bias", tokens, np.int32),
            "amounts": pack_array("logit_bias", amounts, np.float64),
        }
    if params.structured_outputs is not None:
        wire["structured_outputs"] = _changed(params.structured_outputs, _CONSTRAINT)
    return wire


def params_from_wire(where: str, wire: object) -> SamplingParams:
    """Return checked parameters.

    Raises: StepCodecError naming the field
    """
    values = _known(where, wire, _PARAMS)
    if "logit_bias" in values:
        values["logit_bias"] = _logit_bias(f"{where}.logit_bias", values["logit_bias"])
    try:
        if "structured_outputs" in values:
            constraint = _known(f"{where}.structured_outputs", values["structured_outputs"], _CONSTRAINT)
            values["structured_outputs"] = StructuredOutputsParams(**constraint)
        return SamplingParams(**values)
    except InvalidRequest as error:
        raise StepCodecError(f"{where}.{error.field}", error.problem) from error


def _changed(value: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = ((name, getattr(value, name)) for name in defaults)
    return {name: each for name, each in given if each != defaults[name]}


def _known(where: str, wire: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    names = Fields(where, wire)
    values = {name: names.take(name) for name in defaults if name in names}
    names.end()
    return values


def _logit_bias(where: str, wire: object) -> dict[int, float]:
    columns = Fields(where, wire)
    tokens = columns.array("tokens", np.int32)
    amounts = columns.array("amounts", np.float64, length=len(tokens))
    columns.end()
    if len(tokens) > MAX_LOGIT_BIAS:
        raise StepCodecError(where, f"at most {MAX_LOGIT_BIAS} entries, got {len(tokens)}")
    return dict(zip(tokens.tolist(), amounts.tolist(), strict=True))
