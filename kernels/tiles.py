"""What kernels compute on tiles with: products that the interpreter gets right, and rounding on the way to memory."""

from __future__ import annotations

from .launch import INTERPRETED, jit, tl

_INTERPRETED = tl.constexpr(INTERPRETED)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr = "ieee"):
    """Return ``acc + a @ b``, the products of a's type, summed in float32.

    Float32 tiles are multiplied as they are ("ieee") unless ``PRECISION`` says "tf32".
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def rounded(x, TYPE: tl.constexpr):
    """Return float32 numbers as ``TYPE``, rounded to the nearest, ties to even: the interpreter truncates bfloat16."""
    if _INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        # What is not a number stays so.
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(TYPE)
