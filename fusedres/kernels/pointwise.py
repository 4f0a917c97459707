"""Torch's pointwise functions that Triton lacks or rounds badly, in fp32: what lowering.py calls.

Built from the blocks of epilogue.py. NaN in any operand comes out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import epilogue


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(h):
    """0 for NaN, as in torch."""
    return tl.where(h > 0, 1.0, tl.where(h < 0, -1.0, 0.0))


@triton.jit
def expm1(h):
    """The series of epilogue.expm1 holds up to 0.5, beyond it nothing cancels."""
    return tl.where(h < 0.5, epilogue.expm1(h), tl.exp(h) - 1.0)


@triton.jit
def log1p(h):
    """The series of epilogue.log1p in atanh's argument holds on both sides of 0."""
    return tl.where((h > -0.5) & (h <= 1), epilogue.log1p(h), tl.log(1.0 + h))


@triton.jit
def log(h):
    """Near 1 a GPU's logarithm has an absolute error; h - 1 is exact there."""
    return tl.where((h > 0.5) & (h <= 2), epilogue.log1p(h - 1.0), tl.log(h))


@triton.jit
def sinh(h):
    """(e + e / (1 + e)) / 2 with e = expm1(|h|)."""
    e = expm1(tl.abs(h))
    s = tl.where(e < 1e9, 0.5 * (e + e / (1.0 + e)), 0.5 * e)
    return tl.where(h < 0, -s, s)


@triton.jit
def cosh(h):
    return 0.5 * tl.exp(h) + 0.5 * tl.exp(-h)


@triton.jit
def asinh(h):
    """log1p(t + t * t / (1 + sqrt(1 + t * t))), t = |h|, so that t * t does not overflow."""
    t = tl.abs(h)
    r = 1.0 / t
    s = log1p(t + t / (r + tl.sqrt_rn(1.0 + r * r)))
    return tl.where(h < 0, -s, s)


@triton.jit
def erf(h):
    """2 * normal_cdf(h * sqrt(2)) - 1; near 0, where that cancels, the Taylor series to h**13."""
    q = h * h
    p = 1 / 216 + q * (-1 / 1320 + q * (1 / 9360))
    p = 1.0 + q * (-1 / 3 + q * (1 / 10 + q * (-1 / 42 + q * p)))
    far = 2.0 * epilogue.normal_cdf(1.4142135623730951 * h) - 1.0
    return tl.where(tl.abs(h) < 0.5, 1.1283791670955126 * h * p, far)


@triton.jit
def erfc(h):
    return 2.0 * epilogue.normal_cdf(-1.4142135623730951 * h)
