"""A config.json of given fields, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.tests.models.config_files import SpecOf, spec_from


@pytest.fixture
def spec_of(tmp_path: Path) -> SpecOf:
    """Reads what an architecture's config.json says, with sizes that every one has."""
    return lambda architecture, **fields: spec_from(tmp_path, architecture, **fields)
