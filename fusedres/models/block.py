"""What was found in a graph: the layers of the grammar that lead to a residual add."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from .gated import Unit
from .reading import Op, value


@dataclass
class Gating:
    """A gated linear unit and the layers that its halves come from: one that gives both, or two of
    the same input.
    """

    unit: Unit
    heads: list[Layer]

    @property
    def x(self) -> Node:
        return self.heads[0].x


@dataclass
class Layer:
    """One fused call: stages in order, its input and operands, and the nodes it stands for."""

    x: Node
    stages: list[str] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    passing: dict[Node, Node] = field(default_factory=dict)  # what is its input but for chance
    last: Node | None = None  # whose value the call returns
    rows: bool = False  # leading dimensions change on the way
    gating: Gating | None = None  # what makes x

    def put(self, op: Op, node: Node, first: bool = False) -> None:
        """Joins a stage, as the first one or the last."""
        if op.kind not in ("same", "rows"):
            kind = "gate" if op.kind == "factor" else op.kind
            self.stages.insert(0 if first else len(self.stages), kind)
            self.tensors |= op.tensors
            self.settings |= op.settings
        self.rows |= op.kind == "rows"
        self.nodes += [node, *op.inside]
        if op.kind in ("same", "rows", "dropout", "droppath"):
            self.passing |= dict.fromkeys((node, *op.inside), op.x)
        if first or not self.stages:
            self.x = op.x
        if self.last is None or not first:
            self.last = node

    def begin(self, steps: list[tuple[Op, Node]]) -> bool:
        """Puts stages, nearest first, before its own; False where it has one of a kind."""
        for op, node in steps:
            if op.kind in self.stages:
                return False
            self.put(op, node, first=True)
        return True

    @property
    def order(self) -> str:
        return "-".join(self.stages)

    @property
    def start(self) -> Node:
        """What its input is made from."""
        return self.x if self.gating is None else self.gating.x

    @property
    def calls(self) -> list[Layer]:
        """Itself, after those that make its input."""
        return [*(self.gating.heads if self.gating else ()), self]


@dataclass
class Block:
    """One residual add with the layers that lead to it: of one branch, or of two, whose sum it
    adds. The first branch's last layer then adds `residual`, the second's what that gives.
    """

    add: Node
    branches: list[list[Layer]]
    residual: Node

    @property
    def layers(self) -> list[Layer]:
        return [call for branch in self.branches for layer in branch for call in layer.calls]

    @property
    def rows(self) -> bool:
        """Whether rows are cut into leading dimensions otherwise somewhere inside."""
        return any(layer.rows for layer in self.layers)

    @property
    def out(self) -> Node:
        last = self.layers[-1].last
        assert last is not None
        return last

    @property
    def nodes(self) -> set[Node]:
        gatings = [layer.gating for layer in self.layers if layer.gating]
        nodes = {node for layer in self.layers for node in layer.nodes}
        return nodes | {node for gating in gatings for node in gating.unit.nodes}

    @property
    def data(self) -> list[Node]:
        """What its branches begin with."""
        return [branch[0].start for branch in self.branches]

    @property
    def inputs(self) -> list[Node]:
        """What the block reads, in order of appearance."""
        inside = self.nodes
        found = dict.fromkeys([*self.data, self.residual])
        for node in sorted(inside):
            found |= dict.fromkeys(n for n in node.all_input_nodes if n not in inside)
        return list(found)


def divide(tail: Layer, steps: list[tuple[Op, Node]]) -> list[Layer] | None:
    """A layer for each matmul of what stands before the last one (`steps`, nearest first), and the
    last; None where a layer would have two stages of a kind. Stages between two matmuls join the
    first one's end, from its second of a kind on the other one's beginning; or, where the first one
    begins with such a stage, the other one's beginning alone.
    """
    return _divide(tail, steps, True) or _divide(tail, steps, False)


def _divide(tail: Layer, steps: list[tuple[Op, Node]], at_end: bool) -> list[Layer] | None:
    last = replace(tail, stages=[*tail.stages], nodes=[*tail.nodes], tensors={**tail.tensors})
    last.settings, last.passing = {**tail.settings}, {**tail.passing}
    layers, between = [last], list[tuple[Op, Node]]()
    for op, node in steps:
        if op.kind == "linear":
            layer = Layer(op.x)
            layer.put(op, node, first=True)
            while at_end and between and between[-1][0].kind not in layer.stages:
                layer.put(*between.pop())
            if not layers[-1].begin(between):
                return None
            layers.append(layer)
            between = []
        else:
            between.append((op, node))
    return layers[::-1] if layers[-1].begin(between) else None


def cut(tail: Layer, steps: list[tuple[Op, Node]]) -> list[Layer]:
    """Cuts what stands before the last matmul (`steps`, nearest first) into layers.

    Stages between two matmuls join the first layer's end where it has a norm, or off a CPU: else
    that layer would gain nothing, and they are the second one's beginning.
    """
    kinds = [op.kind for op, _ in steps]
    at = kinds.index("linear") if "linear" in kinds else len(steps)
    between, before = steps[:at], steps[at + 1 :]
    cpu = value(tail.x).device.type == "cpu"
    first: Layer | None = None
    if at < len(steps):
        first = Layer(steps[at][0].x)
        first.put(*steps[at], first=True)
        for op, node in reversed(between):
            if op.kind in first.stages:
                break
            first.put(op, node)
        first.begin(before)
        if "norm" not in first.stages and (cpu or first.stages == ["linear"]):
            first = None
    taken = set() if first is None else set(first.nodes)
    for op, node in between:
        if node in taken or op.kind in tail.stages:
            break
        tail.put(op, node, first=True)
    return [tail] if first is None or tail.x is not first.last else [first, tail]
