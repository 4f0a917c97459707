"""The registered ops: one schema for every backend, its fakes, and a table from backend name to op.

`fusedres::residual_forward` and `fusedres::residual_backward` are implemented in C++
(csrc/ops.cpp), `fusedres::cuda_residual_forward` and `..._backward` too (csrc/cuda_ops.cpp),
`fusedres::triton_residual_forward` and `..._backward` in backends/triton.py.
FORWARD[backend] and BACKWARD[backend] are what the autograd Function calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .spec import Spec

FORWARD_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? seed, SymInt "
    "sample_rows, str recipe, "
    "bool save) -> (Tensor y, Tensor z, Tensor stats)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? gate, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? seed, Tensor z, Tensor "
    "stats, "
    "SymInt sample_rows, str recipe, int needs) -> Tensor[]"
)

FORWARD: dict[str, Callable[..., Any]] = {}
BACKWARD: dict[str, Callable[..., Any]] = {}

try:
    _C: Any = importlib.import_module("fusedres._C")  # loading it registers its ops
    native_missing: str | None = None
except ImportError as error:  # not built here: `python -m fusedres info` says so, `auto` falls back
    _C, native_missing = None, f"the C++ extension is not built ({error})"


def stats_shape(spec: Spec, M: int, N: int, K: int, save: bool, rows: bool) -> tuple[int, ...]:
    """Of the statistics a forward op returns: (2, C) for batch norm in training; (2 * M,) for
    norms over rows where the backend saves them (`rows`) and backward needs them; else (0,).
    """
    if spec.batch_stats:
        return 2, spec.width("norm", K, N)
    return (2 * M if rows and save and spec.norm in ("layer", "rms") else 0,)


def forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    sample_rows: int,
    recipe: str,
    save: bool,
    saves_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of (y, z, stats): what every backend must return.

    `saves_rows`: whether the backend saves the statistics of norms over rows.
    """
    spec = Spec.parse(recipe)
    M, N, K = x.shape[0], weight.shape[0], weight.shape[1]
    y = x.new_empty((M, N))
    z = x.new_empty((M, N) if save and spec.saves_z else (0,))
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty(stats_shape(spec, M, N, K, save, saves_rows), dtype=exact)
    return y, z, stats


def backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    z: Tensor,
    stats: Tensor,
    sample_rows: int,
    recipe: str,
    needs: int,
) -> list[Tensor]:
    """The gradients asked for, bit i of `needs` for input i, each contiguous in its tensor's shape
    and dtype.
    """
    inputs = (x, weight, bias, norm_weight, norm_bias, gate, residual)
    return [t.new_empty(t.shape) for i, t in enumerate(inputs) if needs >> i & 1 and t is not None]


def register(backend: str, prefix: str, saves_rows: bool) -> None:
    """Makes ops with these fakes the ones that `backend` runs."""
    for name, fake, table in (
        ("forward", partial(forward_fake, saves_rows=saves_rows), FORWARD),
        ("backward", backward_fake, BACKWARD),
    ):
        torch.library.register_fake(f"fusedres::{prefix}residual_{name}", fake)
        table[backend] = getattr(torch.ops.fusedres, f"{prefix}residual_{name}").default


def register_python(
    backend: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """Defines a backend's ops that are written in Python, e.g.
    ``fusedres::triton_residual_forward``.
    """
    prefix = f"{backend}_"
    for name, schema, function in (
        ("forward", FORWARD_SCHEMA, forward),
        ("backward", BACKWARD_SCHEMA, backward),
    ):
        qualified = f"fusedres::{prefix}residual_{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, ("CPU", "CUDA"), function)
    register(backend, prefix, True)


if native_missing is None:
    register("cpu", "", False)
    if hasattr(torch.ops.fusedres, "cuda_residual_forward"):
        register("cuda", "cuda_", True)
