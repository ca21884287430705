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
    """Return float32 numbers as ``TYPE``, rounded to the nearest, ties to even; float8 is cut off at its largest.

    The interpreter's own casts are wrong: to bfloat16 it truncates, and to float8 it loses carries.
    """
    if tl.float8e4nv == TYPE:
        # What is not a number stays so.
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x)
        if _INTERPRETED:
            x = _on_float8_grid(x)
    elif _INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@jit
def _on_float8_grid(x):
    """Return the nearest numbers that float8 has, which the interpreter casts without rounding."""
    # Below 2^-6 they are multiples of 2^-9, which adding 1.5 * 2^14 rounds to.
    small = (tl.abs(x) + 24576.0) - 24576.0
    small = tl.where(x.to(tl.int32, bitcast=True) < 0, -small, small)
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFFF + ((bits >> 20) & 1)
    large = (bits & 0xFFF00000).to(tl.float32, bitcast=True)
    not_a_number = tl.full(x.shape, 0x7FF00000, tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(x == x, tl.where(tl.abs(x) < 0.015625, small, large), not_a_number)
