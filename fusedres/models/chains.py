"""Neighbours among the fused blocks of a graph: one call runs them, one after the other, as
FusedSequential does with layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain as joint
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from ..chain import Link, Running
from ..functional import run
from ..links import LARGEST, NARROW, Stream, autocast_dtype, goes_on, joined, typed_link, unchained
from ..operands import Operands
from ..spec import Spec
from .block import Block, Layer
from .dataflow import Dataflow
from .reading import Op, value

OPERANDS = 7  # of a link: weight, bias, norm_weight, norm_bias, gate, running_mean, running_var


# A link of a call in a graph, without its tensors: recipe, momentum, and how many links before it
# the one is whose input it adds.
Line = tuple[str, float | None, int]


class _Known(NamedTuple):
    facts: tuple[Any, ...]  # what the links depend on
    links: list[Link]  # without tensors; none: one call cannot run them


_known: Any = WeakIdKeyDictionary()  # by a call's first weight: to find links takes 20 us each


def fused_chain(lines: tuple[Line, ...], x: Tensor, *operands: Tensor | None) -> Tensor:
    """Blocks in a graph: y (..., N) of the last link from x (..., K) of the first. `operands`: each
    link's, OPERANDS of them.

    What one call cannot run now, as under torch.func, runs link by link.
    """
    own = [operands[i : i + OPERANDS] for i in range(0, len(operands), OPERANDS)]
    links = _links(lines, x, operands, own) if unchained(x) is None else []
    y = joined(x, [(link,) for link in links]) if links else None
    return _one_by_one(lines, x, own) if y is None else y


def _links(
    lines: tuple[Line, ...],
    x: Tensor,
    operands: tuple[Tensor | None, ...],
    own: list[tuple[Tensor | None, ...]],
) -> list[Link]:
    """All links, or none. Shapes of operands are the graph's, and stay as they are."""
    width = x.shape[-1]
    rows = x.numel() // width
    rows = min(8, rows) if x.device.type == "cpu" else rows  # all that a CPU asks of their number
    its = [None if t is None else (type(t), t.dtype, t.device) for t in operands]
    facts = (lines, width, rows, x.dtype, x.device, autocast_dtype(x.device.type), its)
    known = _known.get(operands[0])
    if known is None or known.facts != facts:
        _known[operands[0]] = known = _Known(facts, _find_links(lines, x, own))
    links = []
    for link, (_, momentum, _), tensors in zip(known.links, lines, own, strict=False):
        running = Running(tensors[5], tensors[6], momentum, None) if link.running else None
        mine = tensors[:5] if running else tensors
        there = tuple([t for t in mine if t is not None])
        links.append(link._replace(operands=there, running=running))
    return links


def _find_links(
    lines: tuple[Line, ...], x: Tensor, own: list[tuple[Tensor | None, ...]]
) -> list[Link]:
    links: list[tuple[Link, ...]] = []
    stream, dtypes = Stream(x.shape[-1], x.dtype), [x.dtype]
    for (recipe, momentum, back), operands in zip(lines, own, strict=True):
        spec, running = Spec.parse(recipe), None
        if spec.batch_stats:
            if x.numel() == x.shape[-1]:
                return []
            running = Running(operands[5], operands[6], momentum, None)
        residual = dtypes[-1 - back] if back else None
        linked = typed_link(spec, operands, running, x, stream._replace(residual=residual), back)
        if isinstance(linked, str) or not goes_on(links, linked[0], x):
            return []
        links.append((linked[0],))
        stream = linked[1]
        dtypes.append(stream.dtype)
    nothing = Running(None, None, None, None)
    return [
        link._replace(operands=(), running=nothing if link.running else None) for (link,) in links
    ]


def _one_by_one(lines: tuple[Line, ...], x: Tensor, own: list[tuple[Tensor | None, ...]]) -> Tensor:
    values = [x]
    for (recipe, momentum, back), operands in zip(lines, own, strict=True):
        residual = values[-1 - back] if back else None
        mine: Any = (values[-1], *operands[:5], residual, *operands[5:])
        o = Operands(*mine)
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
    def is_chain(self) -> bool:
        """Whether it is one call of several links."""
        return len(self.layers) > 1 and all(map(_is_link, self.blocks))

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


def fits_a_chain(*parts: Layer | Op) -> bool:
    """Whether one call could have these matmuls, by their shapes: as FusedSequential has it."""
    weights = [value(part.tensors["weight"]) for part in parts if "weight" in part.tensors]
    if any(part.settings.get("transposed") for part in parts):
        return False
    if weights[0].device.type != "cpu":
        return len(weights) == 1
    limit = LARGEST if len(weights) == 1 else NARROW
    return all(weight.shape.numel() <= limit for weight in weights)


def _is_link(block: Block) -> bool:
    """Whether a call of several blocks could have it."""
    if len(block.branches) > 1 or block.rows or block.residual is not block.data[0]:
        return False
    (layers,) = block.branches
    return not any(layer.gating for layer in layers) and fits_a_chain(*layers)


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
    for one in runs.values():
        disturbed = len(one.blocks) > 1 and flow.disturbed(one.nodes, one.out, one.inputs)
        found += [Run([block]) for block in one.blocks] if disturbed else [one]
    return sorted(found, key=lambda one: flow.order[one.out])
