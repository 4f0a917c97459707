"""Gated linear units: h = act(a) * b, where a and b are the halves of z = [a, b], or two tensors.

Forward and backward are one pass each: on a CPU csrc/glu.cpp, on a GPU backends/glu.py. In graphs
of torch.compile they are plain torch ops, which it fuses by itself.

Source: Shazeer, "GLU variants improve transformer", arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends, graphs
from .backends import native
from .checks import DTYPES, check_memory
from .functional import PLAIN, composite_only
from .ops import late
from .reference import ACTIVATION_FUNCTIONS
from .spec import make_spec
from .tracing import is_batched

_modes = torch._C._len_torch_dispatch_stack


def _halves(given: Sequence[Tensor], second: bool) -> tuple[Tensor, Tensor]:
    """a and b of what a call is given: z, whose second half a is if `second`, or both."""
    a, b = given if len(given) == 2 else given[0].chunk(2, dim=-1)
    return (b, a) if second else (a, b)


def composite_glu(activation: str, second: bool, *given: Tensor) -> Tensor:
    """act(a) * b (..., H) of z (..., 2 H), or of a and b, in plain torch."""
    a, b = _halves(given, second)
    return ACTIVATION_FUNCTIONS[activation](a) * b


class GLUFunction(torch.autograd.Function):
    """apply(activation, second, z (M, 2 H)) or (activation, False, a (M, H), b (M, H)): h (M, H).
    Saved: what it is given, alone.
    """

    @staticmethod
    def forward(ctx: Any, activation: str, second: bool, *given: Tensor) -> Tensor:
        """h, by one pass."""
        ctx.call = activation, second
        ctx.save_for_backward(*given)
        return _forward(activation, second, *given)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        """dz = [dh * b * act'(a), dh * act(a)]: of z in its order, of a and b cut in two."""
        given, (activation, second) = ctx.saved_tensors, ctx.call
        create_graph = torch.is_grad_enabled()
        if not create_graph and not is_batched(dh):
            a, b = _halves(given, second)
            backward = _op("glu_backward", dh)
            dz = backward(dh, a, b, activation, second)
            return None, None, *((dz,) if len(given) == 1 else dz.chunk(2, dim=-1))
        with torch.enable_grad():
            views = [t.view_as(t) if t.requires_grad else t.detach() for t in given]
            learn = [t for t in views if t.requires_grad]
            h = composite_glu(activation, second, *views)
            found = iter(torch.autograd.grad(h, learn, dh, create_graph=create_graph))
            return None, None, *(next(found) if t.requires_grad else None for t in views)


def _op(name: str, like: Tensor) -> Any:
    """The op where `like` is."""
    found = getattr(torch.ops.fusedres, name if like.device.type == "cpu" else f"triton_{name}")
    return found.default


def _forward(activation: str, second: bool, *given: Tensor) -> Tensor:
    h: Tensor = _op("glu_forward", given[0])(*_halves(given, second), activation)
    return h


@lru_cache(maxsize=1024)
def why_not_one_pass(
    activation: str, backend: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the unit is plain torch ops there; None if it is one pass."""
    own = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if own is None:
        return f"there is no kernel for it on {device.type}"
    if backend not in ("auto", own):
        return f"backend {backend!r} has no kernel for it"
    return backends.why_not(own, make_spec("linear-act", None, activation), dtype, device, 1, 1)


def glu(z: Tensor, activation: str, backend: str = "auto", second: bool = False) -> Tensor:
    """act(a) * b (..., H) of z (..., 2 H), a being the first half of its features, or the second.

    Raises nothing of its own: what the op does not know runs in torch ops.
    """
    return _unit(activation, backend, second, z)


def gated(a: Tensor, b: Tensor, activation: str, backend: str = "auto") -> Tensor:
    """act(a) * b (..., H) of two tensors (..., H)."""
    return _unit(activation, backend, False, a, b)


def _unit(activation: str, backend: str, second: bool, *given: Tensor) -> Tensor:
    z = given[0]
    traced = is_dynamo_compiling() or is_exporting() or _modes()
    traced = traced or graphs.wants_plain_ops(False)
    if traced or not all(_fits(t, z) for t in given) or z.shape[-1] % (3 - len(given)):
        return composite_glu(activation, second, *given)
    if why_not_one_pass(activation, backend, z.device, z.dtype) is not None:
        return composite_glu(activation, second, *given)
    M = math.prod(z.shape[:-1])
    rows = [t.reshape(M, z.shape[-1]) for t in given]
    try:
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            h = GLUFunction.apply(activation, second, *rows)
        else:
            h = _forward(activation, second, *rows)
    except RuntimeError as error:
        check_memory(error)
        raise
    return h.view(*z.shape[:-1], h.shape[-1])


def _fits(t: Tensor, z: Tensor) -> bool:
    """Whether the op takes it beside z."""
    if type(t) not in PLAIN or composite_only(t, t) or t.dtype not in DTYPES:
        return False
    return t.dtype is z.dtype and t.shape == z.shape and t.device == z.device


def _fake_backward(_dh: Tensor, a: Tensor, _b: Tensor, _activation: str, _first: bool) -> Tensor:
    return a.new_empty((a.shape[0], 2 * a.shape[1]))


def _fake_forward(a: Tensor, _b: Tensor, _activation: str) -> Tensor:
    return a.new_empty(a.shape)


_OPS: tuple[tuple[str, str, Any], ...] = (
    ("glu_forward", "(Tensor a, Tensor b, str activation) -> Tensor", _fake_forward),
    (
        "glu_backward",
        "(Tensor dh, Tensor a, Tensor b, str activation, bool db_first) -> Tensor",
        _fake_backward,
    ),
)
for _name, _schema, _fake in _OPS:
    torch.library.define(f"fusedres::triton_{_name}", _schema)
    torch.library.impl(f"fusedres::triton_{_name}", ("CPU", "CUDA"), late("glu", _name))
    torch.library.register_fake(f"fusedres::triton_{_name}", _fake)
    if native.missing is None:
        torch.library.register_fake(f"fusedres::{_name}", _fake)
