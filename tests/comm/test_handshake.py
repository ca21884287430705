"""Who may join: both sides prove the secret, and everything that does not fit is named."""

from __future__ import annotations

import pytest

from slipstream.comm import handshake
from slipstream.comm.errors import CommMisuse, HandshakeRefused
from slipstream.comm.handshake import DriverHandshake, Identity, RankHandshake, secret_from

OURS = Identity(replica="decode-0", secret=b"the secret of our cluster")
THEIRS = Identity(replica="decode-0", secret=b"another cluster's secret")


def test_both_sides_are_sure_of_each_other() -> None:
    driver, rank = DriverHandshake(OURS), RankHandshake(OURS, rank=3)
    who, welcome = driver.check(rank.hello(driver.challenge()))
    rank.check(welcome)
    assert who == 3


def test_a_rank_without_the_secret_is_refused_and_told_nothing_else() -> None:
    driver = DriverHandshake(OURS)
    wrong = Identity(replica="elsewhere", secret=THEIRS.secret)
    with pytest.raises(HandshakeRefused, match="the secret is not the driver's") as refused:
        driver.check(RankHandshake(wrong, rank=1).hello(driver.challenge()))
    assert "decode-0" not in str(refused.value)


def test_a_driver_without_the_secret_is_refused() -> None:
    rank, impostor = RankHandshake(OURS, rank=1), DriverHandshake(THEIRS)
    hello = rank.hello(impostor.challenge())
    # It cannot know whether the hello was right; it answers what it can.
    _, welcome = impostor.check(RankHandshake(THEIRS, rank=1).hello(impostor.challenge()))
    for answer in (welcome, b"", hello[-32:], hello):
        with pytest.raises(HandshakeRefused, match="the driver does not know the secret"):
            rank.check(answer)


def test_what_was_heard_once_is_worth_nothing_later() -> None:
    driver, rank = DriverHandshake(OURS), RankHandshake(OURS, rank=1)
    hello = rank.hello(driver.challenge())
    with pytest.raises(HandshakeRefused, match="the secret is not"):
        DriverHandshake(OURS).check(hello)


def test_every_bit_of_a_hello_counts() -> None:
    driver, rank = DriverHandshake(OURS), RankHandshake(OURS, rank=1)
    hello = rank.hello(driver.challenge())
    for at in range(len(hello)):
        changed = bytearray(hello)
        changed[at] ^= 1
        with pytest.raises(HandshakeRefused):
            driver.check(bytes(changed))
    for cut in (b"", hello[:10], hello[:-1], hello + b"x"):
        with pytest.raises(HandshakeRefused):
            driver.check(cut)


def test_another_replica_is_named() -> None:
    driver = DriverHandshake(OURS)
    other = Identity(replica="prefill-1", secret=OURS.secret)
    with pytest.raises(HandshakeRefused, match="this is replica 'decode-0', not 'prefill-1'"):
        driver.check(RankHandshake(other, rank=1).hello(driver.challenge()))


def test_versions_are_compared_first(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, rank = DriverHandshake(OURS), RankHandshake(OURS, rank=1)
    challenge, hello = driver.challenge(), rank.hello(driver.challenge())
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", handshake.PROTOCOL_VERSION + 1)
    with pytest.raises(HandshakeRefused, match="driver speaks version 1 of the step bus, the rank version 2"):
        rank.hello(challenge)
    with pytest.raises(HandshakeRefused, match="driver speaks version 2 of the step bus, the rank version 1"):
        driver.check(hello)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(48)])
def test_who_is_no_driver_at_all_is_refused(answer: bytes) -> None:
    with pytest.raises(HandshakeRefused, match="is no driver"):
        RankHandshake(OURS, rank=1).hello(answer)


def test_the_secret_comes_from_the_environment_and_is_not_shown() -> None:
    assert secret_from({"SLIPSTREAM_SECRET": "long enough to be one"}) == b"long enough to be one"
    with pytest.raises(CommMisuse, match="SLIPSTREAM_SECRET is not set"):
        secret_from({})
    with pytest.raises(CommMisuse, match="at least 16 bytes, got 5"):
        Identity(replica="decode-0", secret=b"short")
    with pytest.raises(CommMisuse, match="1 to 256 bytes"):
        Identity(replica="", secret=OURS.secret)
    assert "secret" not in repr(OURS)
