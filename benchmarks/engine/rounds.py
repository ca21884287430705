"""Rounds: every contender runs the same point in turn, in an order drawn anew each round.

One process computes at a time; the others are stopped. Where the machine has the memory, a group's processes live
as long as the group, whose points follow one another with all their rounds; otherwise each process ends after its turn,
and a turn is all points of the group.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slipstream.benchmarks.engine import environments
from slipstream.benchmarks.engine.contender import Contender, ContenderError
from slipstream.benchmarks.engine.measure import Run, evaluate
from slipstream.benchmarks.engine.points import MAX_MODEL_LEN, Format, Group, Kind, Point, Room, Shape
from slipstream.benchmarks.engine.roof import WEIGHT_BYTES, Rates, kv_bytes_per_token

ROOF_NAME = environments.ROOF.name
_LOAD_TIMEOUT_S = 600.0
_RUN_TIMEOUT_S = 600.0
_WARM_TOKENS = 4
_COPIES = 2.0
"""Memory of a contender over that of its weights: packed copies, a cast while loading."""
_PROCESS_BYTES = 1.5e9
_GPU_PROCESS_BYTES = 6e9
"""A context, graphs and activations; and of the roof's, what it reads and multiplies."""


@dataclass(slots=True)
class PointResult:
    """A point's runs by contender, in order of rounds, None where one failed; and the roof's rates beside them."""

    group: Group
    point: Point
    runs: dict[str, list[Run | None]] = field(default_factory=dict)
    rates: list[Rates] = field(default_factory=list)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)


def draw_prompts(point: Point, vocabulary: int, seed: str) -> list[list[int]]:
    """Return a point's prompts: the same for the same seed, without a common prefix."""
    draw = random.Random(f"{seed} {point.name}")
    return [[draw.randrange(vocabulary) for _ in range(point.prompt_tokens)] for _ in range(point.batch)]


class Arena:
    """Starts contenders, and runs groups of points in rounds. ``notes`` collects what was skipped, and why."""

    def __init__(
        self,
        names: list[str],
        *,
        cache: Path,
        model_directories: dict[str, Path],
        seed: int,
        threads: int,
        notes: list[str],
        roof_repeats: int = 5,
        device: str = "cpu",
        room: Room | None = None,
    ) -> None:
        self._names = names
        self._cache = cache
        self._models = model_directories
        self._seed = seed
        self._threads = threads
        self.notes = notes
        self._roof_repeats = roof_repeats
        self._device = device
        self._room = room or Room()

    def run_group(self, group: Group, rounds: int) -> Iterator[PointResult]:
        """Run every point of a group ``rounds`` times by every contender that can; yield each when it is done."""
        results = [PointResult(group=group, point=point) for point in group.points]
        names = [ROOF_NAME, *self._names]
        keep = self._fits(group.shape, group.format, len(self._names))
        if not keep:
            self._note(f"{group.name}: too large to keep {len(self._names)} processes, each is started for its turn")
        turns = [[result] for result in results] if keep else [results]
        alive: dict[str, Contender] = {}
        order = random.Random(f"{self._seed} {group.name}")
        warm: set[tuple[str, str]] = set()
        try:
            for turn in turns:
                for round_ in range(rounds):
                    order.shuffle(names)
                    for name in list(names):
                        if not self._take_turn(name, group, turn, round_, alive, warm):
                            names.remove(name)
                        elif not keep:
                            alive.pop(name).close()
                            warm = {pair for pair in warm if pair[0] != name}
                yield from turn
        finally:
            for contender in alive.values():
                contender.close()

    def start(self, name: str, shape: Shape, format_: Format) -> Contender | None:
        """Start a contender with a model; None, with a note, where it cannot run."""
        kind = environments.ROOF if name == ROOF_NAME else environments.KINDS[name]
        launch = environments.find(kind, self._cache / "peers", self._threads)
        if launch is None:
            self._note(f"{name}: not installed (--install-peers), skipped")
            return None
        options = {
            "model": str(self._models[shape.name]),
            "format": str(format_),
            "threads": self._threads,
            "max_model_len": MAX_MODEL_LEN,
            "max_batch": self._room.sequences,
            "kv_bytes": self._room.tokens * kv_bytes_per_token(shape, format_),
            "device": self._device,
            "work_directory": str(self._cache / "work" / kind.name),
        }
        try:
            return Contender(
                name,
                command=launch.command,
                worker=kind.worker,
                options=options,
                environment=launch.environment,
                log=self._cache / "logs" / f"{name}-{shape.name}-{format_}.log",
                load_timeout_s=_LOAD_TIMEOUT_S,
            )
        except ContenderError as error:
            self._note(f"{name} with {shape.name}/{format_}: {error}")
            return None

    def _take_turn(
        self,
        name: str,
        group: Group,
        turn: list[PointResult],
        round_: int,
        alive: dict[str, Contender],
        warm: set[tuple[str, str]],
    ) -> bool:
        """Run the turn's points once by one contender; return whether it runs at all."""
        if name not in alive:
            contender = self.start(name, group.shape, group.format)
            if contender is None:
                return False
            alive[name] = contender
        for result in turn:
            if name == ROOF_NAME:
                result.rates.append(Rates(**alive[name].run({"repeats": self._roof_repeats}, timeout_s=_RUN_TIMEOUT_S)))
                continue
            runs = result.runs.setdefault(name, [])
            if None in runs:
                continue
            try:
                if (name, result.point.name) not in warm:
                    warm.add((name, result.point.name))
                    tokens = min(_WARM_TOKENS, result.point.new_tokens)
                    self._ask(alive[name], group.shape, result.point, f"{self._seed} warm", tokens)
                seed = f"{self._seed} {round_}"
                answer = self._ask(alive[name], group.shape, result.point, seed, result.point.new_tokens)
                runs.append(evaluate(result.point, answer["events"]))
                result.tokens.setdefault(name, answer["tokens"])
            except (ContenderError, ValueError) as error:
                runs.append(None)
                self._note(f"{name} at {group.name} {result.point.name}: {error}")
                if alive[name].dead:
                    alive.pop(name).close()
                    return False
        return True

    def _ask(self, contender: Contender, shape: Shape, point: Point, seed: str, new_tokens: int) -> dict[str, Any]:
        request = {"prompts": draw_prompts(point, shape.vocabulary, seed), "new_tokens": new_tokens}
        return contender.run(request, timeout_s=_RUN_TIMEOUT_S)

    def _fits(self, shape: Shape, format_: Format, contenders: int) -> bool:
        weights = (shape.layer_weights + 2 * shape.head_weights) * max(WEIGHT_BYTES[format_], WEIGHT_BYTES[Format.BF16])
        if self._device == "cpu":
            return contenders * (weights * _COPIES + _PROCESS_BYTES) < 0.8 * _available_bytes()
        cache = self._room.tokens * kv_bytes_per_token(shape, format_)
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        return contenders * (weights + cache + _GPU_PROCESS_BYTES) < 0.9 * free_bytes

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", flush=True)


def check_tokens(arena: Arena, shape: Shape, tokens: int = 32) -> None:
    """Compare Slipstream's greedy tokens in fp32 with ``transformers``', so that nobody measures garbage.

    Raises: RuntimeError when they differ, or when one of the two cannot run.
    """
    point = Point(name="check", kind=Kind.DECODE, batch=1, prompt_tokens=64, new_tokens=tokens)
    request = {"prompts": draw_prompts(point, shape.vocabulary, "check"), "new_tokens": tokens}
    answers = []
    for name in ("slipstream", "transformers"):
        contender = arena.start(name, shape, Format.FP32)
        if contender is None:
            raise RuntimeError(f"{name} cannot run {shape.name} in fp32: {arena.notes[-1]}")
        with contender:
            answers.append(contender.run(request, timeout_s=_RUN_TIMEOUT_S)["tokens"])
    if answers[0] != answers[1]:
        raise RuntimeError(f"Slipstream's tokens are not transformers': {answers[0]} against {answers[1]}")
    print(f"{tokens} greedy tokens of {shape.name} in fp32 are those of transformers", flush=True)


def _available_bytes() -> float:
    """Return the memory that can be had without swapping; no limit where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    return float("inf") if found is None else int(found.group(1)) * 1024.0
