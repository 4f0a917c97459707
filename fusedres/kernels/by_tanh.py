"""Activations for bf16 tensors by the tanh instruction: no division, no exp.

    sigmoid(h) = (1 + tanh(h / 2)) / 2

The instruction is right to a relative 2**-11 (PTX manual, tanh.approx.f32), a quarter of what
rounding to bf16 may take. In fp16 and fp32 that would show, and so it would in the derivatives of
silu and gelu_tanh, where 1 - tanh**2 is multiplied by powers of h: those are epilogue.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import epilogue


@triton.jit
def tanh(h):
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1
    )


if triton.knobs.runtime.interpret:  # it knows no instructions
    tanh = epilogue.tanh


@triton.jit
def tanh_grad(h):
    t = tanh(h)
    return 1.0 - t * t


@triton.jit
def silu(h):
    return h * (0.5 + 0.5 * tanh(0.5 * h))


@triton.jit
def gelu_tanh(h):
    """h * (1 + tanh(u)) / 2, u = sqrt(2 / pi) * (h + 0.044715 h**3)"""
    return h * (0.5 + 0.5 * tanh(0.7978845608028654 * h * (1.0 + 0.044715 * h * h)))


ACTIVATIONS = {
    "silu": (silu, epilogue.silu_grad),
    "gelu_tanh": (gelu_tanh, epilogue.gelu_tanh_grad),
    "tanh": (tanh, tanh_grad),
}
