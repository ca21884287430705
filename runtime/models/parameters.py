"""The decoder's parameters as it takes them: tensors as they are, weights of linear layers in their format.

Filled one parameter at a time, so that a weight is in its format before the next one is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Formats
from .head_products import HeadProducts, head_products
from .layout import Role
from .linear import Biased, Linear
from .linear_format import Product
from .weights import Loaded


class Parameters:
    """Parameters by their names in ``parameter_layout``."""

    def __init__(self, formats: Formats, dtype: torch.dtype) -> None:
        """Begin without any; ``dtype`` is the type of hidden states."""
        self.dtype = dtype
        self._formats = formats
        self._tensors: dict[str, Tensor] = {}
        self._products: dict[str, tuple[Product, ...]] = {}

    def add(self, name: str, tensor: Loaded, role: Role) -> None:
        """Take a parameter in."""
        if not isinstance(tensor, Tensor):
            self._products[name] = tuple(self._formats.prepare_codes(role, codes) for codes in tensor)
            return
        match role:
            case Role.TENSOR | Role.HEADS:
                self._tensors[name] = tensor
            case Role.LINEAR | Role.SUMMED | Role.ROUTER:
                self._products[name] = (self._formats.of(role).prepare(tensor),)
            case Role.EXPERTS | Role.SUMMED_EXPERTS:
                self._products[name] = tuple(self._formats.of(role).prepare(weight) for weight in tensor)
            case Role.HEAD:
                self._products[name] = (self._formats.products.prepare_head(tensor),)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name]

    def linear(self, name: str) -> Linear:
        """Return the linear layer called ``name``; it has a bias if there is one."""
        (product,) = self._products[f"{name}.weight"]
        return Linear(product=product, bias_O=self._tensors.get(f"{name}.bias"))

    def heads(self, name: str, *, transposed: bool = False) -> HeadProducts:
        """Return the products with each head's matrix, inputs first; ``transposed``: they are stored outputs first.

        The numbers are given up: they may be kept in another layout.
        """
        weight = self._tensors.pop(name)
        return head_products(weight.transpose(1, 2) if transposed else weight, self._formats.of(Role.HEADS))

    def experts(self, name: str) -> tuple[Product, ...]:
        """Return the weights of all experts of a layer; each adds its bias if there are any."""
        biases = self._tensors.get(f"{name}_biases")
        if biases is None:
            return self._products[name]
        return tuple(Biased(product, bias_O) for product, bias_O in zip(self._products[name], biases, strict=True))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._tensors.values())).device

    def head(self, *, tied: bool) -> Product:
        """Return the output head; ``tied``: it is the embedding, of which the format keeps a copy of its own."""
        if tied:
            return self._formats.products.prepare_head(self._tensors["embedding"])
        (product,) = self._products["head"]
        return product
