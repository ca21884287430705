"""What ``bench_engine`` measures: models, number formats and the points of load, as plain values.

Owns the lists. Knows nothing of processes or of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

DECODE_TOKENS = 64
DECODE_PROMPT = 128
MAX_MODEL_LEN = 4_352
"""Tokens that every contender makes room for: the longest point and its new tokens, in whole blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama of random weights, with a head of its own. Sizes are in elements."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int = 32_000

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of all linear layers without the head: what every token passes through."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head_weights(self) -> int:
        """Weights of the head, which is needed for positions that a token is drawn at."""
        return self.hidden * self.vocabulary


M120 = Shape(name="120m", hidden=768, layers=12, heads=12, kv_heads=4, ffn=2_048)
B1 = Shape(name="1b", hidden=2_048, layers=16, heads=32, kv_heads=8, ffn=8_192)
B8 = Shape(name="8b", hidden=4_096, layers=32, heads=32, kv_heads=8, ffn=14_336, vocabulary=128_256)
TINY = Shape(name="tiny", hidden=128, layers=2, heads=4, kv_heads=2, ffn=256, vocabulary=512)
SHAPES = {shape.name: shape for shape in (M120, B1, B8, TINY)}


class Format(StrEnum):
    """How weights are stored: ``int8`` and ``int4`` are quantized weights beside bf16 arithmetic."""

    BF16 = "bf16"
    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


class Kind(StrEnum):
    """``DECODE`` asks for the rate of new tokens, ``PREFILL`` for that of prompt tokens."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load: ``batch`` prompts of ``prompt_tokens`` at once, ``new_tokens`` each."""

    name: str
    kind: Kind
    batch: int
    prompt_tokens: int
    new_tokens: int


def decode(batch: int, context: int = DECODE_PROMPT, new_tokens: int = DECODE_TOKENS) -> Point:
    """Return the decode point of a batch and a context."""
    name = f"decode-{batch}" if context == DECODE_PROMPT else f"decode-{batch}@{context}"
    return Point(name=name, kind=Kind.DECODE, batch=batch, prompt_tokens=context, new_tokens=new_tokens)


def prefill(tokens: int) -> Point:
    """Return the prefill point of one prompt; its only new token marks the end."""
    return Point(name=f"prefill-{tokens}", kind=Kind.PREFILL, batch=1, prompt_tokens=tokens, new_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Points of one model in one format: the contenders' processes live as long as their group."""

    shape: Shape
    format: Format
    points: list[Point] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How options and tables call it."""
        return f"{self.shape.name}/{self.format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Sequences at once, and their tokens together; as it stands, what the points of a CPU take."""

    sequences: int = 64
    tokens: int = 40_000


_SHORT = [decode(1), decode(8), decode(32)]
_LONG = [prefill(512), prefill(2_048), decode(1, 1_024), decode(8, 1_024), decode(1, 4_096), decode(8, 4_096)]


def all_groups() -> list[Group]:
    """Return everything that a full run measures."""
    return [
        Group(shape=M120, format=Format.BF16, points=_SHORT + _LONG),
        Group(shape=M120, format=Format.FP32, points=_SHORT + _LONG),
        Group(shape=M120, format=Format.INT8, points=_SHORT),
        Group(shape=M120, format=Format.INT4, points=_SHORT),
        *(Group(shape=B1, format=format_, points=_SHORT[:2]) for format_ in Format),
    ]


def gpu_groups() -> list[Group]:
    """Return what a full run on a GPU measures."""
    batches = (1, 32, 128)
    points = [decode(batch) for batch in batches] + [decode(batch, 1_024) for batch in batches]
    return [Group(shape=B8, format=Format.BF16, points=[*points, decode(1, 4_096), prefill(512), prefill(2_048)])]


def room_of(groups: list[Group]) -> Room:
    """Return what every contender makes room for, so that all points of the groups can run."""
    points = [point for group in groups for point in group.points]
    # Every sequence may waste most of a block.
    tokens = (point.batch * (point.prompt_tokens + point.new_tokens + 64) for point in points)
    least = Room()
    return Room(sequences=max(least.sequences, *(point.batch for point in points)), tokens=max(least.tokens, *tokens))


def quick_groups() -> list[Group]:
    """Return what ``--quick`` measures: a model that is made and run in a second."""
    points = [decode(1, 32, 8), decode(4, 32, 8), prefill(64)]
    return [Group(shape=TINY, format=format_, points=points) for format_ in (Format.BF16, Format.FP32)]


def select(groups: list[Group], group_names: list[str] | None, point_names: list[str] | None) -> list[Group]:
    """Return the groups and points that were asked for; None is all. A group's prefix (``120m``) names several.

    Raises: ValueError naming what does not exist.
    """
    known = {point.name for group in groups for point in group.points}
    if point_names is not None and (unknown := set(point_names) - known):
        raise ValueError(f"no such points: {sorted(unknown)}; there are {sorted(known)}")
    chosen = []
    for group in groups:
        if group_names is not None and not {group.name, group.shape.name, str(group.format)} & set(group_names):
            continue
        points = [point for point in group.points if point_names is None or point.name in point_names]
        if points:
            chosen.append(Group(shape=group.shape, format=group.format, points=points))
    if not chosen:
        raise ValueError(f"nothing left to measure: groups are {[group.name for group in groups]}")
    return chosen
