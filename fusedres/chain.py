"""A chain: layers one after the other in one op, and its autograd Function.

x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L

A stack's operands come stacked, one tensor of each kind. An `add` takes its own layer's input, or
an earlier one's: in a block of several layers the last adds the block's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends
from .backends import native
from .checks import check_memory
from .donation import donated
from .dtypes import y_dtype
from .operands import Operands
from .ops import late
from .reference import composite, draw_seeds
from .spec import Spec

_KINDS, _GATE = 6, 4  # of operands that a link may have beside weight; the gate is number 4


class Running(NamedTuple):
    """What batch norm in training does to a layer's running statistics."""

    mean: Tensor | None  # (C,)
    var: Tensor | None
    momentum: float | None
    tracked: Tensor | None  # how many batches there were


class Link(NamedTuple):
    """A layer of a chain."""

    line: str  # which of `_KINDS` it has, whose input it adds, its recipe: csrc/chain/links.h
    operands: tuple[Tensor, ...]  # weight (N, K), then those that it has of Operands'
    random: bool = False  # it drops, and needs a seed
    autocast: torch.dtype | None = None  # what weight and bias are cast to for the call
    statistics: int = 0  # C, if its norm goes by this batch's statistics
    running: Running | None = None  # which these update

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
    ) -> Link:
        """`more`: bias, norm_weight, norm_bias, gate, running_mean, running_var, the last two where
        the norm goes by them. `input_back`, `back`: how many links' results before the latest one
        its input is, and what its `add` takes.
        """
        there = sum(1 << i for i, t in enumerate(more) if t is not None)
        operands = (weight, *(t for t in more if t is not None))
        (N, K), line = weight.shape, line_of(there, back, spec.text, input_back)
        C = spec.width("norm", K, N) if spec.batch_stats else 0
        return cls(line, operands, spec.random, autocast, C, running)

    def given(self) -> tuple[Tensor, ...]:
        """The operands of a call."""
        if self.autocast is None:
            return self.operands
        cast = 1 + (_head(self.line)[0] & 1)  # weight, and bias
        own = self.operands
        return *(t.to(self.autocast) for t in own[:cast]), *own[cast:]


def line_of(there: int, back: int, recipe: str, input_back: int = 0) -> str:
    """As csrc/chain/wiring.h reads it."""
    reads = f"^{input_back}" if input_back else ""
    adds = f"<{back}" if back != input_back else ""
    return f"{there}{reads}{adds} {recipe}"


def _head(line: str) -> tuple[int, int, int, str]:
    """`there`, `input_back`, `back` and the recipe of a line."""
    head, recipe = line.split(" ", 1)
    head, _, back = head.partition("<")
    there, _, input_back = head.partition("^")
    return int(there), int(input_back or 0), int(back or input_back or 0), recipe


PIECE = 1024  # columns of what a call keeps, at most in a piece of memory: csrc/chain/values.h


def _split(
    text: str, depth: int, operands: tuple[Tensor, ...]
) -> Iterator[tuple[Spec, int, int, Any]]:
    """For each link its recipe, how many results back its input and what it adds lie, and of the
    operands its own, None where absent: weight and so many as `_KINDS` says.

    `depth` not 0: operands are stacked, (depth, ...) each but the gate, which has an entry for each
    block of as many links as `text` has lines; they are those of the last line.
    """
    lines = [_head(line) for line in text.split("\n")]
    rest, block, all_there = iter(operands), len(lines), lines[-1][0]
    stacks: list[Any] = []
    if depth:
        stacks = [next(rest).unbind()]
        stacks += [next(rest).unbind() if all_there >> i & 1 else None for i in range(_KINDS)]
    for link in range(depth or block):
        own_there, own_input, own_back, own_recipe = lines[link % block]
        has = [True, *(bool(own_there >> i & 1) for i in range(_KINDS))]
        own: list[Any] = []
        for i, here in enumerate(has):
            if here and depth:
                own.append(stacks[i][link // block if i == _GATE else link])
            else:
                own.append(next(rest) if here else None)
        yield Spec.parse(own_recipe), own_input, own_back, own


def backend_of(x: Tensor) -> str:
    """Which backend runs chains where x is."""
    return "cpu" if x.device.type == "cpu" else "triton"


def why_not_triton(backend: str, links: str, x: Tensor, N: int, K: int) -> str | None:
    """Why Triton does not run these links for x (..., K) in one call; None if it does."""
    most = backends.chain_limit(backend, links, x.dtype, x.device, N, K)
    if isinstance(most, str):
        return most
    return (
        None if x.numel() <= most * K else f"for more than {most} rows a launch a layer is faster"
    )


def _forward(
    x: Tensor, operands: Sequence[Tensor], links: str, depth: int, seeds: Tensor | None,
    sample_rows: int, keep: int,
) -> list[Tensor]:  # fmt: skip
    """y and what is kept. Triton has no links that drop at random, so no seeds."""
    ops, call = torch.ops.fusedres, (x, operands, links, depth)
    found: list[Tensor] = (
        ops.chain_forward.default(*call, seeds, sample_rows, keep)
        if backend_of(x) == "cpu"
        else ops.triton_chain_forward.default(*call, keep)
    )
    return found


def _backward(
    dy: Tensor, saved: Sequence[Tensor], x: Tensor, operands: Sequence[Tensor], links: str,
    depth: int, seeds: Tensor | None, sample_rows: int, wanted: str, over_z: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `wanted` has a "1" for; `over_z`: the CPU may write over what is saved."""
    ops, call = torch.ops.fusedres, (dy, saved, x, operands, links, depth)
    found: list[Tensor] = (
        ops.chain_backward.default(*call, seeds, sample_rows, wanted, over_z)
        if backend_of(dy) == "cpu"
        else ops.triton_chain_backward.default(*call, wanted)
    )
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
    return run_stacked(x, text, 0, False, operands, seeds, sample_rows)


def run_stacked(
    x: Tensor,
    text: str,
    depth: int,
    recompute: bool,
    operands: list[Tensor],
    seeds: int = 0,
    sample_rows: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The same from the links' lines and, if `depth` is not 0, stacked operands: see `_split`.
    `recompute`: z is not kept for backward but computed again. `seeds`: how many links drop.
    """
    in_graph = is_dynamo_compiling() or is_exporting()
    before = torch.get_rng_state() if seeds and not in_graph else None
    drawn = draw_seeds(seeds, x.device) if seeds else None
    if in_graph:
        return _both(residual_chain(x, operands, text, depth, recompute, drawn, sample_rows))
    try:
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands)):
            return _both(_apply(text, depth, recompute, drawn, sample_rows, x, *operands))
        return _both(_without_gradient(x, operands, text, depth, recompute, drawn, sample_rows))
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
    """apply(text, depth, recompute, seeds, sample_rows, x, *operands), `text` being the links'
    lines. Saved for backward: operands, seeds, each link's input or what it is cast to for the
    product and, where a stage after ``linear`` looks at it, its product z; with `recompute` not z;
    and the batch statistics.
    """

    @staticmethod
    def forward(
        ctx: Any, text: str, depth: int, recompute: bool, seeds: Tensor | None, sample_rows: int,
        x: Tensor, *operands: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """y (M, N), and the batch statistics, if there are any."""
        keep = 2 if recompute else 1
        y, *saved = _forward(x, operands, text, depth, seeds, sample_rows, keep)
        ctx.text, ctx.depth, ctx.sample_rows, ctx.kept = text, depth, sample_rows, len(saved)
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
        there, kept = ctx.saved_tensors, ctx.kept
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
            found = _backward(dy, saved, x, operands, *call[:4], wanted, over_z)
        except RuntimeError as error:
            check_memory(error)
            return *nothing, *_composite_gradients(*call)
        given = iter(found)
        return *nothing, *(next(given) if need else None for need in needs)


_BEFORE = 5  # arguments of FusedChainFunction before x
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
    for spec, input_back, back, own in _split(text, depth, operands):
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


_Width = tuple[int, torch.dtype]  # a matrix's columns, 0 if there is none, and what they are


def _pieces(widths: list[_Width]) -> list[_Width]:
    """The pieces of memory in which such matrices lie."""
    pieces: list[_Width] = []
    last: dict[torch.dtype, int] = {}
    for columns, dtype in widths:
        if not columns:
            continue
        at = last.get(dtype)
        if at is None or pieces[at][0] + columns > PIECE:
            at = last[dtype] = len(pieces)
            pieces.append((0, dtype))
        pieces[at] = pieces[at][0] + columns, dtype
    return pieces


# The arguments of residual_chain: what an op of graphs gets.
def _without_gradient(
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    _recompute: bool,
    seeds: Tensor | None,
    sample_rows: int,
) -> list[Tensor]:
    return _forward(x, operands, links, depth, seeds, sample_rows, 0)


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
) -> list[Tensor]:
    return _forward_fake(x, operands, links, depth, seeds, sample_rows, 0)


def _triton_forward_fake(
    x: Tensor, operands: list[Tensor], links: str, depth: int, keep: int
) -> list[Tensor]:
    """All links have one shape: what is kept is one tensor of inputs, and one of z."""
    specs = [spec for spec, *_ in _split(links, depth, tuple(operands))]
    kept = [x.new_empty((len(specs), *x.shape))] if keep else []
    if keep == 1 and specs[-1].saves_z:
        kept.append(torch.empty_like(kept[0]))
    return [x.new_empty(x.shape), *kept]


def _forward_fake(
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    _seeds: Tensor | None,
    _sample_rows: int,
    keep: int,
) -> list[Tensor]:
    M = x.shape[0]
    values: list[_Width] = [(x.shape[1], x.dtype)]
    casts: list[_Width] = []
    z: list[_Width] = []
    read = [False]  # whether backward looks at a value
    statistics = 0
    for spec, input_back, back, (weight, *_) in _split(links, depth, tuple(operands)):
        product, (N, K) = weight.dtype, weight.shape
        if spec.batch_stats:
            statistics += 2 * spec.width("norm", K, N)
        casts.append((K * spec.casts, product))
        if spec.prologue or not spec.casts:
            read[-1 - input_back] = True
        if spec.saves_residual:
            read[-1 - back] = True
        z.append((N * spec.saves_z, product))
        values.append((N, y_dtype(spec.text, product)))
        read.append(False)
    inner = [(N * r, dt) for (N, dt), r in zip(values, read, strict=True)][1:-1]
    kept = (_pieces(inner) + _pieces(casts[1:]) if keep else []) + (_pieces(z) if keep == 1 else [])
    N, dtype = values[-1]
    pieces = [x.new_empty(M * columns, dtype=dt) for columns, dt in kept]
    if statistics:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        pieces.append(x.new_empty(statistics, dtype=exact))
    return [x.new_empty((M, N), dtype=dtype), *pieces]


def _backward_fake(
    dy: Tensor,
    saved: list[Tensor],
    x: Tensor,
    operands: list[Tensor],
    _links: str,
    _depth: int,
    _seeds: Tensor | None,
    _sample_rows: int,
    wanted: str,
    _over_z: bool,
) -> list[Tensor]:
    found = zip((x, *operands), wanted, strict=True)
    return [t.new_empty(t.shape) for t, need in found if need == "1"]


def _triton_backward_fake(
    dy: Tensor,
    saved: list[Tensor],
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    wanted: str,
) -> list[Tensor]:
    return _backward_fake(dy, saved, x, operands, links, depth, None, 1, wanted, False)


# The op of graphs, which has a gradient: as residual_layer in graphs.py.
torch.library.define(
    "fusedres::residual_chain",
    "(Tensor x, Tensor[] operands, str links, int depth, bool recompute, Tensor? seeds, "
    "SymInt sample_rows) -> Tensor[]",
)
torch.library.impl("fusedres::residual_chain", "CompositeExplicitAutograd", _without_gradient)
torch.library.impl("fusedres::residual_chain", "Autograd", _recording)
torch.library.register_fake("fusedres::residual_chain", _fake)
residual_chain = torch.ops.fusedres.residual_chain.default

# Chains in Triton: as the single layers' ops in ops.py.
FORWARD_SCHEMA = "(Tensor x, Tensor[] operands, str links, int depth, int keep) -> Tensor[]"
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor[] saved, Tensor x, Tensor[] operands, str links, int depth, str wanted) "
    "-> Tensor[]"
)
_TRITON: dict[str, tuple[str, Any]] = {
    "chain_forward": (FORWARD_SCHEMA, _triton_forward_fake),
    "chain_backward": (BACKWARD_SCHEMA, _triton_backward_fake),
}
for _name, (_schema, _shapes) in _TRITON.items():
    torch.library.define(f"fusedres::triton_{_name}", _schema)
    torch.library.impl(f"fusedres::triton_{_name}", ("CPU", "CUDA"), late("chain", _name))
    torch.library.register_fake(f"fusedres::triton_{_name}", _shapes)

if native.missing is None:
    torch.library.register_fake("fusedres::chain_forward", _forward_fake)
    torch.library.register_fake("fusedres::chain_backward", _backward_fake)
