"""The registered ops: one schema for every backend, its fakes, and a table from backend name to op.

`fusedres::residual_forward` and `fusedres::residual_backward` are implemented in C++
(csrc/ops.cpp), `fusedres::cuda_residual_forward` and `..._backward` too (csrc/cuda_ops.cpp),
`fusedres::triton_residual_forward` and `..._backward` in backends/triton.py, those of "vendor" in
backends/vendor.py. FORWARD[backend] and BACKWARD[backend] are what the autograd Function calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .backends import native
from .checks import check_devices
from .operands import DIFFERENTIABLE, Operands
from .spec import Spec

OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? seed, SymInt sample_rows"
)
FORWARD_SCHEMA = f"({OPERANDS}, str recipe, bool save) -> Tensor[]"
BACKWARD_SCHEMA = f"(Tensor dy, Tensor[] saved, {OPERANDS}, str recipe, int needs) -> Tensor[]"

FORWARD: dict[str, Callable[..., Any]] = {}
BACKWARD: dict[str, Callable[..., Any]] = {}


def forward_fake(*call: Any, saves_rows: bool = False) -> list[Tensor]:
    """Shapes, dtypes and strides of y and what is saved: what every backend must return.

    `saves_rows`: whether the backend saves the statistics of norms over rows.
    """
    *operands, recipe, save = call
    o = Operands(*operands)
    check_devices(o)  # one meta tensor is enough for this to run instead of the op
    return o.empty_outputs(Spec.parse(recipe), save, saves_rows).list()


def backward_fake(dy: Tensor, saved: list[Tensor], *call: Any) -> list[Tensor]:
    """The gradients that `needs` asks for by bit i for operand i, contiguous, shaped like it."""
    *operands, _recipe, needs = call
    check_devices(Operands(*operands), dy, *saved)
    inputs = operands[: len(DIFFERENTIABLE)]
    return [t.new_empty(t.shape) for i, t in enumerate(inputs) if needs >> i & 1 and t is not None]


def _register(backend: str, prefix: str, saves_rows: bool) -> None:
    """Makes ops with these fakes the ones that `backend` runs."""
    for name, fake, table in (
        ("forward", partial(forward_fake, saves_rows=saves_rows), FORWARD),
        ("backward", backward_fake, BACKWARD),
    ):
        torch.library.register_fake(f"fusedres::{prefix}residual_{name}", fake)
        table[backend] = getattr(torch.ops.fusedres, f"{prefix}residual_{name}").default


def _register_python(backend: str) -> None:
    """Defines the ops of a backend that is written in Python, which is imported by the first call.
    So an exported program that holds such an op loads wherever fusedres is imported.
    """
    for name, schema in (("forward", FORWARD_SCHEMA), ("backward", BACKWARD_SCHEMA)):
        op = f"fusedres::{backend}_residual_{name}"
        torch.library.define(op, schema)
        torch.library.impl(op, ("CPU", "CUDA"), late(backend, f"residual_{name}"))
    _register(backend, f"{backend}_", True)


def late(backend: str, name: str) -> Callable[..., Any]:
    @cache
    def function() -> Any:
        return getattr(importlib.import_module(f".backends.{backend}", __package__), name)

    return lambda *call: function()(*call)


if native.missing is None:
    _register("cpu", "", False)
if native.has_cuda:
    _register("cuda", "cuda_", True)
_register_python("triton")
_register_python("vendor")
if native.has_cuda:  # C++ forward, Triton's backward: both save the same tensors
    FORWARD["cuda+triton"], BACKWARD["cuda+triton"] = FORWARD["cuda"], BACKWARD["triton"]
