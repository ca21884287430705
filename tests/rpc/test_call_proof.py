"""Proofs of the cluster's secret: what is let in, and all that is not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from slipstream.runtime.rpc.call_proof import LIFETIME_S, Challenger, Proof
from slipstream.runtime.rpc.errors import SecretRefused
from slipstream.runtime.rpc.secret import checked_secret, secret_from
from slipstream.sdk.errors import ConfigError

SECRET = b"one secret of sixteen bytes"
OTHER = b"another of sixteen bytes"


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_whoever_knows_the_secret_is_let_in_and_learns_that_the_server_does() -> None:
    server = Challenger(SECRET, clock=Clock())
    proof = Proof(SECRET, server.challenge(), "Watch")
    proof.check(server.check("Watch", proof.sent))


def test_a_secret_never_travels() -> None:
    server = Challenger(SECRET, clock=Clock())
    challenge = server.challenge()
    proof = Proof(SECRET, challenge, "Watch")
    assert SECRET not in challenge + proof.sent + server.check("Watch", proof.sent)


def test_each_challenge_and_each_proof_is_another_one() -> None:
    server = Challenger(SECRET, clock=Clock())
    challenge = server.challenge()
    assert challenge != server.challenge()
    assert Proof(SECRET, challenge, "Watch").sent != Proof(SECRET, challenge, "Watch").sent


def test_without_a_proof_the_refusal_says_what_to_set() -> None:
    with pytest.raises(SecretRefused, match="SLIPSTREAM_SECRET"):
        Challenger(SECRET, clock=Clock()).check("Watch", None)


def test_another_secret_is_refused_on_both_sides() -> None:
    server = Challenger(SECRET, clock=Clock())
    with pytest.raises(SecretRefused, match="give both the same SLIPSTREAM_SECRET"):
        server.check("Watch", Proof(OTHER, server.challenge(), "Watch").sent)
    proof = Proof(OTHER, server.challenge(), "Watch")
    imposter = Challenger(OTHER, clock=Clock())
    answer = imposter.check("Watch", Proof(OTHER, imposter.challenge(), "Watch").sent)
    for wrong in (answer, b"", None, proof.sent):
        with pytest.raises(SecretRefused, match="who answers does not know the secret"):
            proof.check(wrong)


def test_a_proof_is_good_once_for_one_method_at_one_server() -> None:
    clock = Clock()
    server = Challenger(SECRET, clock=clock)
    challenge = server.challenge()
    proof = Proof(SECRET, challenge, "Facts")
    server.check("Facts", proof.sent)
    with pytest.raises(SecretRefused, match="answered before"):
        server.check("Facts", proof.sent)
    with pytest.raises(SecretRefused, match="answered before"):
        server.check("Facts", Proof(SECRET, challenge, "Facts").sent)
    with pytest.raises(SecretRefused, match="the secret is not the server's"):
        server.check("Session", proof.sent)
    # One challenge does for the calls that follow one another, each once.
    server.check("Session", Proof(SECRET, challenge, "Session").sent)
    with pytest.raises(SecretRefused, match="not this server's"):
        Challenger(SECRET, clock=clock).check("Facts", proof.sent)


def test_a_proof_is_not_good_for_ever() -> None:
    clock = Clock()
    server = Challenger(SECRET, clock=clock)
    proof = Proof(SECRET, server.challenge(), "Watch")
    clock.now_s += LIFETIME_S + 0.1
    with pytest.raises(SecretRefused, match="too old"):
        server.check("Watch", proof.sent)


def test_what_was_used_is_remembered_for_as_long_as_it_would_be_good_and_no_longer() -> None:
    clock = Clock()
    server = Challenger(SECRET, clock=clock, max_used=2)
    used = [Proof(SECRET, server.challenge(), "Watch") for _ in range(3)]
    for proof in used[:2]:
        server.check("Watch", proof.sent)
    with pytest.raises(SecretRefused, match="try again later"):
        server.check("Watch", used[2].sent)
    with pytest.raises(SecretRefused, match="answered before"):
        server.check("Watch", used[0].sent)
    clock.now_s += LIFETIME_S + 0.1
    server.check("Watch", Proof(SECRET, server.challenge(), "Watch").sent)


def test_any_other_bytes_are_refused() -> None:
    server = Challenger(SECRET, clock=Clock())
    whole = Proof(SECRET, server.challenge(), "Watch").sent
    for length in range(len(whole)):
        with pytest.raises(SecretRefused):
            server.check("Watch", whole[:length])
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        with pytest.raises(SecretRefused):
            server.check("Watch", bytes(damaged))
    with pytest.raises(SecretRefused):
        server.check("Watch", whole + b"\0")
    # None of these has used the challenge up.
    server.check("Watch", whole)


def test_a_challenge_that_is_none_is_not_answered() -> None:
    for challenge in (b"", b"short", bytes(200)):
        with pytest.raises(SecretRefused, match="no server of ours"):
            Proof(SECRET, challenge, "Watch")


def test_a_secret_comes_from_the_environment_or_not_at_all() -> None:
    assert secret_from({}) is None
    assert secret_from({"SLIPSTREAM_SECRET": ""}) is None
    assert secret_from({"SLIPSTREAM_SECRET": "sixteen bytes or more"}) == b"sixteen bytes or more"
    with pytest.raises(ConfigError, match=r"SLIPSTREAM_SECRET: needs at least 16 bytes, got 5"):
        checked_secret("short")
