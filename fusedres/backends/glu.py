"""Gated linear units on a GPU: one Triton launch forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.glu import glu_kernel
from . import plan as planner
from .launch import call_of, key_of
from .triton import activation_functions, alignment


def glu_forward(a: Tensor, b: Tensor, activation: str) -> Tensor:
    """h = act(a) * b (M, H) of a and b (M, H)."""
    h = a.new_empty(a.shape)
    _launch(activation, None, a, b, h, None)
    return h


def glu_backward(dh: Tensor, a: Tensor, b: Tensor, activation: str, db_first: bool) -> Tensor:
    """dz (M, 2 H) = [da, db], or [db, da]."""
    dz = a.new_empty((a.shape[0], 2 * a.shape[1]))
    first, second = dz.chunk(2, dim=1)
    da, db = (second, first) if db_first else (first, second)
    _launch(activation, dh, a, b, da, db)
    return dz


def _adjacent_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _constants(activation: str, h: Tensor, *matrices: Tensor | None) -> dict[str, Any]:
    act, act_grad = activation_functions(activation, h.dtype)
    height, width = planner.pass_tile(h.shape[1])
    return {
        "ACT": act, "ACT_GRAD": act_grad, "ALIGN": alignment(h.shape[1], h, *matrices),
        "BLOCK_M": height, "BLOCK_N": width, "num_warps": 8,
    }  # fmt: skip


def _launch(
    activation: str, dh: Tensor | None, a: Tensor, b: Tensor, h: Tensor, db: Tensor | None
) -> None:
    if not h.numel():
        return
    a, b = map(_adjacent_columns, (a, b))
    dh = None if dh is None else _adjacent_columns(dh)
    ready = call_of(("glu", activation, *key_of((dh, a, b, h, db))))
    constants = ready.once("constants", _constants, activation, h, dh, a, b)
    (M, H), strides = h.shape, [0 if t is None else t.stride(0) for t in (dh, a, b, h)]
    across = planner.ceil_div(H, constants["BLOCK_N"])
    programs = across * planner.ceil_div(M, constants["BLOCK_M"])
    with torch.cuda.device_of(h):
        ready.launch(glu_kernel, programs, (dh, a, b, h, db, M, H, *strides), constants)
