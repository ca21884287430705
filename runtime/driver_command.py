"""How a driver's process is started: its module, the engine's options and its role as arguments, its environment.

Both who serves one model on this host (the gateway) and who places ranks on many (the controller) start one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from ..placement.plan import Role
from .config import EngineOptions

DRIVER_MODULE = "slipstream.runtime.worker.main"

KV_TRANSPORTS = ("auto", "tcp", "shm")
"""Ways from a prefill to a decode replica that a driver can be told to use."""

KV_TRANSFER_DTYPES = ("auto", "fp8")
"""Numbers on that way: as they are in the cache, or of 8 bits."""

_NOT_FOR_A_DRIVER = ("model", "skip_tokenizer_init")
_HUGE_PAGES = "glibc.malloc.hugetlb"


def engine_arguments(options: EngineOptions) -> tuple[str, ...]:
    """Return the arguments for all options that are not as they are without one; the model is not among them."""
    arguments: list[str] = []
    for each in fields(EngineOptions):
        value = getattr(options, each.name)
        if each.name in _NOT_FOR_A_DRIVER or value == each.default:
            continue
        flag = each.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return tuple(arguments)


def role_arguments(
    role: Role, *, kv_transport: str, kv_address: str, across_hosts: bool, transfer_dtype: str = "auto"
) -> tuple[str, ...]:
    """Return the arguments for what a replica does with a request; none for one that does all of it.

    ``kv_address``: where its ranks can be reached with KV; ``across_hosts``: from other hosts too.
    """
    if role is Role.MIXED:
        return ()
    arguments = ["--role", role.value, "--kv-transport", kv_transport, "--kv-address", kv_address]
    if transfer_dtype != "auto":
        arguments += ["--kv-transfer-dtype", transfer_dtype]
    if across_hosts:
        arguments.append("--kv-across-hosts")
    return tuple(arguments)


def driver_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a driver's environment: huge pages for all that it allocates, unless somebody has chosen already.

    glibc reads this before the process begins, so only whoever starts it can set it. Weights on a CPU are read from
    beginning to end at every step, and are many small pieces: in small pages a step takes 5 to 15 % longer.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return {**environment, "GLIBC_TUNABLES": tunables}
