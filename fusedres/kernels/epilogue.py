"""Activations on a tile in registers, each beside its derivative, in fp32.

A kernel takes these functions as constexpr arguments and does not know which exist. They are plain
arithmetic, so the interpreter runs them too. NaN compares false and comes out of every activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Building blocks.


@triton.jit
def expm1(h):
    """exp(h) - 1 for h <= 0; near 0, where the difference would cancel, its Taylor series."""
    p = 1 / 5040 + h * (1 / 40320)
    p = 1 / 120 + h * (1 / 720 + h * p)
    p = 1.0 + h * (1 / 2 + h * (1 / 6 + h * (1 / 24 + h * p)))
    return tl.where(h > -0.5, h * p, tl.exp(h) - 1.0)


@triton.jit
def log1p(e):
    """log(1 + e) = 2 atanh(s), s = e / (2 + e), for 0 <= e <= 1; the series of atanh to s**15."""
    s = e / (2.0 + e)
    q = s * s
    p = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * p))))


@triton.jit
def normal_cdf(h):
    """(1 + erf(h / sqrt(2))) / 2 to 8e-8: Phi(-t) = 2**(-t * p(t)) / 2, p minimax of degree 7."""
    t = tl.abs(h)
    p = -3.93776863347739e-05 + t * 2.8349124931992264e-06
    p = 0.00013693638902623206 + t * (0.000186180230230093 + t * p)
    p = 0.052496179938316345 + t * (-0.00706342002376914 + t * p)
    p = 1.1511051654815674 + t * (0.4592081904411316 + t * p)
    tail = 0.5 * tl.exp2(-t * p)
    return tl.where(h < 0, tail, 1.0 - tail)


# Activations.


@triton.jit
def identity(h):
    return h


@triton.jit
def identity_grad(h):
    return tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def relu(h):
    return tl.where(h < 0, 0.0, h)


@triton.jit
def relu_grad(h):
    return tl.where(h <= 0, 0.0, 1.0)


@triton.jit
def leaky_relu(h):
    return tl.where(h > 0, h, 0.01 * h)


@triton.jit
def leaky_relu_grad(h):
    return tl.where(h > 0, 1.0, 0.01)


@triton.jit
def relu2(h):
    r = relu(h)
    return r * r


@triton.jit
def relu2_grad(h):
    return 2.0 * relu(h)


@triton.jit
def relu6(h):
    return tl.where(h > 6, 6.0, relu(h))


@triton.jit
def relu6_grad(h):
    return tl.where((h <= 0) | (h >= 6), 0.0, 1.0)


@triton.jit
def elu(h):
    return tl.where(h > 0, h, expm1(h))


@triton.jit
def elu_grad(h):
    return tl.where(h > 0, 1.0, tl.exp(h))


@triton.jit
def selu(h):
    return 1.0507009873554805 * tl.where(h > 0, h, 1.6732632423543772 * expm1(h))


@triton.jit
def selu_grad(h):
    return 1.0507009873554805 * tl.where(h > 0, 1.0, 1.6732632423543772 * tl.exp(h))


@triton.jit
def gelu(h):
    return h * normal_cdf(h)


@triton.jit
def gelu_grad(h):
    return normal_cdf(h) + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))


@triton.jit
def gelu_tanh(h):
    """h * (1 + tanh(u)) / 2 = h * sigmoid(2u), u = sqrt(2/pi) * (h + 0.044715 h**3)."""
    return h * tl.sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))


@triton.jit
def gelu_tanh_grad(h):
    s = tl.sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))
    return s + h * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * h * h))


@triton.jit
def silu(h):
    return h * tl.sigmoid(h)


@triton.jit
def silu_grad(h):
    s = tl.sigmoid(h)
    return s * (1.0 + h * (1.0 - s))


@triton.jit
def mish(h):
    """h * tanh(softplus(h)) = h * q / (q + 2), q = e * (e + 2), e = exp(h); h itself beyond 20."""
    e = tl.exp(tl.where(h > 20, 20.0, h))
    q = e * (e + 2.0)
    return h * (q / (q + 2.0))


@triton.jit
def mish_grad(h):
    e = tl.exp(tl.where(h > 20, 20.0, h))
    q = e * (e + 2.0)
    t = q / (q + 2.0)
    return t + h * (1.0 + t) * (2.0 / (q + 2.0)) * (e / (1.0 + e))


@triton.jit
def softplus(h):
    return relu(h) + log1p(tl.exp(-tl.abs(h)))


@triton.jit
def softplus_grad(h):
    return tl.sigmoid(h)


@triton.jit
def hardswish(h):
    return h * hardsigmoid(h)


@triton.jit
def hardswish_grad(h):
    return tl.where(h <= -3, 0.0, tl.where(h >= 3, 1.0, h / 3.0 + 0.5))


@triton.jit
def hardsigmoid(h):
    return relu6(h + 3.0) * (1 / 6)


@triton.jit
def hardsigmoid_grad(h):
    return tl.where((h > -3) & (h < 3), 1 / 6, 0.0)


@triton.jit
def sigmoid(h):
    return tl.sigmoid(h)


@triton.jit
def sigmoid_grad(h):
    s = tl.sigmoid(h)
    return s * (1.0 - s)


@triton.jit
def tanh(h):
    """Near 0 the polynomial of Cephes' tanhf (Moshier), where the formula by exp would cancel."""
    t = tl.abs(h)
    q = h * h
    p = 0.133314422036 + q * (-0.0537397155531 + q * (0.0206390887954 + q * -0.00570498872745))
    small = t + t * q * (-0.333332819422 + q * p)
    t = tl.where(t < 0.625, small, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * t)))
    return tl.where(h < 0, -t, t)


@triton.jit
def tanh_grad(h):
    t = tanh(h)
    return 1.0 - t * t


@triton.jit
def sin(h):
    return tl.sin(h)


@triton.jit
def sin_grad(h):
    return tl.cos(h)


@triton.jit
def softsign(h):
    return h / (1.0 + tl.abs(h))


@triton.jit
def softsign_grad(h):
    r = 1.0 / (1.0 + tl.abs(h))
    return r * r


ACTIVATIONS = {
    None: (identity, identity_grad),
    "relu": (relu, relu_grad),
    "leaky_relu": (leaky_relu, leaky_relu_grad),
    "relu2": (relu2, relu2_grad),
    "relu6": (relu6, relu6_grad),
    "elu": (elu, elu_grad),
    "selu": (selu, selu_grad),
    "gelu": (gelu, gelu_grad),
    "gelu_tanh": (gelu_tanh, gelu_tanh_grad),
    "silu": (silu, silu_grad),
    "mish": (mish, mish_grad),
    "softplus": (softplus, softplus_grad),
    "hardswish": (hardswish, hardswish_grad),
    "hardsigmoid": (hardsigmoid, hardsigmoid_grad),
    "sigmoid": (sigmoid, sigmoid_grad),
    "tanh": (tanh, tanh_grad),
    "sin": (sin, sin_grad),
    "softsign": (softsign, softsign_grad),
}
