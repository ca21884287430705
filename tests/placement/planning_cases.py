"""Clusters and models that the tests of placement speak of."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.model_sizes import (
    DenseMlp,
    ExpertMlp,
    GroupedAttention,
    LatentAttention,
    Layer,
    ModelSizes,
)
from slipstream.placement.topology import Link, Node, Topology

NVLINK = Link(bytes_per_s=450e9, latency_s=3e-6)
PCIE = Link(bytes_per_s=64e9, latency_s=8e-6)
RACK = Link(bytes_per_s=50e9, latency_s=8e-6)
NETWORK = Link(bytes_per_s=25e9, latency_s=12e-6)


def node(
    name: str,
    devices: int = 8,
    *,
    kind: str = "h100-sxm",
    link: Link = NVLINK,
    taken: frozenset[int] = frozenset(),
    **labels: str,
) -> Node:
    return Node(
        name=name, address=name, device_type=kind, devices=devices, device_link=link, labels=labels, taken=taken
    )


def cluster(*nodes: Node, network: Link = NETWORK, within: Mapping[str, Link] | None = None) -> Topology:
    return Topology(nodes=nodes, device_types=DEVICE_TABLE, network=network, within=within or {})


def llama_3_8b() -> ModelSizes:
    layer = Layer(mlp=DenseMlp(intermediate=14336))
    attention = GroupedAttention(heads=32, kv_heads=8, head_dim=128)
    return ModelSizes(
        name="llama-3-8b", hidden=4096, vocabulary=128256, attention=attention, layers=(layer,) * 32, longest=8192
    )


def llama_3_70b() -> ModelSizes:
    layer = Layer(mlp=DenseMlp(intermediate=28672))
    attention = GroupedAttention(heads=64, kv_heads=8, head_dim=128)
    return ModelSizes(
        name="llama-3-70b", hidden=8192, vocabulary=128256, attention=attention, layers=(layer,) * 80, longest=8192
    )


def deepseek_v3() -> ModelSizes:
    dense = Layer(mlp=DenseMlp(intermediate=18432))
    mixture = Layer(mlp=ExpertMlp(experts=256, top_k=8, intermediate=2048, shared_intermediate=2048))
    attention = LatentAttention(heads=128, query_rank=1536, kv_rank=512, plain_dim=128, rotary_dim=64, value_dim=128)
    return ModelSizes(
        name="deepseek-v3",
        hidden=7168,
        vocabulary=129280,
        attention=attention,
        layers=(dense,) * 3 + (mixture,) * 58,
        longest=163840,
        linear_dtype="float8",
        weight_bytes=1.0,
    )


def tiny(layers: int = 4) -> ModelSizes:
    """A model of which a replica fits on any device, so that every cut of it is possible."""
    layer = Layer(mlp=DenseMlp(intermediate=4096))
    attention = GroupedAttention(heads=12, kv_heads=12, head_dim=64)
    return ModelSizes(
        name="tiny", hidden=768, vocabulary=32000, attention=attention, layers=(layer,) * layers, longest=8192
    )
