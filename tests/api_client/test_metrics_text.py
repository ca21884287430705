"""Metrics as text: figures by name, over all labels."""

from __future__ import annotations

from slipstream.runtime.api_client.metrics_text import figures

TEXT = """
# HELP ended how
# TYPE ended counter
ended{how="committed"} 3.0
ended{how="dead } peer",to="a b"} 2 1700000000
free 1.5e3
nothing NaN?
half{
"""


def test_figures_are_added_up_over_labels() -> None:
    assert figures(TEXT) == {
        "ended": 5.0,
        'ended{how="committed"}': 3.0,
        'ended{how="dead } peer",to="a b"}': 2.0,
        "free": 1500.0,
    }


def test_a_text_without_figures_has_none() -> None:
    assert figures("") == {} and figures("<html>not metrics</html>\n\n") == {}
