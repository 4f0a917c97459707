"""The autograd Function: what is saved, which gradients are needed. No maths."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checks import check_memory
from .reference import composite
from .spec import Spec
from .tracing import is_batched

DIFFERENTIABLE = 7  # x, weight, bias, norm_weight, norm_bias, gate, residual


class FusedResidualFunction(torch.autograd.Function):
    """apply(x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var,
    seed, sample_rows, recipe, backend)

    x (M, K), weight (N, K), bias (N,), norm parameters and running statistics (C,), gate (1,) or
    (C,), residual (M, R) or None for x, seed (1,) int64; `recipe` is ``str(spec)``. Returns y
    (M, N) and stats, which carry no gradient: (2, C), mean and biased variance, where batch norm
    used this batch's statistics; else None.

    Saved for backward: the inputs, the backend's z (M, N) where a non-linear stage follows
    ``linear``, the batch statistics. Everything else is recomputed. Inputs are assumed checked
    (see checks.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        y, z, stats = ops.FORWARD[backend](
            x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var,
            seed, sample_rows,
            recipe, True,
        )  # fmt: skip
        ctx.save_for_backward(
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            gate,
            residual,
            running_mean,
            running_var,
            seed,
            z,
            stats,
        )
        ctx.settings = sample_rows, recipe, backend
        if stats.dim() == 1:
            return y, None
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:DIFFERENTIABLE]
        rest = (None,) * 6
        if dy is None:
            return (None,) * DIFFERENTIABLE + rest
        sample_rows, recipe, backend = ctx.settings
        if torch.is_grad_enabled():  # create_graph=True: a gradient to be differentiated again
            return _composite_gradients(saved, needs, dy, recipe, sample_rows) + rest
        *inputs, z, stats = saved
        mask = sum(need << i for i, need in enumerate(needs))
        try:  # costs nothing, unlike a question
            grads = iter(ops.BACKWARD[backend](dy, *inputs, z, stats, sample_rows, recipe, mask))
        except RuntimeError as error:
            check_memory(error)
            if not is_batched(dy):
                raise
            return _composite_gradients(saved, needs, dy, recipe, sample_rows) + rest
        return tuple(next(grads) if need else None for need in needs) + rest


# What Function.apply comes down to where no functorch transform is at work and dynamo does not
# trace. The caller knows both; to ask again, in Python, would take a sixth of a call.
apply_plainly = super(torch.autograd.Function, FusedResidualFunction).apply


def _composite_gradients(
    saved: tuple[Any, ...], needs: tuple[bool, ...], dy: Tensor, recipe: str, sample_rows: int
) -> tuple[Tensor | None, ...]:
    *inputs, running_mean, running_var, seed, _z, _stats = saved
    create_graph = torch.is_grad_enabled()
    no_autocast = nullcontext() if dy.is_meta else torch.autocast(dy.device.type, enabled=False)
    with torch.enable_grad(), no_autocast:
        # views: one input may be computed from another (a linear shortcut from x), or be the same
        # tensor
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        statistics = running_mean, running_var
        y = composite(Spec.parse(recipe), *inputs, *statistics, seed, sample_rows)  # type: ignore[call-arg]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(
            torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True)
        )
    return tuple(next(grads) if need else None for need in needs)
