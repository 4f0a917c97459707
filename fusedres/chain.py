"""A chain: layers one after the other in one op, and its autograd Function.

x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L

A stack's operands come stacked, one tensor of each kind. An `add` takes its own layer's input, or
an earlier one's: in a block of several layers the last adds the block's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends, wiring
from .chain_ops import forward_fake
from .checks import check_memory
from .donation import donated
from .operands import Operands
from .reference import composite, draw_seeds
from .spec import Spec


class Running(NamedTuple):
    """What batch norm in training does to a layer's running statistics."""

    mean: Tensor | None  # (C,)
    var: Tensor | None
    momentum: float | None
    tracked: Tensor | None  # how many batches there were


class Link(NamedTuple):
    """A layer of a chain."""

    line: str  # what it has and adds, and its recipe: wiring.py
    operands: tuple[Tensor, ...]  # weight (N, K), then those that it has of Operands'
    random: bool = False  # it drops, and needs a seed
    autocast: torch.dtype | None = None  # what weight and bias are cast to for the call
    statistics: int = 0  # C, if its norm goes by this batch's statistics
    running: Running | None = None  # which these update
    backend: str = "auto"  # the one that its layer asked for

    @classmethod
    def of(
        cls,
        spec: Spec,
        weight: Tensor,
        *more: Tensor | None,
        back: int = 0,
        input_back: int = 0,
        autocast: torch.dtype | None = None,
        running: Running | None = None,
        backend: str = "auto",
    ) -> Link:
        """`more`: bias, norm_weight, norm_bias, gate, running_mean, running_var, the last two where
        the norm goes by them. `input_back`, `back`: how many links' results before the latest one
        its input is, and what its `add` takes.
        """
        there = sum(1 << i for i, t in enumerate(more) if t is not None)
        operands = (weight, *(t for t in more if t is not None))
        (N, K), line = weight.shape, wiring.line_of(there, back, spec.text, input_back)
        C = spec.width("norm", K, N) if spec.batch_stats else 0
        return cls(line, operands, spec.random, autocast, C, running, backend)

    def given(self) -> tuple[Tensor, ...]:
        """The operands of a call."""
        if self.autocast is None:
            return self.operands
        cast = 1 + wiring.read(self.line)[0].there[0]  # weight, and bias
        own = self.operands
        return *(t.to(self.autocast) for t in own[:cast]), *own[cast:]


def backend_of(x: Tensor) -> str:
    """Which backend runs chains where x is."""
    return "cpu" if x.device.type == "cpu" else "triton"


class Way(NamedTuple):
    """How one call runs links."""

    loop: str = ""  # the backend that a GPU launches link by link; "": one launch, or a CPU's op
    why: str = ""  # it is not one launch

    def __str__(self) -> str:
        return f"one call, a launch a layer: {self.why}" if self.loop else "one call"


def rows_told(most: int) -> str:
    """Why more rows are not one launch."""
    return f"for more than {most} rows that is faster"


def way_of(backend: str, links: str, x: Tensor, product: torch.dtype, N: int, K: int) -> Way | str:
    """How links for x (..., K), alike and with products in `product`, run on a GPU in one call, or
    why they do not. Raises NotImplementedError where a named backend cannot run them.
    """
    most = backends.chain_limit(backend, links, product, x.device, N, K)
    if isinstance(most, int) and x.numel() <= most * K:
        return Way()
    if N != K:
        return f"it has {K} features in and {N} out; on a GPU layers of one width are joined"
    why = most if isinstance(most, str) else rows_told(most)
    chosen = backends.chain_backend(backend, links, product, x.device, N, K)
    return Way(chosen, why) if chosen in backends.LOOPS else f"the backend is '{chosen}'"


def way_of_links(links: Sequence[Link], x: Tensor) -> Way | str:
    """The same of a layer's link, or of some that are alike."""
    if backend_of(x) == "cpu":
        return Way()
    link, (N, K) = links[0], links[0].operands[0].shape
    product = link.autocast or link.operands[0].dtype
    return way_of(link.backend, link.line, x, product, N, K)


def _forward(
    x: Tensor, operands: Sequence[Tensor], links: str, depth: int, seeds: Tensor | None,
    sample_rows: int, keep: int, loop: str,
) -> list[Tensor]:  # fmt: skip
    """y and what is kept. What is one launch in Triton drops nothing at random, so has no seeds."""
    ops, call = torch.ops.fusedres, (x, operands, links, depth)
    found: list[Tensor]
    if backend_of(x) == "cpu":
        found = ops.chain_forward.default(*call, seeds, sample_rows, keep)
    elif loop:
        found = ops.loop_forward.default(*call, seeds, sample_rows, keep, loop)
    else:
        found = ops.triton_chain_forward.default(*call, keep)
    return found


def _backward(
    dy: Tensor, saved: Sequence[Tensor], x: Tensor, operands: Sequence[Tensor], links: str,
    depth: int, seeds: Tensor | None, sample_rows: int, keep: int, loop: str, wanted: str,
    over_z: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `wanted` has a "1" for; `over_z`: the CPU may write over what is saved."""
    ops, call = torch.ops.fusedres, (dy, saved, x, operands, links, depth)
    found: list[Tensor]
    if backend_of(dy) == "cpu":
        found = ops.chain_backward.default(*call, seeds, sample_rows, wanted, over_z)
    elif loop:
        found = ops.loop_backward.default(*call, seeds, sample_rows, keep, wanted, loop)
    else:
        found = ops.triton_chain_backward.default(*call, wanted)
    return found


def run(x: Tensor, links: list[Link], sample_rows: int = 1) -> tuple[Tensor, Tensor | None]:
    """y (M, N) of the last link from x (M, K) of the first, and the batch statistics, if there are
    any: for each such link mean (C,) and biased variance (C,), one after the other.

    `sample_rows`: rows a sample, for drop-path. Operands are assumed checked; what the op still
    refuses is a RuntimeError, and torch's generator then as it was.
    """
    text = "\n".join([link.line for link in links])
    operands = [t for link in links for t in link.given()]
    seeds = len([link for link in links if link.random])
    way = way_of_links(links, x)
    if isinstance(way, str):
        raise RuntimeError(f"fusedres: a chain: {way}")
    return run_stacked(x, text, 0, False, operands, seeds, sample_rows, way.loop)


def run_stacked(
    x: Tensor,
    text: str,
    depth: int,
    recompute: bool,
    operands: list[Tensor],
    seeds: int = 0,
    sample_rows: int = 1,
    loop: str = "",
) -> tuple[Tensor, Tensor | None]:
    """The same from the links' lines and, if `depth` is not 0, stacked operands: wiring.split.
    `recompute`: z is not kept for backward but computed again. `seeds`: how many links drop.
    `loop`: as in `Way`.
    """
    in_graph = is_dynamo_compiling() or is_exporting()
    before = torch.get_rng_state() if seeds and not in_graph else None
    drawn = draw_seeds(seeds, x.device) if seeds else None
    if in_graph:
        return _both(residual_chain(x, operands, text, depth, recompute, drawn, sample_rows, loop))
    call = text, depth, recompute, drawn, sample_rows, loop
    try:
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands)):
            return _both(_apply(*call, x, *operands))
        return _both(_without_gradient(x, operands, *call))
    except RuntimeError:
        if before is not None:
            torch.set_rng_state(before)
        raise


def _both(found: Any) -> tuple[Tensor, Tensor | None]:
    """y, and the batch statistics."""
    if isinstance(found, Tensor):
        return found, None
    return found[0], found[1] if len(found) > 1 else None


def _has_statistics(text: str) -> bool:
    return "batch_stats=1" in text


class FusedChainFunction(torch.autograd.Function):
    """apply(text, depth, recompute, seeds, sample_rows, loop, x, *operands), `text` being the
    links' lines. Saved for backward: operands, seeds, each link's input or what it is cast to for
    the product and, where a stage after ``linear`` looks at it, its product z; with `recompute` not
    z; and the batch statistics.
    """

    @staticmethod
    def forward(
        ctx: Any, text: str, depth: int, recompute: bool, seeds: Tensor | None, sample_rows: int,
        loop: str, x: Tensor, *operands: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """y (M, N), and the batch statistics, if there are any."""
        keep = 2 if recompute else 1
        y, *saved = _forward(x, operands, text, depth, seeds, sample_rows, keep, loop)
        ctx.text, ctx.depth, ctx.sample_rows, ctx.kept = text, depth, sample_rows, len(saved)
        ctx.how = keep, loop
        ctx.save_for_backward(*saved, seeds, x, *operands)
        if not _has_statistics(text):
            return y
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved[-1])
        return y, saved[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """From dy (M, N) the gradients of x and the operands, None where not needed."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        there, kept, (keep, loop) = ctx.saved_tensors, ctx.kept, ctx.how
        saved, seeds, (x, *operands) = there[:kept], there[kept], there[kept + 1 :]
        needs = ctx.needs_input_grad[_BEFORE:]
        nothing = (None,) * _BEFORE
        call = ctx.text, ctx.depth, seeds, ctx.sample_rows, (x, *operands), needs, dy
        if torch.is_grad_enabled():  # create_graph=True: gradients to be differentiated again
            return *nothing, *_composite_gradients(*call)
        wanted = "".join("01"[need] for need in needs)
        try:
            ours = len(saved) - _has_statistics(ctx.text)
            on_cpu = backend_of(dy) == "cpu"
            over_z = on_cpu and not is_dynamo_compiling() and donated(ctx, saved, ours, 2)
            how = keep, loop, wanted, over_z
            found = _backward(dy, saved, x, operands, *call[:4], *how)
        except RuntimeError as error:
            check_memory(error)
            return *nothing, *_composite_gradients(*call)
        given = iter(found)
        return *nothing, *(next(given) if need else None for need in needs)


_BEFORE = 6  # arguments of FusedChainFunction before x
_apply = super(torch.autograd.Function, FusedChainFunction).apply  # see autograd.apply_plainly


def composite_chain(
    text: str,
    depth: int,
    seeds: Tensor | None,
    sample_rows: int,
    x: Tensor,
    operands: tuple[Tensor, ...],
) -> Tensor:
    """y by plain torch ops."""
    values = [x]
    each_seed = iter(() if seeds is None else seeds.split(1))
    for spec, input_back, back, own in wiring.split(text, depth, operands):
        x = values[-1 - input_back]
        residual = values[-1 - back] if back != input_back else None
        seed = next(each_seed) if spec.random else None
        plain, running = own[:5], own[5:]  # a batch norm's, in evaluation
        o = Operands(*(x, *plain, residual, *running, seed, sample_rows))
        values.append(composite(spec, o))
    return values[-1]


def _composite_gradients(
    text: str,
    depth: int,
    seeds: Tensor | None,
    sample_rows: int,
    tensors: tuple[Tensor, ...],
    needs: tuple[bool, ...],
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients by plain torch ops, which can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        x, *operands = views = [t.view_as(t) for t in tensors]
        y = composite_chain(text, depth, seeds, sample_rows, x, tuple(operands))
        wanted = [t for t, need in zip(views, needs, strict=True) if need]
        given = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return tuple(next(given) if need else None for need in needs)


# The arguments of residual_chain: what an op of graphs gets.
def _without_gradient(
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    _recompute: bool,
    seeds: Tensor | None,
    sample_rows: int,
    loop: str,
) -> list[Tensor]:
    return _forward(x, operands, links, depth, seeds, sample_rows, 0, loop)


def _recording(x: Tensor, operands: list[Tensor], *call: Any) -> list[Tensor]:
    found = FusedChainFunction.apply(*call, x, *operands)
    return [found] if isinstance(found, Tensor) else list(found)


def _fake(
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    _recompute: bool,
    seeds: Tensor | None,
    sample_rows: int,
    _loop: str,
) -> list[Tensor]:
    return forward_fake(x, operands, links, depth, seeds, sample_rows, 0)


# The op of graphs, which has a gradient: as residual_layer in graphs.py.
torch.library.define(
    "fusedres::residual_chain",
    "(Tensor x, Tensor[] operands, str links, int depth, bool recompute, Tensor? seeds, "
    "SymInt sample_rows, str loop) -> Tensor[]",
)
torch.library.impl("fusedres::residual_chain", "CompositeExplicitAutograd", _without_gradient)
torch.library.impl("fusedres::residual_chain", "Autograd", _recording)
torch.library.register_fake("fusedres::residual_chain", _fake)
residual_chain = torch.ops.fusedres.residual_chain.default
