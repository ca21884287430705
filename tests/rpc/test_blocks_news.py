"""What is kept of a replica's blocks while nobody watches: all that is there, and no more than any replica has."""

from __future__ import annotations

import pytest

from slipstream.runtime.rpc.blocks_news import BlocksNews
from slipstream.runtime.rpc.engine_client import BlockChanges
from slipstream.sdk.errors import EngineUnavailable

ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))


def test_more_than_any_replica_has_are_refused_while_they_are_kept() -> None:
    news = BlocksNews(max_kept=2)
    news.take(BlockChanges(stored=(ONE, TWO)))
    news.take(BlockChanges(stored=(THREE,), removed=(ONE,)))
    with pytest.raises(EngineUnavailable, match="3 cached blocks"):
        news.take(BlockChanges(stored=(ONE,)))


def test_nothing_is_kept_once_somebody_watches() -> None:
    news = BlocksNews(max_kept=1)
    told: list[BlockChanges] = []
    news.watch(told.append)
    many = BlockChanges(stored=(ONE, TWO, THREE))
    news.take(many)
    news.take(many)
    assert told == [BlockChanges(reset=True), many, many]
