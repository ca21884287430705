"""One Ray for the tests of a file: starting it takes longest, and other files must not find this process connected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Raylets called a and b, and this process connected to them."""
    pytest.importorskip("ray")
    from slipstream.tests.controller.ray_bed import ray_nodes  # noqa: PLC0415 (the other tests run without Ray)

    with pytest.MonkeyPatch.context() as patch, ray_nodes(patch, "a", "b") as found:
        yield found
