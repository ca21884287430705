"""The report: medians, ratios and roofs, as lines to print and as plain values for JSON.

A ratio is taken within each round and then its median, because the machine itself changes from round to round.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from slipstream.benchmarks.engine.measure import Run, spread
from slipstream.benchmarks.engine.roof import roof_tokens_per_s
from slipstream.benchmarks.engine.rounds import PointResult

OURS = "slipstream"


def figures(result: PointResult) -> dict[str, Any]:
    """Return one point's figures: rates, ratio of ours to each, the roof and the fraction of it that we reached."""
    shape, format_ = result.group.shape, result.group.format
    roofs = [roof_tokens_per_s(shape, format_, result.point, rates) for rates in result.rates]
    contenders: dict[str, dict[str, Any]] = {}
    for name, runs in result.runs.items():
        done = [run for run in runs if run is not None]
        contenders[name] = {
            "tokens_per_s": asdict(spread([run.rate for run in done])),
            "end_to_end_tokens_per_s": asdict(spread([run.end_to_end for run in done])),
            "step_ms": asdict(spread([run.step_ms for run in done])),
            "ratio_of_ours": _ratio(result.runs.get(OURS, []), runs),
            "fraction_of_roof": spread([run.rate / roof for run, roof in zip(done, roofs, strict=False)]).median,
            "same_tokens": _same_tokens(result, name),
        }
    peers = {name: value for name, value in contenders.items() if name != OURS}
    rates = {name: value["tokens_per_s"]["median"] for name, value in peers.items()}
    best = max((name for name, rate in rates.items() if not math.isnan(rate)), key=rates.__getitem__, default=None)
    return {
        "group": result.group.name,
        "point": result.point.name,
        "roof_tokens_per_s": asdict(spread(roofs)),
        "rates": [asdict(rates_) for rates_ in result.rates],
        "contenders": contenders,
        "best_peer": best,
        "ratio_to_best_peer": math.nan if best is None else peers[best]["ratio_of_ours"],
    }


def print_point(figure: dict[str, Any], order: list[str]) -> None:
    """Print one point's lines."""
    roof = figure["roof_tokens_per_s"]
    rates = figure["rates"]
    machine = ""
    if rates:
        read, bf16, fp32 = (
            spread([rate[name] for rate in rates]).median / 1e9
            for name in ("read_bytes_per_s", "bf16_flop_per_s", "fp32_flop_per_s")
        )
        machine = f" (read {read:.1f} GB/s, products {bf16:.0f} bf16, {fp32:.0f} fp32 GFLOP/s)"
    print(f"\n{figure['group']} {figure['point']}: roof {roof['median']:,.0f} tokens/s{machine}")
    head = ("", "tokens/s", "min", "max", "end to end", "of roof", "ours/this", "same tokens")
    print("  ".join(f"{cell:>14}" for cell in head))
    for name in order:
        if (value := figure["contenders"].get(name)) is None:
            continue
        rate = value["tokens_per_s"]
        numbers = (rate["median"], rate["least"], rate["most"], value["end_to_end_tokens_per_s"]["median"])
        cells = [name, *(f"{number:,.1f}" for number in numbers), f"{value['fraction_of_roof']:.0%}"]
        cells += [f"{value['ratio_of_ours']:.2f}", value["same_tokens"]]
        print("  ".join(f"{cell.replace('nan%', '-').replace('nan', '-'):>14}" for cell in cells))
    if not math.isnan(figure["ratio_to_best_peer"]):
        print(f"  {figure['ratio_to_best_peer']:.2f} of the best peer, {figure['best_peer']}", flush=True)


def without_nan(value: Any) -> Any:
    """Return plain values with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _ratio(ours: list[Run | None], theirs: list[Run | None]) -> float:
    pairs = zip(ours, theirs, strict=False)
    ratios = [one.rate / other.rate for one, other in pairs if one is not None and other is not None]
    # In logarithms, so that of an even number of rounds twice and half as fast make as fast.
    return math.exp(spread([math.log(ratio) for ratio in ratios]).median)


def _same_tokens(result: PointResult, name: str) -> str:
    """Return how many of the first round's tokens, up to each sequence's first difference, are those of ours."""
    if OURS not in result.tokens or name not in result.tokens:
        return "-"
    same, total = 0, 0
    for ours, theirs in zip(result.tokens[OURS], result.tokens[name], strict=True):
        total += len(ours)
        pairs = enumerate(zip(ours, theirs, strict=True))
        same += next((place for place, (one, other) in pairs if one != other), len(ours))
    return f"{same}/{total}"
