"""Chains on a GPU that one launch does not take: a launch a link, all of them called by one op.

Links are alike, N = K. Each is launched as a layer by itself is, and saves what a layer does; only
that results lie one after the other in memory, so that backward multiplies the dz and the inputs of
many links in one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import wiring
from ..dtypes import y_dtype
from ..operands import DIFFERENTIABLE, Operands, Outputs
from ..spec import Spec
from . import plan as planner
from . import triton as layers
from . import vendor
from .plan import ceil_div

FORWARD = {"triton": layers.forward_of, "vendor": vendor.forward_of}
TILE = 128  # rows and columns of a weight's gradient that a multiprocessor makes at a time
WAVES = 2  # of such tiles in a product of several links; not measured
ROOM = 16  # elements: planes begin where copies may be wide


class Layout(NamedTuple):
    """Where what a call keeps for backward lies."""

    dtypes: tuple[torch.dtype, ...]  # of values
    pieces: tuple[tuple[str, torch.dtype, int], ...]  # a tensor each: kind, dtype, planes
    planes: dict[tuple[str, int], tuple[int, int]]  # of a kind and a link: piece, plane


@lru_cache(maxsize=1024)
def layout(links: str, depth: int, x: torch.dtype, product: torch.dtype, keep: int) -> Layout:
    """Of `keep` 0: batch statistics; 1: what the layers one by one save; 2: links' inputs and batch
    statistics. x itself is kept by the caller.
    """
    lines = wiring.read(links)
    L, block = depth or len(lines), len(lines)
    specs = [Spec.parse(lines[link % block].recipe) for link in range(L)]
    dtypes, reads = [x], [keep == 2] * L
    for link, spec in enumerate(specs):
        reads[link] |= not spec.casts
        if spec.saves_residual:
            reads[link - lines[link % block].back] = True
        dtypes.append(y_dtype(spec.text, product))
    pieces: dict[tuple[str, torch.dtype], int] = {}
    planes: dict[tuple[str, int], tuple[int, int]] = {}

    def add(kind: str, link: int, dtype: torch.dtype) -> None:
        plane = pieces.setdefault((kind, dtype), 0)
        planes[kind, link] = list(pieces).index((kind, dtype)), plane
        pieces[kind, dtype] += 1

    for link, spec in enumerate(specs):
        if keep and link and reads[link]:
            add("value", link, dtypes[link])
        if keep == 1 and spec.casts:
            add("operand", link, product)
        if keep == 1 and spec.saves_z:
            add("z", link, product)
        if keep == 1 and spec.norm in ("layer", "rms"):
            add("rows", link, torch.float32)
    for link, spec in enumerate(specs):
        if spec.batch_stats:
            add("batch", link, torch.float32)
    told = tuple((kind, dtype, count) for (kind, dtype), count in pieces.items())
    return Layout(tuple(dtypes), told, planes)


def _sizes(kind: str, M: int, N: int) -> tuple[tuple[int, ...], int]:
    """A plane's shape, and how many elements lie between the beginnings of two."""
    if kind == "batch":
        return (2, N), 2 * N
    size = 2 * M if kind == "rows" else M * N
    return (2 * M,) if kind == "rows" else (M, N), (size + ROOM - 1) // ROOM * ROOM


class Kept:
    """What a call keeps, tensors by kind and link."""

    def __init__(self, where: Layout, pieces: list[Tensor], M: int, N: int) -> None:
        self.where, self.planes = where, []
        for (kind, _, count), piece in zip(where.pieces, pieces, strict=True):
            shape, step = _sizes(kind, M, N)
            strides = (step, 1) if len(shape) == 1 else (step, shape[1], 1)
            self.planes.append(piece.as_strided((count, *shape), strides).unbind())

    def of(self, kind: str, link: int) -> Tensor | None:
        at = self.where.planes.get((kind, link))
        return None if at is None else self.planes[at[0]][at[1]]

    def beside(self, kind: str, link: int) -> bool:
        """Whether the link before has its plane right before this one's."""
        own, before = (self.where.planes.get((kind, i)) for i in (link, link - 1))
        return own is not None and before == (own[0], own[1] - 1)


def _pieces(x: Tensor, where: Layout) -> list[Tensor]:
    M, N = x.shape
    return [
        x.new_empty(count * _sizes(kind, M, N)[1], dtype=dtype)
        for kind, dtype, count in where.pieces
    ]


class Step(NamedTuple):
    """A link of a call."""

    spec: Spec
    back: int  # how many values before its input what it adds is
    own: list[Any]  # weight, and of wiring.KINDS
    seed: Tensor | None

    def operands(self, x: Tensor, residual: Tensor | None, sample_rows: int) -> Operands:
        weight, bias, norm_weight, norm_bias, gate, mean, var = self.own
        more = norm_weight, norm_bias, gate, residual, mean, var, self.seed
        return Operands(x, weight, bias, *more, sample_rows)


def _steps(
    x: Tensor, operands: list[Tensor], links: str, depth: int, seeds: Tensor | None
) -> list[Step]:
    """All links; RuntimeError for those that are not alike."""
    each, steps = iter(() if seeds is None else seeds.split(1)), []
    for spec, input_back, back, own in wiring.split(links, depth, operands):
        weight = own[0]
        same = weight.dtype == operands[0].dtype and weight.shape == (x.shape[1], x.shape[1])
        if input_back or not same:
            raise RuntimeError(
                f"fusedres: a loop's weight is {tuple(weight.shape)}, {weight.dtype}, its input "
                f"{input_back} values back; expected {(x.shape[1],) * 2}, {operands[0].dtype}, 0"
            )
        steps.append(Step(spec, back, own, next(each) if spec.random else None))
    return steps


def loop_forward(
    x: Tensor, operands: list[Tensor], links: str, depth: int, seeds: Tensor | None,
    sample_rows: int, keep: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    """y (M, N), and what `layout` says. x (M, N) of any strides; `backend`: whose launches."""
    steps = _steps(x, operands, links, depth, seeds)
    where = layout(links, depth, x.dtype, operands[0].dtype, keep)
    pieces = _pieces(x, where)
    kept = Kept(where, pieces, *x.shape)
    most = 1 + max(step.back for step in steps)
    values = [x]  # as many of the latest as somebody adds
    for link, step in enumerate(steps):
        y = kept.of("value", link + 1)
        if y is None:
            y = x.new_empty(x.shape, dtype=where.dtypes[link + 1])
        stats = kept.of("batch" if step.spec.batch_stats else "rows", link)
        out = Outputs(y, kept.of("z", link), stats, kept.of("operand", link))
        residual = values[-1 - step.back] if step.back else None
        o = step.operands(values[-1], residual, sample_rows)
        FORWARD[backend](o, step.spec.text, keep == 1, out)
        values = [*values, y][-most:]
    return [values[-1], *pieces]


def forward_fake(
    x: Tensor, operands: list[Tensor], links: str, depth: int, seeds: Tensor | None,
    sample_rows: int, keep: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    where = layout(links, depth, x.dtype, operands[0].dtype, keep)
    return [x.new_empty(x.shape, dtype=where.dtypes[-1]), *_pieces(x, where)]


def _memory_for_gradients(
    operands: list[Tensor], links: str, depth: int, wanted: str
) -> list[Tensor | None]:
    """For those that `wanted` has a "1" for; those of weights lie one after the other."""
    weights: dict[int, Tensor] = {}
    if not depth:
        counts = [1 + sum(line.there) for line in wiring.read(links)]
        learn = [i for i in accumulate(counts[:-1], initial=0) if wanted[i] == "1"]
        stack = operands[0].new_empty((len(learn), *operands[0].shape))
        weights = dict(zip(learn, stack.unbind(), strict=True))
    given = zip(operands, wanted, strict=True)
    return [
        None if need == "0" else weights[i] if i in weights else t.new_empty(t.shape)
        for i, (t, need) in enumerate(given)
    ]


def loop_backward(
    dy: Tensor, saved: list[Tensor], x: Tensor, operands: list[Tensor], links: str, depth: int,
    seeds: Tensor | None, sample_rows: int, keep: int, wanted: str, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x and the operands, those that `wanted` has a "1" for, in their types.

    dy (M, N) of any strides ; `saved`, `keep`, `backend` as in `loop_forward`. A backward a link,
    as a layer's but that weights' gradients, where no stage stands before ``linear``, are batched.
    """
    steps = _steps(x, operands, links, depth, seeds)
    where = layout(links, depth, x.dtype, operands[0].dtype, keep)
    if tuple(dy.shape) != tuple(x.shape):
        raise RuntimeError(f"fusedres: dy is {tuple(dy.shape)}, expected {tuple(x.shape)}")
    into = _memory_for_gradients(operands, links, depth, wanted[1:])
    own = [grads for *_, grads in wiring.split(links, depth, into)]
    down_to_x = wanted[0] == "1"
    first = 0 if down_to_x else next(i for i, g in enumerate(own) if any(t is not None for t in g))
    walk = _Walk(x, Kept(where, saved, *x.shape), steps, own, first, down_to_x)
    dx = walk.back(dy, sample_rows, keep, FORWARD[backend])
    return [t for t in (dx, *into) if t is not None]


class _Walk:
    """One walk back, from the last link to the first that somebody asks a gradient of."""

    def __init__(
        self, x: Tensor, kept: Kept, steps: list[Step], own: list[Any], first: int, down_to_x: bool
    ) -> None:
        self.x, self.kept, self.steps, self.own = x, kept, steps, own
        self.first, self.down_to_x = first, down_to_x
        self.batches = dict(self.batched())

    def batched(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """For each link whose weight's gradient is made apart, the links [a, b) of its product: as
        many as fill the GPU, if what they multiply lies side by side.
        """
        N = self.x.shape[1]
        processors = planner.device_of(self.x.device).processors
        most = max(1, ceil_div(WAVES * processors, ceil_div(N, TILE) ** 2))
        b = len(self.steps)
        while b > self.first:
            a = b - 1
            if self.apart(a):
                kind = self.multiplied(a)
                while a > self.first and b - a < most and self.apart(a - 1):
                    if self.multiplied(a - 1) != kind or not self.kept.beside(kind, a):
                        break
                    a -= 1
                yield from ((link, (a, b)) for link in range(a, b))
            b = a

    def apart(self, link: int) -> bool:
        return self.own[link][0] is not None and not self.steps[link].spec.prologue

    def multiplied(self, link: int) -> str:
        """The kind of what the product has dz multiplied with."""
        return "operand" if self.steps[link].spec.casts else "value"

    def needs(self, value: int) -> bool:
        """Whether the gradient of a value is asked for."""
        return value > self.first or (value == 0 and self.down_to_x)

    def value(self, link: int) -> Tensor:
        """A link's input, or what stands in for it where nobody looks at it."""
        t = self.x if link == 0 else self.kept.of("value", link)
        if t is not None:
            return t
        return self.x.new_empty((), dtype=self.kept.where.dtypes[link]).expand(self.x.shape)

    def back(self, dy: Tensor, sample_rows: int, keep: int, forward: Any) -> Tensor | None:
        """The gradient of x, if that is asked for; all others go into their memory."""
        d = {len(self.steps): dy}  # of values
        dz: Any = None  # of the links of a product
        for link in reversed(range(self.first, len(self.steps))):
            step, grads = self.steps[link], self.own[link]
            a, b = self.batches.get(link, (link, link))
            if link == b - 1:
                dz = self.memory_for_dz(b - a)
            source = link - step.back
            o = step.operands(
                self.value(link), self.value(source) if step.back else None, sample_rows
            )
            again = keep == 2
            saved = forward(o, step.spec.text, True).list()[1:] if again else self.saved_by(link)
            asked = [self.needs(link), *(t is not None for t in grads[:5])]
            asked[1] &= a == b
            asked.append(step.back > 0 and self.needs(source))
            needs = sum(need << i for i, need in enumerate(asked))
            names = zip(DIFFERENTIABLE[1:], grads[:5], asked[1:], strict=False)
            into = {name: t for name, t, need in names if need}
            to = dz[link - a] if a < b else None
            found = layers.backward_of(d.pop(link + 1), saved, o, step.spec.text, needs, into, to)
            for name, value in (("residual", source), ("x", link)):
                if name in found:
                    d[value] = d[value].add_(found[name]) if value in d else found[name]
            if link == a < b:
                self.product(a, b, dz, saved[-1] if again and step.spec.casts else None)
        return d[0] if self.down_to_x else None

    def saved_by(self, link: int) -> list[Tensor]:
        """As the op of a layer returns it."""
        stats = "batch" if self.steps[link].spec.batch_stats else "rows"
        found = (self.kept.of(kind, link) for kind in ("z", stats, "operand"))
        return [t for t in found if t is not None]

    def memory_for_dz(self, count: int) -> Tensor:
        (_, step), weight = _sizes("z", *self.x.shape), self.steps[0].own[0]
        return _planes(weight.new_empty(count * step), count, self.x.shape, step)

    def product(self, a: int, b: int, dz: Tensor, operand: Tensor | None) -> None:
        """The gradients of the weights of links [a, b): dz.T @ what was multiplied, which is
        `operand`, if it was made again.
        """
        kept, kind, out = self.kept.of(self.multiplied(a), a), self.multiplied(a), self.own[a][0]
        multiplied: Any = operand if operand is not None else self.x if kept is None else kept
        if b - a == 1:
            torch.mm(dz[0].t(), multiplied, out=out)
            return
        M, N = self.x.shape
        several = _planes(multiplied, b - a, (M, N), _sizes(kind, M, N)[1])
        torch.bmm(dz.transpose(1, 2), several, out=_planes(out, b - a, (N, N), N * N))


def _planes(first: Tensor, count: int, shape: Any, step: int) -> Tensor:
    """(count, M, N) from where `first` begins, `step` elements from one to the next."""
    return first.as_strided((count, *shape), (step, shape[1], 1))
