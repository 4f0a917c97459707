"""A chain: layers one after the other in one op, and its autograd Function.

x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import native
from .checks import check_memory
from .operands import Operands
from .reference import composite
from .spec import Spec

_KINDS = 4  # of operands that a link may have beside weight


class Link(NamedTuple):
    """A layer of a chain, whose `add` takes its own input."""

    line: str  # which of `_KINDS` it has, as a number of four bits, and its recipe: csrc/chain.cpp
    operands: tuple[Tensor, ...]  # weight (N, K), then bias, norm_weight, norm_bias, gate

    @classmethod
    def of(cls, recipe: str, weight: Tensor, *more: Tensor | None) -> Link:
        there = sum(1 << i for i, t in enumerate(more) if t is not None)
        return cls(f"{there} {recipe}", (weight, *(t for t in more if t is not None)))


def _split(text: str, operands: tuple[Tensor, ...]) -> list[tuple[Spec, list[Tensor | None]]]:
    """For each line what it says, and of the operands weight and the others, None where absent."""
    rest, links = iter(operands), []
    for line in text.split("\n"):
        there, recipe = line.split(" ", 1)
        own: list[Tensor | None] = [next(rest)]
        own += [next(rest) if int(there) >> i & 1 else None for i in range(_KINDS)]
        links.append((Spec.parse(recipe), own))
    return links


def run(x: Tensor, links: list[Link]) -> Tensor:
    """y (M, N) of the last link from x (M, K) of the first; all of one dtype, on a CPU.

    Operands are assumed checked; what the op still refuses is a RuntimeError.
    """
    text = "\n".join([link.line for link in links])
    operands = [t for link in links for t in link.operands]
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands)):
        return _apply(text, x, *operands)
    y: Tensor = torch.ops.fusedres.chain_forward.default(x, operands, text, False)[0]
    return y


class FusedChainFunction(torch.autograd.Function):
    """apply(text, x, *operands), `text` being the links' lines. Saved for backward: operands, each
    link's input and, where a stage after ``linear`` looks at it, its product z.
    """

    @staticmethod
    def forward(ctx: Any, text: str, x: Tensor, *operands: Tensor) -> Tensor:
        """y (M, N)."""
        y, *saved = torch.ops.fusedres.chain_forward.default(x, operands, text, True)
        ctx.text = text
        ctx.save_for_backward(*saved, x, *operands)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """From dy (M, N) the gradients of x and the operands, None where not needed."""
        inputs, z, x, *operands = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True: gradients to be differentiated again
            return None, *_composite_gradients(ctx.text, (x, *operands), needs, dy)
        wanted = "".join("01"[need] for need in needs)
        try:
            found = torch.ops.fusedres.chain_backward.default(
                dy, [inputs, z], x, operands, ctx.text, wanted
            )
        except RuntimeError as error:
            check_memory(error)
            return None, *_composite_gradients(ctx.text, (x, *operands), needs, dy)
        given = iter(found)
        return None, *(next(given) if need else None for need in needs)


_apply = super(torch.autograd.Function, FusedChainFunction).apply  # see autograd.apply_plainly


def _composite_gradients(
    text: str, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by plain torch ops, which can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        y, *operands = views = [t.view_as(t) for t in tensors]
        for spec, own in _split(text, tuple(operands)):
            y = composite(spec, Operands(y, *own))  # type: ignore[arg-type]
        wanted = [t for t, need in zip(views, needs, strict=True) if need]
        given = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return tuple(next(given) if need else None for need in needs)


def _forward_fake(x: Tensor, operands: list[Tensor], links: str, save: bool) -> list[Tensor]:
    M, of_inputs, of_z, N = x.shape[0], 0, 0, 0
    for spec, (weight, *_) in _split(links, tuple(operands)):
        of_inputs += N
        N = weight.shape[0]  # type: ignore[union-attr]
        of_z += N * spec.saves_z
    y = x.new_empty((M, N))
    return [y, x.new_empty(M * of_inputs), x.new_empty(M * of_z)] if save else [y]


def _backward_fake(
    dy: Tensor, saved: list[Tensor], x: Tensor, operands: list[Tensor], links: str, wanted: str
) -> list[Tensor]:
    found = zip((x, *operands), wanted, strict=True)
    return [t.new_empty(t.shape) for t, need in found if need == "1"]


if native.missing is None:
    torch.library.register_fake("fusedres::chain_forward", _forward_fake)
    torch.library.register_fake("fusedres::chain_backward", _backward_fake)
