"""The line that says where a replica meets: what was written is read, and what was not is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from slipstream.runtime.handoff.settings import KvLimits, KvShare
from slipstream.runtime.worker.rank import RankSetup
from slipstream.runtime.worker.rank_order import RankOrder
from slipstream.sdk.errors import ConfigError

KEEPERS_LINE_BYTES = 12_000

SETUP = RankSetup(
    model="/models/" + "x" * 200,
    tokenizer="/models/" + "ü" * 200,
    dtype="bfloat16",
    device="cpu",
    quantization="none",
    deterministic=False,
    num_threads=None,
    num_blocks=1000,
    block_size=16,
    max_slots=256,
    max_length=4096,
    eos_token_ids=(2, 3),
    tp=2,
    pp=2,
    sharded_norm=True,
    ranks_per_host=2,
    kv=KvShare(
        replica="chat-0",
        incarnation=1_760_000_000_000,
        model="0123456789abcdef0123456789abcdef",
        kinds=("shm", "tcp"),
        across_hosts=True,
        wire_dtype="fp8",
        limits=KvLimits(),
    ),
)
ORDER = RankOrder(
    replica="chat/1",
    bus="10.0.0.1:4000",
    rendezvous_host="10.0.0.1",
    rendezvous_port=4001,
    timeout_s=600.0,
    comm_timeout_s=60.0,
    setup=SETUP,
    kv_bus="10.0.0.1:4002",
)


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(ORDER.to_json()), **values})


def with_setup(**values: Any) -> str:
    return changed(setup={**json.loads(ORDER.to_json())["setup"], **values})


def test_an_order_is_read_as_it_was_written_and_is_short_enough_for_its_keeper() -> None:
    line = ORDER.to_json()
    assert RankOrder.from_json(line) == ORDER
    assert "\n" not in line
    assert len(json.dumps({"meeting": line})) < KEEPERS_LINE_BYTES


def test_a_replica_that_moves_no_kv_says_nothing_of_it() -> None:
    order = replace(ORDER, setup=replace(SETUP, kv=None), kv_bus="")
    assert RankOrder.from_json(order.to_json()) == order


def with_kv(**values: Any) -> str:
    return with_setup(kv={**json.loads(ORDER.to_json())["setup"]["kv"], **values})


def test_numbers_without_a_fraction_are_seconds_too() -> None:
    order = RankOrder.from_json(changed(timeout_s=5))
    assert order.timeout_s == 5.0 and isinstance(order.timeout_s, float)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "is no JSON"),
        ("at 10.0.0.1", "is no JSON, but 'at 10.0.0.1'"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "order must be an object"),
        ("null", "order must be an object"),
        ("{}", "is missing"),
        (changed(colour="red"), "colour is unknown: start all ranks from one release"),
        (changed(rendezvous_port="80"), "rendezvous_port must be int"),
        (changed(rendezvous_port=True), "rendezvous_port must be int"),
        (changed(bus=None), "bus must be str"),
        (changed(timeout_s="long"), "timeout_s must be float"),
        (changed(setup=[]), "setup must be an object"),
        (with_setup(model=7), "model must be str"),
        (with_setup(kv=[]), "kv must be an object"),
        (with_kv(kinds="tcp"), "kinds must be tuple"),
        (with_kv(kinds=[1]), "kinds must be tuple"),
        (with_kv(limits=None), "limits must be an object"),
        (with_kv(secret="the cluster's"), "secret is unknown"),
        (with_setup(eos_token_ids=["a"]), "eos_token_ids must be"),
        (with_setup(sharded_norm=1), "sharded_norm must be bool"),
        (with_setup(num_threads=1.5), "num_threads must be int"),
        (with_setup(tp=0), "tp must be at least 1"),
        (with_setup(hue=1), "hue is unknown"),
    ],
)
def test_what_is_no_order_is_refused_by_name(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^meeting: ") as refused:
        RankOrder.from_json(line)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400
