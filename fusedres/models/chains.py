"""Neighbours among the fused blocks of a graph: one call runs them, one after the other, as
FusedSequential does with layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain as joint

from torch import Tensor
from torch.fx import Node

from ..chain import Link, Running
from ..functional import run
from ..links import LARGEST, NARROW, Stream, goes_on, joined, typed_link, unchained
from ..operands import Operands
from ..spec import Spec
from .block import Block, Layer
from .dataflow import Dataflow
from .reading import value

OPERANDS = 7  # of a link: weight, bias, norm_weight, norm_bias, gate, running_mean, running_var


# A link of a call in a graph, without its tensors: recipe, momentum, and how many links before it the
# one is whose input it adds.
Line = tuple[str, float | None, int]


def fused_chain(lines: tuple[Line, ...], x: Tensor, *operands: Tensor | None) -> Tensor:
    """Blocks in a graph: y (..., N) of the last link from x (..., K) of the first. `operands`: each
    link's, OPERANDS of them.

    What one call cannot run now, as under torch.func, runs link by link.
    """
    own = [operands[i : i + OPERANDS] for i in range(0, len(operands), OPERANDS)]
    links = _links(lines, x, own) if unchained(x) is None else []
    y = joined(x, links) if links else None
    return _one_by_one(lines, x, own) if y is None else y


def _links(
    lines: tuple[Line, ...], x: Tensor, own: list[tuple[Tensor | None, ...]]
) -> list[tuple[Link, ...]]:
    """All links, or none."""
    links: list[tuple[Link, ...]] = []
    stream, dtypes = Stream(x.shape[-1], x.dtype), [x.dtype]
    for (recipe, momentum, back), operands in zip(lines, own, strict=True):
        spec, running = Spec.parse(recipe), None
        if spec.batch_stats:
            if x.numel() == x.shape[-1]:
                return []
            running = Running(*operands[5:], momentum, None)
        residual = dtypes[-1 - back] if back else None
        linked = typed_link(spec, operands, running, x, stream._replace(residual=residual), back)
        if isinstance(linked, str) or not goes_on(links, linked[0], x):
            return []
        links.append((linked[0],))
        stream = linked[1]
        dtypes.append(stream.dtype)
    return links


def _one_by_one(
    lines: tuple[Line, ...], x: Tensor, own: list[tuple[Tensor | None, ...]]
) -> Tensor:
    values = [x]
    for (recipe, momentum, back), operands in zip(lines, own, strict=True):
        residual = values[-1 - back] if back else None
        o = Operands(values[-1], *operands[:5], residual, *operands[5:])  # type: ignore[arg-type]
        values.append(run(Spec.parse(recipe), o, momentum, False, "auto", True))
    return values[-1]


@dataclass
class Run:
    """Blocks that one call replaces, or one that is replaced alone; as a Block describes itself."""

    blocks: list[Block]

    @property
    def layers(self) -> list[Layer]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def rows(self) -> bool:
        return any(block.rows for block in self.blocks)

    @property
    def add(self) -> Node:
        return self.blocks[-1].add

    @property
    def out(self) -> Node:
        return self.blocks[-1].out

    @property
    def nodes(self) -> set[Node]:
        return set(joint.from_iterable(block.nodes for block in self.blocks))

    @property
    def data(self) -> list[Node]:
        return self.blocks[0].data

    @property
    def residual(self) -> Node:
        return self.blocks[0].residual

    @property
    def inputs(self) -> list[Node]:
        """What the blocks read and none of them makes, in order of appearance."""
        made = self.nodes
        read = joint.from_iterable(block.inputs for block in self.blocks)
        return [node for node in dict.fromkeys(read) if node not in made]


def _is_link(block: Block) -> bool:
    """Whether a call of several blocks could have it, by its shapes as FusedSequential has it."""
    if len(block.branches) > 1 or block.rows or block.residual is not block.data[0]:
        return False
    layers, limit = block.branches[0], LARGEST if len(block.layers) == 1 else NARROW
    if any(layer.gating or layer.settings.get("transposed") for layer in layers):
        return False
    shapes = [value(layer.tensors["weight"]).shape for layer in layers]
    return all(shape.numel() <= limit for shape in shapes)


def _joins(run: Run, block: Block, flow: Dataflow) -> bool:
    """Whether `block` alone takes what `run` gives, and one call could have both."""
    last = run.out
    if not block.nodes.issuperset(last.users) or flow.state[last] != flow.state[block.out]:
        return False
    return _is_link(run.blocks[-1]) and _is_link(block)


def runs_of(blocks: Iterable[Block], flow: Dataflow) -> list[Run]:
    """A graph's blocks in runs of as many as one call could have, in the order of their ends."""
    runs: dict[Node, Run] = {}  # by what they give
    for block in blocks:
        before = runs.get(block.data[0])
        if before is not None and _joins(before, block, flow):
            del runs[before.out]
            before.blocks.append(block)
        else:
            before = Run([block])
        runs[block.out] = before
    found: list[Run] = []
    for run in runs.values():
        disturbed = len(run.blocks) > 1 and flow.disturbed(run.nodes, run.out, run.inputs)
        found += [Run([block]) for block in run.blocks] if disturbed else [run]
    return sorted(found, key=lambda run: flow.order[run.out])
