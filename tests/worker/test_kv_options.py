"""A driver's options about KV, and what is made of them."""

from __future__ import annotations

import argparse

import pytest

from slipstream.comm.handshake import SECRET_VARIABLE
from slipstream.runtime.worker.kv_options import add_kv_options, kv_settings

SECRET = {SECRET_VARIABLE: "0123456789abcdef" * 4}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", default="a")
    parser.add_argument("--address")
    add_kv_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "wire_dtype", "kinds"),
    [
        (("--role=decode",), "auto", ("shm", "tcp")),
        (("--role=prefill", "--kv-transfer-dtype=fp8"), "fp8", ("shm", "tcp")),
        (("--kv-transport=tcp", "--kv-transfer-dtype=fp8"), "fp8", ("tcp",)),
    ],
)
def test_what_is_said_becomes_settings(arguments: tuple[str, ...], wire_dtype: str, kinds: tuple[str, ...]) -> None:
    settings = kv_settings(parsed(*arguments), SECRET)
    assert settings is not None
    assert (settings.wire_dtype, settings.kinds, settings.address) == (wire_dtype, kinds, "127.0.0.1")


def test_who_moves_nothing_has_no_settings() -> None:
    assert kv_settings(parsed("--role=mixed"), SECRET) is None


def test_numbers_that_there_are_not_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--kv-transfer-dtype=int8")
    assert "--kv-transfer-dtype: invalid choice: 'int8'" in capsys.readouterr().err
