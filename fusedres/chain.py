"""A chain: layers one after the other in one op, and its autograd Function.

x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L

A stack's operands come stacked, one tensor of each kind. An `add` takes its own layer's input, or
an earlier one's: in a block of several layers the last adds the block's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from .backends import native
from .checks import check_memory
from .operands import Operands
from .reference import composite
from .spec import Spec

_KINDS = 4  # of operands that a link may have beside weight


class Link(NamedTuple):
    """A layer of a chain."""

    line: str  # which of `_KINDS` it has, whose input it adds, its recipe: csrc/chain/links.h
    operands: tuple[Tensor, ...]  # weight (N, K), then bias, norm_weight, norm_bias, gate

    @classmethod
    def of(cls, recipe: str, weight: Tensor, *more: Tensor | None, back: int = 0) -> Link:
        """`back`: how many links earlier the one is whose input `add` takes; 0: this one."""
        there = sum(1 << i for i, t in enumerate(more) if t is not None)
        operands = (weight, *(t for t in more if t is not None))
        return cls(line_of(there, back, recipe), operands)


def line_of(there: int, back: int, recipe: str) -> str:
    return f"{there}<{back} {recipe}" if back else f"{there} {recipe}"


PIECE = 1024  # columns of what a call keeps, at most in a piece of memory: csrc/chain/values.h


def _split(text: str, depth: int, operands: tuple[Tensor, ...]) -> Iterator[tuple[Spec, int, Any]]:
    """For each link its recipe, how many links back its `add` looks, and of the operands its own,
    None where absent.

    `depth` not 0: operands are stacked, (depth, ...) each but the gate, which has an entry for each
    block of as many links as `text` has lines; they are those of the last line.
    """
    lines = []
    for line in text.split("\n"):
        head, recipe = line.split(" ", 1)
        there, _, back = head.partition("<")
        lines.append((int(there), int(back or 0), recipe))
    rest, block, all_there = iter(operands), len(lines), lines[-1][0]
    stacks: list[Any] = []
    if depth:
        stacks = [next(rest).unbind()]
        stacks += [next(rest).unbind() if all_there >> i & 1 else None for i in range(_KINDS)]
    for link in range(depth or block):
        own_there, own_back, own_recipe = lines[link % block]
        has = [True, *(bool(own_there >> i & 1) for i in range(_KINDS))]
        own: list[Any] = []
        for i, here in enumerate(has):
            if here and depth:
                own.append(stacks[i][link // block if i == _KINDS else link])
            else:
                own.append(next(rest) if here else None)
        yield Spec.parse(own_recipe), own_back, own


def run(x: Tensor, links: list[Link]) -> Tensor:
    """y (M, N) of the last link from x (M, K) of the first; all of one dtype, on a CPU.

    Operands are assumed checked; what the op still refuses is a RuntimeError.
    """
    text = "\n".join([link.line for link in links])
    return run_stacked(x, text, 0, False, [t for link in links for t in link.operands])


def run_stacked(
    x: Tensor, text: str, depth: int, recompute: bool, operands: list[Tensor]
) -> Tensor:
    """The same from the links' lines and, if `depth` is not 0, stacked operands: see `_split`.
    `recompute`: z is not kept for backward but computed again.
    """
    if is_dynamo_compiling() or is_exporting():
        return residual_chain(x, operands, text, depth, recompute)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands)):
        return _apply(text, depth, recompute, x, *operands)
    y: Tensor = torch.ops.fusedres.chain_forward.default(x, operands, text, depth, 0)[0]
    return y


class FusedChainFunction(torch.autograd.Function):
    """apply(text, depth, recompute, x, *operands), `text` being the links' lines. Saved for
    backward: operands, each link's input and, where a stage after ``linear`` looks at it, its
    product z; with `recompute` not z.
    """

    @staticmethod
    def forward(
        ctx: Any, text: str, depth: int, recompute: bool, x: Tensor, *operands: Tensor
    ) -> Tensor:
        """y (M, N)."""
        keep = 2 if recompute else 1
        y, *saved = torch.ops.fusedres.chain_forward.default(x, operands, text, depth, keep)
        ctx.text, ctx.depth, ctx.kept = text, depth, len(saved)
        ctx.save_for_backward(*saved, x, *operands)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """From dy (M, N) the gradients of x and the operands, None where not needed."""
        there, kept = ctx.saved_tensors, ctx.kept
        saved, (x, *operands) = there[:kept], there[kept:]
        needs = ctx.needs_input_grad[_BEFORE:]
        nothing = (None,) * _BEFORE
        tensors = (x, *operands)
        if torch.is_grad_enabled():  # create_graph=True: gradients to be differentiated again
            return *nothing, *_composite_gradients(ctx.text, ctx.depth, tensors, needs, dy)
        wanted = "".join("01"[need] for need in needs)
        try:
            found = torch.ops.fusedres.chain_backward.default(
                dy, saved, x, operands, ctx.text, ctx.depth, wanted
            )
        except RuntimeError as error:
            check_memory(error)
            return *nothing, *_composite_gradients(ctx.text, ctx.depth, tensors, needs, dy)
        given = iter(found)
        return *nothing, *(next(given) if need else None for need in needs)


_BEFORE = 3  # arguments of FusedChainFunction before x
_apply = super(torch.autograd.Function, FusedChainFunction).apply  # see autograd.apply_plainly


def composite_chain(text: str, depth: int, x: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    """y by plain torch ops."""
    values = [x]
    for spec, back, own in _split(text, depth, operands):
        o = Operands(*(values[-1], *own, values[-1 - back] if back else None))
        values.append(composite(spec, o))
    return values[-1]


def _composite_gradients(
    text: str, depth: int, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by plain torch ops, which can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x, *operands = views = [t.view_as(t) for t in tensors]
        y = composite_chain(text, depth, x, tuple(operands))
        wanted = [t for t, need in zip(views, needs, strict=True) if need]
        given = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return tuple(next(given) if need else None for need in needs)


def _pieces(columns: list[int]) -> list[int]:
    """How many columns each piece of memory has in which matrices of so many lie."""
    sizes: list[int] = []
    for width in columns:
        if width and (not sizes or sizes[-1] + width > PIECE):
            sizes.append(0)
        if width:
            sizes[-1] += width
    return sizes


def _in_graph(x: Tensor, operands: list[Tensor], links: str, depth: int, recompute: bool) -> Tensor:
    y: Tensor = torch.ops.fusedres.chain_forward.default(x, operands, links, depth, 0)[0]
    return y


def _in_graph_recording(
    x: Tensor, operands: list[Tensor], links: str, depth: int, recompute: bool
) -> Tensor:
    y: Tensor = FusedChainFunction.apply(links, depth, recompute, x, *operands)
    return y


def _fake(x: Tensor, operands: list[Tensor], links: str, depth: int, recompute: bool) -> Tensor:
    return _forward_fake(x, operands, links, depth, 0)[0]


def _forward_fake(
    x: Tensor, operands: list[Tensor], links: str, depth: int, keep: int
) -> list[Tensor]:
    M, inputs, z, N = x.shape[0], [], [], 0
    for spec, _back, (weight, *_) in _split(links, depth, tuple(operands)):
        inputs.append(N)
        N = weight.shape[0]
        z.append(N * spec.saves_z)
    kept = (_pieces(inputs) if keep else []) + (_pieces(z) if keep == 1 else [])
    return [x.new_empty((M, N)), *(x.new_empty(M * columns) for columns in kept)]


def _backward_fake(
    dy: Tensor,
    saved: list[Tensor],
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    wanted: str,
) -> list[Tensor]:
    found = zip((x, *operands), wanted, strict=True)
    return [t.new_empty(t.shape) for t, need in found if need == "1"]


# The op of graphs, which has a gradient: as residual_layer in graphs.py.
torch.library.define(
    "fusedres::residual_chain",
    "(Tensor x, Tensor[] operands, str links, int depth, bool recompute) -> Tensor",
)
torch.library.impl("fusedres::residual_chain", "CompositeExplicitAutograd", _in_graph)
torch.library.impl("fusedres::residual_chain", "Autograd", _in_graph_recording)
torch.library.register_fake("fusedres::residual_chain", _fake)
residual_chain = torch.ops.fusedres.residual_chain.default

if native.missing is None:
    torch.library.register_fake("fusedres::chain_forward", _forward_fake)
    torch.library.register_fake("fusedres::chain_backward", _backward_fake)
