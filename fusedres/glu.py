"""Gated linear units: h = act(a) * b, where a and b are the halves of z = [a, b].

Forward and backward are one pass each on a CPU (csrc/glu.cpp); elsewhere plain torch ops, which
torch.compile fuses by itself.

Source: Shazeer, "GLU variants improve transformer", arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from . import graphs
from .backends import native
from .checks import DTYPES, check_memory
from .functional import PLAIN, composite_only
from .reference import ACTIVATION_FUNCTIONS
from .spec import ACTIVATIONS
from .tracing import is_batched

_modes = torch._C._len_torch_dispatch_stack


def composite_glu(z: Tensor, activation: str) -> Tensor:
    """act(a) * b (..., H) of z (..., 2 H), in plain torch."""
    a, b = z.chunk(2, dim=-1)
    return ACTIVATION_FUNCTIONS[activation](a) * b


class GLUFunction(torch.autograd.Function):
    """apply(z (M, 2 H), activation): h (M, H). Saved: z alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: str) -> Tensor:
        """h, by one pass."""
        ctx.activation = activation
        ctx.save_for_backward(z)
        return torch.ops.fusedres.glu_forward.default(z, activation)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        """dz = [dh * b * act'(a), dh * act(a)]."""
        (z,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not create_graph and not is_batched(dh):
            return torch.ops.fusedres.glu_backward.default(dh, z, ctx.activation), None
        with torch.enable_grad():
            view = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
            h = composite_glu(view, ctx.activation)
            return torch.autograd.grad(h, view, dh, create_graph=create_graph)[0], None


def why_not_one_pass(activation: str, backend: str, device: torch.device) -> str | None:
    """Why the unit is plain torch ops there; None if it is one pass."""
    if backend not in ("auto", "cpu"):
        return f"backend {backend!r} has no kernel for it"
    if device.type != "cpu":
        return f"there is no kernel for it on {device.type}"
    if activation not in ACTIVATIONS:
        return f"{activation!r} is a registered activation"
    return native.missing


def glu(z: Tensor, activation: str, backend: str) -> Tensor:
    """act(a) * b (..., H) of z (..., 2 H), a being the first half of its features."""
    traced = is_dynamo_compiling() or is_exporting() or _modes() or type(z) not in PLAIN
    if traced or graphs.wants_plain_ops(False) or composite_only(z, z) or z.dtype not in DTYPES:
        return composite_glu(z, activation)
    if why_not_one_pass(activation, backend, z.device) is not None:
        return composite_glu(z, activation)
    rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    try:
        if torch.is_grad_enabled() and z.requires_grad:
            h = GLUFunction.apply(rows, activation)
        else:
            h = torch.ops.fusedres.glu_forward.default(rows, activation)
    except RuntimeError as error:
        check_memory(error)
        raise
    return h.view(*z.shape[:-1], z.shape[-1] // 2)


if native.missing is None:
    torch.library.register_fake(
        "fusedres::glu_forward", lambda z, _: z.new_empty((z.shape[0], z.shape[1] // 2))
    )
    torch.library.register_fake("fusedres::glu_backward", lambda _dh, z, _: z.new_empty(z.shape))
