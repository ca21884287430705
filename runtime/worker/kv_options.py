"""A driver's options about KV on its way to other replicas, and what is made of them.

Said to all ranks of a replica alike; the driver alone has a role.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from ...comm.errors import CommMisuse
from ...comm.handshake import SECRET_VARIABLE, secret_from
from ...comm.kv.transfer import TransferLimits
from ...sdk.errors import ConfigError
from ..clock import wall_clock
from ..driver_command import KV_TRANSFER_DTYPES
from ..handoff.settings import KINDS, KvLimits, KvSettings

ROLES = ("prefill", "decode", "mixed")
TRANSPORTS = ("auto", *KINDS[::-1], "none")

_HEARTBEATS_A_LEASE = 5


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a driver's parser."""
    group = parser.add_argument_group("one of several replicas, between which requests are split")
    group.add_argument("--role", choices=ROLES, help="what this replica does (default: mixed)")
    group.add_argument(
        "--kv-transport",
        choices=TRANSPORTS,
        help="how KV moves; auto is shm within a host, else tcp (default: none, with --role prefill or decode auto)",
    )
    group.add_argument("--kv-address", metavar="HOST", help="where other replicas reach this host (default: --address)")
    group.add_argument(
        "--kv-transfer-dtype",
        choices=KV_TRANSFER_DTYPES,
        default="auto",
        help="numbers on their way: auto is as in the cache; fp8 (e4m3) takes half the bytes of bfloat16 and rounds: "
        "tokens may differ from those of one engine (default: auto)",
    )
    group.add_argument("--kv-across-hosts", action="store_true", help="other replicas may be on other hosts")
    group.add_argument(
        "--kv-transfer-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="a transfer may wait for blocks so long, and 10 seconds of it for a word (default: 30)",
    )
    group.add_argument(
        "--kv-max-parked-bytes",
        type=int,
        default=2 << 30,
        metavar="N",
        help="KV kept for receivers without room (default: 2 GiB)",
    )
    group.add_argument(
        "--kv-serial-below-tokens",
        type=int,
        default=KvLimits().serial_below_tokens,
        metavar="N",
        help="prompts shorter than this are sent when they are computed, not layer by layer (default: 256)",
    )


def check_kv_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    transport = kv_transport(options)
    if options.role in ("prefill", "decode") and transport == "none":
        parser.error(f"--role {options.role} needs a --kv-transport")
    if transport != "none" and options.null:
        parser.error("--null has no KV to move: leave --kv-transport")
    if transport != "none" and not options.replica:
        parser.error("--replica is missing: replicas that move KV are known by name")
    if options.kv_transfer_timeout <= 0 or min(options.kv_max_parked_bytes, options.kv_serial_below_tokens) < 0:
        parser.error("--kv-transfer-timeout must be more than 0, --kv-max-parked-bytes and --kv-serial-... at least 0")


def kv_transport(options: argparse.Namespace) -> str:
    """Return how KV moves: an option's word, or its default for the role."""
    if options.kv_transport is not None:
        return str(options.kv_transport)
    return "auto" if options.role in ("prefill", "decode") else "none"


def kv_settings(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> KvSettings | None:
    """Return how this replica moves KV, None when it does not.

    Raises: ConfigError naming the secret's variable
    """
    transport = kv_transport(options)
    if transport == "none":
        return None
    try:
        secret = secret_from(environment)
    except CommMisuse as error:
        raise ConfigError(SECRET_VARIABLE, f"is needed where KV is moved: {error}") from error
    return KvSettings(
        replica=options.replica,
        # Later lives have larger ones; a millisecond is less than starting takes.
        incarnation=int(wall_clock() * 1000),
        secret=secret,
        address=options.kv_address or options.address or "127.0.0.1",
        kinds=KINDS if transport == "auto" else (transport,),
        across_hosts=options.kv_across_hosts,
        wire_dtype=options.kv_transfer_dtype,
        limits=KvLimits(serial_below_tokens=options.kv_serial_below_tokens),
    )


def transfer_limits(options: argparse.Namespace, *, block_bytes: int) -> TransferLimits:
    """Return the bounds of transfers at the driver. Units: block_bytes, of a block at all ranks"""
    lease_s = min(10.0, options.kv_transfer_timeout)
    heartbeat_s = lease_s / _HEARTBEATS_A_LEASE
    return TransferLimits(
        lease_s=lease_s,
        heartbeat_s=heartbeat_s,
        resend_s=min(1.0, heartbeat_s),
        answer_timeout_s=min(5.0, options.kv_transfer_timeout),
        max_wait_s=options.kv_transfer_timeout,
        max_parked_blocks=options.kv_max_parked_bytes // block_bytes,
    )
