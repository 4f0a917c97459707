"""The autograd Function: what is saved, which gradients are needed. No maths."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import ops
from .checks import check_memory
from .donation import donated
from .operands import DIFFERENTIABLE, Operands
from .reference import composite
from .spec import Spec
from .tracing import constant_when_compiled, is_batched

TENSORS = 10  # of the operands
_NONE = (None,) * len(DIFFERENTIABLE)
_REST = (None,) * (len(Operands._fields) + 2 - len(DIFFERENTIABLE))  # recipe and backend, too


@constant_when_compiled
@lru_cache(maxsize=4096)
def _facts(recipe: str) -> tuple[bool, bool, bool, bool, bool]:
    spec = Spec.parse(recipe)
    reads_x = bool(spec.prologue)
    return reads_x, spec.saves_residual, spec.saves_z, spec.batch_stats, spec.casts


def _stand_in(t: Tensor) -> Tensor:
    """Of t's shape, dtype and device, without memory or launch: for what backward does not read."""
    return t.new_empty(()).expand(t.shape)


def _kept(
    x: Tensor, learns: bool, residual: Tensor | None, saved: list[Tensor], recipe: str
) -> tuple[tuple[Tensor, Tensor | None], list[Tensor], Tensor | None, Tensor | None]:
    """x and residual or what stands in for them, `saved` in the same way, the batch statistics, and
    what stands for x in a gradient of a gradient. `learns`: weight, whose gradient looks at x.
    """
    reads_x, reads_residual, saves_z, batch_stats, casts = _facts(recipe)
    stats, stands_for_x = saved[saves_z] if batch_stats else None, None
    reads_x |= reads_residual and residual is None
    if not reads_x and (casts or not learns):
        stands_for_x = saved[-1] if learns else saved[0] if saves_z else None
        x = _stand_in(x)
    if casts and not learns:
        saved = [*saved[:-1], _stand_in(saved[-1])]
    if residual is not None and not reads_residual:
        residual = _stand_in(residual)
    return (x, residual), saved, stats, stands_for_x


class FusedResidualFunction(torch.autograd.Function):
    """apply(*operands, recipe, backend): the fields of ``fusedres.operands.Operands``, in order, a
    recipe's text (``str(spec)``) and a key of ``fusedres.ops.FORWARD``.

    Returns y (M, N), where need be in a tuple with stats, which carry no gradient: (2, C), mean and
    biased variance, where batch norm used this batch's statistics, else None; and with what stands
    for x below, else None.

    Saved for backward: what the op returns beside y (``fusedres.operands.Outputs``) and the
    operands that the gradients asked for look at. x is not kept where weight is frozen and nothing
    acts before ``linear``, or where it is only cast: then z or the cast, an output of this node,
    leads the gradient of a gradient back to x. Everything else is recomputed. Operands are assumed
    checked, see checks.py; what an op still refuses is a RuntimeError.
    """

    @staticmethod
    def forward(  # one by one: to take them as *call costs 3 % of a call
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, gate: Any,
        residual: Any, running_mean: Any, running_var: Any, seed: Any, sample_rows: int,
        recipe: str, backend: str,
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """y, or y, stats and what stands for x, see the class."""
        y, *saved = ops.FORWARD[backend](
            x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var,
            seed, sample_rows, recipe, True,
        )  # fmt: skip
        usual = residual is None and weight.requires_grad and x.dtype is weight.dtype
        if usual and "batch_stats" not in recipe:
            ctx.settings = sample_rows, recipe, backend, False
            ctx.save_for_backward(
                x, weight, bias, norm_weight, norm_bias, gate, None, running_mean, running_var,
                seed, *saved,
            )  # fmt: skip
            return y
        kept = _kept(x, weight.requires_grad, residual, saved, recipe)
        (x, residual), saved, stats, stands_for_x = kept
        ctx.settings = sample_rows, recipe, backend, stands_for_x is not None
        ctx.save_for_backward(
            x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var,
            seed, *saved,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return y, stats, stands_for_x

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: Any = None, d_stands: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """From dy (M, N) the gradients of the differentiable operands, None where not needed."""
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:7]
        sample_rows, recipe, backend, stands = ctx.settings
        tensors, saved = saved[:TENSORS], saved[TENSORS:]
        plain = torch.is_grad_enabled()  # create_graph=True: gradients to be differentiated again
        grads: tuple[Any, ...] = _NONE
        if dy is not None and not plain:
            mask = sum(need << i for i, need in enumerate(needs))
            if backend == "cpu" and saved and not stands and not is_dynamo_compiling():
                mask |= donated(ctx, saved, 1, 1) << len(needs)
            try:  # costs nothing, unlike a question
                given = iter(ops.BACKWARD[backend](dy, saved, *tensors, sample_rows, recipe, mask))
                grads = tuple(next(given) if need else None for need in needs)
            except RuntimeError as error:
                check_memory(error)
                if not is_batched(dy):
                    raise
                plain = True
        o = (*tensors, sample_rows)
        if dy is not None and plain:
            grads, more = _composite_gradients(o, saved, stands, needs, dy, recipe, backend)
            if more is not None:
                d_stands = more if d_stands is None else d_stands + more
        if d_stands is not None:
            grads = _through(o, recipe, backend, needs, d_stands, grads)
        return grads + _REST


# What Function.apply comes down to where no functorch transform is at work and dynamo does not
# trace. The caller knows both; to ask again, in Python, would take a sixth of a call.
apply_plainly = super(torch.autograd.Function, FusedResidualFunction).apply


def _bias_after_product(o: Operands, backend: str) -> bool:
    """Whether z, as a backend saves it, does not have the bias yet: csrc/tensors.h."""
    return o.bias is not None and backend == "cpu" and o.weight.dtype == torch.float32


def _through(
    operands: tuple[Any, ...],
    recipe: str,
    backend: str,
    needs: tuple[bool, ...],
    d: Tensor,
    grads: tuple[Any, ...],
) -> tuple[Any, ...]:
    """`grads` with what the gradient `d` of what stands for x adds to them."""
    o = Operands._make(operands)
    dx, dbias = d, None
    if not o.weight.requires_grad:  # it is z
        dx = d @ o.weight
        dbias = None if _bias_after_product(o, backend) else d.sum(0)
    found = list(grads)
    for i, more in ((0, dx.to(o.x.dtype)), (2, dbias)):
        if needs[i] and more is not None:
            found[i] = more if found[i] is None else found[i] + more
    return tuple(found)


def _composite_gradients(
    operands: tuple[Any, ...],
    saved: tuple[Tensor, ...],
    stands: bool,
    needs: tuple[bool, ...],
    dy: Tensor,
    recipe: str,
    backend: str,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The gradients by plain torch ops, and that of what stands for x, if something does."""
    create_graph = torch.is_grad_enabled()
    no_autocast = nullcontext() if dy.is_meta else torch.autocast(dy.device.type, enabled=False)
    with torch.enable_grad(), no_autocast:
        # views: an operand may be computed from another (a linear shortcut from x), or be the same
        views = [t.view_as(t) if isinstance(t, Tensor) else t for t in operands]
        for t, need in zip(views, needs, strict=False):
            if need and not t.requires_grad:  # a stand-in
                t.requires_grad_()
        o = Operands._make(views)
        product: Any = None
        inside: list[Any] = []
        if stands and not operands[1].requires_grad:
            z = saved[0].view_as(saved[0])
            bias = o.bias if _bias_after_product(o, backend) else None
            product, inside = (lambda _: z if bias is None else z + bias), [z]
        elif stands:
            cast = saved[-1].view_as(saved[-1])
            product, inside = (lambda _: F.linear(cast, o.weight, o.bias)), [cast]
        y = composite(Spec.parse(recipe), o, product=product)
        wanted: list[Any] = [t for t, need in zip(o, needs, strict=False) if need]
        grads = torch.autograd.grad(
            y, wanted + inside, dy, create_graph=create_graph, allow_unused=True
        )
    given = iter(grads)
    return tuple(next(given) if need else None for need in needs), next(given, None)
