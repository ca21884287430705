"""Which format each parameter of a rank's decoder has: chosen once, from the options, by its role.

With ``deterministic`` the products whose results are summed over ranks are trees (``tree_format``), and the router's
scores, which are a plain product otherwise, are computed as other products are: a row's bits are its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codes_format import CodesFormat
from .layout import Role
from .linear_format import LinearFormat, PlainFormat, Product, choose_format
from .sharding import Shard
from .stored_weights import Codes
from .tree_format import TreeFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """A format for each kind of product.

    ``sums`` and ``expert_sums``: of what is added up over the ranks that have a layer's, or an expert's, other columns.
    ``router``: of what is never quantized.
    """

    products: LinearFormat
    sums: LinearFormat
    expert_sums: LinearFormat
    router: LinearFormat
    codes: CodesFormat

    def of(self, role: Role) -> LinearFormat:
        """Return the format of weights in a role."""
        match role:
            case Role.SUMMED:
                return self.sums
            case Role.SUMMED_EXPERTS:
                return self.expert_sums
            case Role.ROUTER | Role.HEADS:
                return self.router
            case _:
                return self.products

    def prepare_codes(self, role: Role, codes: Codes) -> Product:
        """Take a weight that is quantized on disk."""
        return self.codes.prepare(codes, self.of(role), is_summed=role in (Role.SUMMED, Role.SUMMED_EXPERTS))


def choose_formats(quantization: str, *, dtype: torch.dtype, device: torch.device, shard: Shard) -> Formats:
    """Return the formats for some options and a rank's shard.

    Raises: ConfigError naming the option
    """
    products = choose_format(quantization, dtype=dtype, device=device, deterministic=shard.fixed_order)
    codes = CodesFormat(dtype=dtype, device=device, keep=quantization == "none", one_way=shard.fixed_order)
    if not shard.fixed_order:
        return Formats(products=products, sums=products, expert_sums=products, router=PlainFormat(), codes=codes)
    router = choose_format("none", dtype=dtype, device=device, deterministic=True)
    ranks = shard.place.shape.tp
    sums = TreeFormat(products, ranks=ranks)
    return Formats(
        products=products,
        sums=sums,
        expert_sums=TreeFormat(products, ranks=1) if shard.experts_over_tp else sums,
        router=router,
        codes=codes,
    )
