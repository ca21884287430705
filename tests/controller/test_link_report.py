"""What is said of measured links: everything in the matrix, and what stands out by name."""

from __future__ import annotations

import json
from itertools import permutations

from slipstream.runtime.controller.link_report import MOST_COLUMNS, records_of, suspicions, text_of
from slipstream.runtime.controller.links import LinkFigures, MeasuredLink, MeasuredLinks, UnmeasuredLink


def measured(
    names: str | list[str],
    *,
    rates: dict[str, float] | None = None,
    trips_us: dict[str, float] | None = None,
    missing: tuple[UnmeasuredLink, ...] = (),
) -> MeasuredLinks:
    """Return links of 1 GB/s and 100 us, but for those named such as a>b (GB/s) and a>b (us)."""
    links = []
    for a, b in permutations(names, 2):
        rate, trip = (rates or {}).get(f"{a}>{b}", 1.0), (trips_us or {}).get(f"{a}>{b}", 100.0)
        figures = LinkFigures(
            bytes_per_s=rate * 1e9, round_trip_s=trip * 1e-6, round_trip_p99_s=trip * 2e-6, moved_bytes=10
        )
        links.append(MeasuredLink(source=a, target=b, figures=figures))
    return MeasuredLinks(
        began_s=0.0,
        took_s=2.5,
        addresses={name: name for name in names},
        links=tuple(links),
        missing=missing,
        moved_bytes=10 * len(links),
    )


def test_even_links_are_not_suspicious() -> None:
    found = measured("abcd", rates={"a>b": 0.9, "b>a": 1.1, "c>d": 0.8})
    assert list(suspicions(found)) == []
    assert "suspicious: none" in text_of(found)


def test_kinds_of_links_are_no_reason_for_suspicion() -> None:
    racks = {f"{a}>{b}": 4.0 for rack in ("abc", "def") for a, b in permutations(rack, 2)}
    assert list(suspicions(measured("abcdef", rates=racks))) == []


def test_a_slow_pair_is_named() -> None:
    found = list(suspicions(measured("abcd", rates={"b>c": 0.2, "c>b": 0.2})))
    assert found == [
        "b -> c: 0.2 GB/s, where both have 1 with others",
        "c -> b: 0.2 GB/s, where both have 1 with others",
    ]


def test_a_slow_node_is_named_and_not_each_of_its_links() -> None:
    slow = {f"{a}>{b}": 0.1 for a, b in permutations("abcd", 2) if "c" in (a, b)}
    assert list(suspicions(measured("abcd", rates=slow))) == ["c: its links have 0.1 GB/s, those of other nodes 1"]


def test_directions_that_differ_late_and_unsteady_links_are_named() -> None:
    (unequal,) = suspicions(measured("ab", rates={"a>b": 0.5}))
    assert unequal == "a -> b: 0.5 GB/s, and 1 the other way"
    (late,) = suspicions(measured("abc", trips_us={"a>b": 900.0, "b>a": 900.0}))
    assert late == "a - b: a round trip takes 900 us, and 100 with others"
    figures = LinkFigures(bytes_per_s=1e9, round_trip_s=1e-4, round_trip_p99_s=0.02)
    unsteady = MeasuredLinks(
        began_s=0,
        took_s=0,
        addresses={"a": "", "b": ""},
        links=(MeasuredLink(source="a", target="b", figures=figures),),
    )
    assert list(suspicions(unsteady)) == ["a -> b: one round trip in a hundred takes over 20.0 ms, and most 0.10 ms"]


def test_the_text_has_a_matrix_the_slowest_and_what_is_missing() -> None:
    missing = (UnmeasuredLink(source="a", target="z", why="nobody answers"),)
    text = text_of(measured("abc", rates={"c>a": 0.25}, missing=missing))
    assert "6 of 6 directions between 3 nodes measured in 2.5 s" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "b", "c"] in rows
    assert ["c", "0.25", "/", "50", "1", "/", "50", "-"] in rows
    assert "slowest:\n  c -> a: 0.25 GB/s, round trip 100 us (99 %: 200 us)" in text
    assert "not measured:\n  a -> z: nobody answers" in text


def test_a_large_cluster_has_no_matrix_and_json_has_all() -> None:
    names = [f"n{index:02}" for index in range(MOST_COLUMNS + 1)]
    found = measured(names)
    assert "--json has all" in text_of(found)
    records = json.loads(json.dumps(records_of(found)))
    assert len(records["links"]) == len(names) * (len(names) - 1) and records["suspicious"] == []
    assert records["links"][0] == {
        "source": "n00", "target": "n01", "bytes_per_s": 1e9,
        "round_trip_s": 100 * 1e-6, "round_trip_p99_s": 200 * 1e-6,
    }  # fmt: skip
