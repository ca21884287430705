"""What generation_config.json suggests: end tokens and sampling defaults, nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config_fields import ConfigFields, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Suggestions of the model's makers; None where the file says nothing."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_defaults(path: str | Path) -> GenerationDefaults:
    """Read generation_config.json in the directory ``path``; without one there are no suggestions.

    Raises: CheckpointError naming the file and the field.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    fields = read_json(file)
    return GenerationDefaults(
        eos_token_ids=fields.token_ids("eos_token_id"),
        bos_token_id=_first(fields.token_ids("bos_token_id")),
        pad_token_id=_first(fields.token_ids("pad_token_id")),
        do_sample=fields.boolean("do_sample", False) if fields.is_set("do_sample") else None,
        temperature=_number(fields, "temperature"),
        top_p=_number(fields, "top_p"),
        top_k=fields.integer("top_k", minimum=-1) if fields.is_set("top_k") else None,
        min_p=_number(fields, "min_p"),
        repetition_penalty=_number(fields, "repetition_penalty"),
        max_new_tokens=fields.integer("max_new_tokens") if fields.is_set("max_new_tokens") else None,
    )


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _number(fields: ConfigFields, name: str) -> float | None:
    if not fields.is_set(name):
        return None
    return 0.0 if fields.values[name] == 0 else fields.number(name)
