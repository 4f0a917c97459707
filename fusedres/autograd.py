"""The autograd Function: what is saved, which gradients are needed. No maths."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checks import check_memory
from .operands import DIFFERENTIABLE, Operands
from .reference import composite
from .spec import Spec
from .tracing import is_batched


class FusedResidualFunction(torch.autograd.Function):
    """apply(*operands, recipe, backend): the fields of ``fusedres.operands.Operands``, in order, a
    recipe's text (``str(spec)``) and a key of ``fusedres.ops.FORWARD``.

    Returns y (M, N), of x's dtype, and stats: (2, C), float32 or for float64 float64, mean and
    biased variance where batch norm used this batch's; else None. No gradient goes through stats.

    Saved for backward: the operands, the statistics, and z (M, N) where a stage after ``linear``
    needs the value it acts on. Everything else is recomputed. Inputs are assumed checked, see
    checks.py; what an op still refuses is a RuntimeError.
    """

    @staticmethod
    def forward(  # one by one: to take them as *call costs 3 % of a call
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, gate: Any,
        residual: Any, running_mean: Any, running_var: Any, seed: Any, sample_rows: int,
        recipe: str, backend: str,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """y and stats, see the class."""
        y, z, stats = ops.FORWARD[backend](
            x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var,
            seed, sample_rows, recipe, True,
        )  # fmt: skip
        ctx.save_for_backward(
            z, stats, x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean,
            running_var, seed,
        )  # fmt: skip
        ctx.settings = sample_rows, recipe, backend
        if stats.dim() == 1:
            return y, None
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """From dy (M, N) the gradients of the differentiable operands, None where not needed."""
        z, stats, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(DIFFERENTIABLE)]
        rest = (None,) * 6
        if dy is None:
            return (None,) * len(DIFFERENTIABLE) + rest
        sample_rows, recipe, backend = ctx.settings
        operands = (*tensors, sample_rows)
        if torch.is_grad_enabled():  # create_graph=True: a gradient to be differentiated again
            return _composite_gradients(operands, needs, dy, recipe) + rest
        mask = sum(need << i for i, need in enumerate(needs))
        try:  # costs nothing, unlike a question
            grads = iter(ops.BACKWARD[backend](dy, z, stats, *operands, recipe, mask))
        except RuntimeError as error:
            check_memory(error)
            if not is_batched(dy):
                raise
            return _composite_gradients(operands, needs, dy, recipe) + rest
        return tuple(next(grads) if need else None for need in needs) + rest


# What Function.apply comes down to where no functorch transform is at work and dynamo does not
# trace. The caller knows both; to ask again, in Python, would take a sixth of a call.
apply_plainly = super(torch.autograd.Function, FusedResidualFunction).apply


def _composite_gradients(
    operands: tuple[Any, ...], needs: tuple[bool, ...], dy: Tensor, recipe: str
) -> tuple[Tensor | None, ...]:
    create_graph = torch.is_grad_enabled()
    no_autocast = nullcontext() if dy.is_meta else torch.autocast(dy.device.type, enabled=False)
    with torch.enable_grad(), no_autocast:
        # views: an operand may be computed from another (a linear shortcut from x), or be the same
        views: list[Any] = [t.view_as(t) if isinstance(t, Tensor) else t for t in operands]
        y = composite(Spec.parse(recipe), Operands(*views))
        wanted = [t for t, need in zip(views, needs, strict=False) if need]
        grads = iter(
            torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True)
        )
    return tuple(next(grads) if need else None for need in needs)
