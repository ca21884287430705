"""What common devices can do, by name.

Owns the figures. They are those of makers' data sheets: dense arithmetic, one direction of a link, the power limit of a
board. What a device really reaches is for calibration; users add rows, or change them, in their cluster file.

Prices have no source: they are round figures of the order that clouds asked in 2025, in US dollars, there so that
kinds can be compared. Whoever plans by cost should say their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from .topology import DeviceType, Link

_GIB = 1 << 30
_T = 1e12
_G = 1e9


def _gpu(
    name: str,
    *,
    memory_gib: float,
    tflops: Mapping[str, float],
    tbytes_per_s: float,
    link_gbytes_per_s: float,
    power_w: float,
    price_per_hour: float,
    link_latency_us: float = 3.0,
) -> DeviceType:
    return DeviceType(
        name=name,
        memory_bytes=int(memory_gib * _GIB),
        flops={dtype: value * _T for dtype, value in tflops.items()},
        memory_bytes_per_s=tbytes_per_s * _T,
        power_w=power_w,
        price_per_hour=price_per_hour,
        link=Link(bytes_per_s=link_gbytes_per_s * _G, latency_s=link_latency_us * 1e-6),
    )


_ROWS = (
    # NVIDIA H100 data sheet, SXM5 and PCIe columns, without sparsity; NVLink 4 at 900 GB/s both ways, PCIe 5 x16. The
    # driver shows 79.6 of the 80 GB as GiB.
    _gpu(
        "h100-sxm", memory_gib=79.6, tbytes_per_s=3.35, link_gbytes_per_s=450, power_w=700, price_per_hour=3.0,
        tflops={"bfloat16": 989, "float16": 989, "float8": 1979, "int8": 1979, "float32": 67},
    ),
    _gpu(
        "h100-pcie", memory_gib=79.6, tbytes_per_s=2.0, link_gbytes_per_s=64, power_w=350, price_per_hour=2.4,
        link_latency_us=8, tflops={"bfloat16": 756, "float16": 756, "float8": 1513, "int8": 1513, "float32": 51},
    ),
    # NVIDIA H200 data sheet, SXM: an H100 with 141 GB at 4.8 TB/s.
    _gpu(
        "h200", memory_gib=139.8, tbytes_per_s=4.8, link_gbytes_per_s=450, power_w=700, price_per_hour=3.6,
        tflops={"bfloat16": 989, "float16": 989, "float8": 1979, "int8": 1979, "float32": 67},
    ),
    # NVIDIA A100 data sheet, SXM4 columns; NVLink 3 at 600 GB/s both ways.
    _gpu(
        "a100-40gb", memory_gib=39.4, tbytes_per_s=1.555, link_gbytes_per_s=300, power_w=400, price_per_hour=1.3,
        tflops={"bfloat16": 312, "float16": 312, "int8": 624, "float32": 19.5},
    ),
    _gpu(
        "a100-80gb", memory_gib=79.2, tbytes_per_s=2.039, link_gbytes_per_s=300, power_w=400, price_per_hour=1.8,
        tflops={"bfloat16": 312, "float16": 312, "int8": 624, "float32": 19.5},
    ),
    # NVIDIA L40S and L4 data sheets, without sparsity; PCIe 4 x16.
    _gpu(
        "l40s", memory_gib=44.5, tbytes_per_s=0.864, link_gbytes_per_s=32, power_w=350, price_per_hour=1.0,
        link_latency_us=8, tflops={"bfloat16": 362, "float16": 362, "float8": 733, "int8": 733, "float32": 91.6},
    ),
    _gpu(
        "l4", memory_gib=22.5, tbytes_per_s=0.3, link_gbytes_per_s=32, power_w=72, price_per_hour=0.6,
        link_latency_us=8, tflops={"bfloat16": 121, "float16": 121, "float8": 242, "int8": 242, "float32": 30.3},
    ),
    # NVIDIA HGX B200 data sheet, an eighth of it, without sparsity; NVLink 5 at 1.8 TB/s both ways.
    _gpu(
        "b200", memory_gib=178.0, tbytes_per_s=7.7, link_gbytes_per_s=900, power_w=1000, price_per_hour=5.5,
        tflops={"bfloat16": 2250, "float16": 2250, "float8": 4500, "int8": 4500, "float32": 75},
    ),
    # AMD Instinct MI300X data sheet; seven Infinity Fabric links of 128 GB/s both ways.
    _gpu(
        "mi300x", memory_gib=191.5, tbytes_per_s=5.3, link_gbytes_per_s=448, power_w=750, price_per_hour=2.6,
        link_latency_us=5, tflops={"bfloat16": 1307, "float16": 1307, "float8": 2615, "int8": 2615, "float32": 163},
    ),
    # One core of a server CPU with AVX-512 bfloat16, measured: half of what two cores reached with packed weights (read
    # roof, matrix product of 2048). The link is gloo over loopback.
    DeviceType(
        name="cpu-core",
        memory_bytes=4 * _GIB,
        flops={"bfloat16": 480e9, "float16": 110e9, "float32": 110e9, "int8": 700e9},
        memory_bytes_per_s=27e9,
        power_w=5.0,
        price_per_hour=0.04,
        link=Link(bytes_per_s=2e9, latency_s=150e-6),
    ),
)  # fmt: skip

DEVICE_TABLE: Mapping[str, DeviceType] = {row.name: row for row in _ROWS}
"""Name → what a device of this kind can do."""
