"""The matcher: residual adds of a graph, and the layers of the grammar that end in them.

From an add backwards, along the branch, through every stage that the grammar has, to the matmul
that it must contain; and on through the stages before it, to a second matmul if there is one. A
branch may be the sum of two. What is found is proved by the graph: nobody else reads a value in
between, nobody writes into what is read, all of it runs in one state of autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ..checks import DTYPES
from .block import Block, Gating, Layer, cut, divide
from .chains import fits_a_chain
from .dataflow import is_transformed
from .describe import describe
from .gated import read_unit
from .reading import Op, value
from .sums import CONVOLUTIONS, Sums, alpha


@dataclass
class ResidualAdd:
    """A residual add: where its model has it, whether it can be fused, and if not, why."""

    node: Node
    convolutional: bool
    block: Block | None = None
    why_not: str | None = None  # where `block` is None


@dataclass
class _Reads:
    """While a block is looked for: its add, its skip, and the nodes that belong to it so far."""

    add: Node
    skip: Node
    nodes: set[Node]


class Matcher:
    """Finds the residual adds of a graph; see the module."""

    def __init__(self, graph: Graph) -> None:
        self.sums = Sums(graph)
        self.flow = self.sums.flow
        self.taken: set[Node] = set()

    def find(self) -> list[ResidualAdd]:
        found: dict[Node, ResidualAdd] = {}
        for node in self.flow.nodes:
            sides = None if node in found else self.sums.sides(node)
            if sides is None:
                continue
            add = self._parallel(node) or self._residual_add(node, *sides)
            if add is not None:
                found[add.node] = add
        return list(found.values())

    def _parallel(self, node: Node) -> ResidualAdd | None:
        """x + (a + m), of which `node` is a + m, where all of it can be fused."""
        outer = next(iter(node.users), node)
        sides = self.sums.sides(outer) or ()
        if node not in sides or len(node.users) > 1 or is_transformed(node) or alpha(outer) != 1:
            return None
        (skip,) = (side for side in sides if side is not node)
        if self.sums.weighed(node, skip) is None:
            return None
        block = self._block(outer, node, skip)
        if isinstance(block, str) or len(block.branches) == 1:
            return None
        self.taken |= block.nodes
        return ResidualAdd(outer, False, block)

    def _residual_add(self, node: Node, later: Node, sooner: Node) -> ResidualAdd | None:
        for branch, skip in ((later, sooner), (sooner, later)):
            heavy = self.sums.weighed(branch, skip)
            if heavy is None:
                continue
            name = getattr(heavy.target, "__name__", "")
            add = ResidualAdd(node, name in CONVOLUTIONS)
            if is_transformed(node):
                add.why_not = "it runs inside a torch.func transform"
                return add
            if alpha(node) != 1:
                add.why_not = f"it adds {alpha(node)} times its second operand"
                return add
            for b, s in ((branch, skip), (skip, branch)):
                found = self._block(node, b, s)
                if isinstance(found, Block):
                    add.block, add.why_not = found, None
                    self.taken |= found.nodes
                    break
                add.why_not = add.why_not or found
            return add
        return None

    def _blocked(self, node: Node, op: Op, reads: _Reads) -> str | None:
        """Why a stage cannot belong to the block, of which `reads.nodes` do so far."""
        own = (node, *op.inside)
        if reads.skip in own:
            return "the skip is a value inside the branch"
        if not self.taken.isdisjoint(own):
            return "its branch is part of another fused layer"
        if any(user not in reads.nodes and user not in own for n in own for user in n.users):
            return "a value inside its branch is read elsewhere, too"
        if any(self.flow.state[n] != self.flow.state[reads.add] for n in own):
            return "autocast or gradients are switched within it"
        return None

    def _block(self, add: Node, branch: Node, skip: Node) -> Block | str:
        """The block that ends in `add`, or why there is none."""
        sides = self.sums.sides(branch)
        if sides is None or alpha(branch) != 1 or set(branch.users) != {add}:
            return self._joined(add, skip, [(branch, add)])
        later, sooner = sides
        both = self._joined(add, skip, [(sooner, branch), (later, add)])
        return both if isinstance(both, Block) else f"its branch ends in {describe(branch)}"

    def _joined(self, add: Node, skip: Node, branches: list[tuple[Node, Node]]) -> Block | str:
        """The block of these branches, each with the sum that it ends in."""
        sums, found = {end for _, end in branches}, []
        for branch, end in branches:
            layers = self._branch(branch, _Reads(add, skip, set(sums)))
            if isinstance(layers, str):
                return layers
            if (
                any(call.rows for layer in layers for call in layer.calls)
                and "droppath" in layers[-1].stages
            ):
                return "its rows are cut into other samples before it adds"
            layers[-1].put(Op("add", branch), end)
            found.append(layers)
        block = Block(add, found, skip)
        self._scaled_skip(block)
        self._after(block)
        return self._unsafe(block) or block

    def _branch(self, branch: Node, reads: _Reads) -> list[Layer] | str:
        """The layers of a branch, or why there are none."""
        tail, n, kind = Layer(branch), branch, ""
        while kind != "linear":
            op = self.sums.read(n)
            if op is None or op.kind == "add":
                return f"its branch ends in {describe(n)}"
            reason = self._blocked(n, op, reads)
            if reason is not None:
                return reason
            kind = "gate" if op.kind == "factor" else op.kind
            if kind in tail.stages:
                return f"its branch has two stages '{kind}' after the last matmul"
            tail.put(op, n, first=True)
            reads.nodes |= {n, *op.inside}
            n = op.x
        return self._before(tail, reads)

    def _before(self, tail: Layer, reads: _Reads) -> list[Layer]:
        """The layers of the block: stages before the matmul, and the matmul before them, or the
        gated unit; all matmuls on the way to the skip where one call could have them.
        """
        steps: list[tuple[Op, Node]] = []
        n, linears, second = tail.x, 0, 0
        while n is not reads.skip:
            op = self.sums.read(n)
            if op is None or op.kind in ("add", "gate", "factor", "droppath"):
                break
            if self._blocked(n, op, reads) is not None:
                break
            linears += op.kind == "linear"
            second += linears < 2
            steps.append((op, n))
            reads.nodes |= {n, *op.inside}
            n = op.x
        if n is reads.skip and linears and fits_a_chain(tail, *(op for op, _ in steps)):
            layers = divide(tail, steps)
            if layers is not None:
                return layers
        layers = cut(tail, steps[:second])
        if not linears and tail.x is n:
            tail.gating = self._gating(n, reads)
        return layers

    def _gating(self, node: Node, reads: _Reads) -> Gating | None:
        """The gated unit that ends in `node`, with the layers before it."""
        if value(node).device.type not in ("cpu", "cuda"):  # elsewhere it would be the same ops
            return None
        unit = read_unit(node, self.sums.read)
        if unit is None or self._blocked(node, Op("glu", node, inside=unit.nodes[1:]), reads):
            return None
        reads.nodes |= set(unit.nodes)
        heads = []
        for z in unit.given:
            op = self.sums.read(z)
            if op is None or op.kind != "linear" or self._blocked(z, op, reads):
                return None
            heads.append(Layer(z))
            heads[-1].put(op, z, first=True)
        reads.nodes |= {node for head in heads for node in head.nodes}
        if len({head.x for head in heads}) > 1:
            return None
        n, there = heads[0].x, True
        while there:
            op = self.sums.read(n)
            if op is None or op.kind not in ("same", "rows", "norm"):
                break
            twice = len(heads) > 1 and op.settings.get("norm") == "batch"
            if twice or self._blocked(n, op, reads):
                break
            there = op.kind != "norm"
            reads.nodes |= {n, *op.inside}
            for head in heads:
                head.put(op, n, first=True)
            n = op.x
        return Gating(unit, heads)

    def _scaled_skip(self, block: Block) -> None:
        """c * r + branch, where nobody else reads c * r."""
        op = self.sums.read(block.residual)
        if op is not None and op.kind == "factor" and set(block.residual.users) == {block.add}:
            if op.writes or block.residual in self.taken:
                return
            tail = block.branches[0][-1]
            tail.nodes.insert(0, block.residual)
            tail.settings["residual_scale"] = op.settings["factor"]
            block.residual = op.x

    def _after(self, block: Block) -> None:
        """A norm and an activation that alone read the sum."""
        tail = block.layers[-1]
        while len(block.out.users) == 1:
            (n,) = block.out.users
            op = self.sums.read(n)
            if op is None or op.x is not block.out or op.inside or n in self.taken:
                return
            if op.kind not in ("norm", "act") or op.kind in tail.stages:
                return
            if self.flow.state[n] != self.flow.state[block.add]:
                return
            tail.put(op, n)

    def _unsafe(self, block: Block) -> str | None:
        inside, inputs = block.nodes, block.inputs
        for node in inside:
            op = self.sums.read(node)
            if op is not None and op.writes and op.x not in inside:
                reason = self.flow.seen_later(op.x, node)
                if reason is not None:
                    return reason
        tensors: list[Any] = [*block.data, block.residual]
        tensors += [t for layer in block.layers for t in layer.tensors.values() if t is not None]
        for layer in block.layers:  # autograd would see torch's own statistics change under it
            mean = layer.tensors.get("running_mean") if layer.settings.get("batch_stats") else None
            if mean is not None and len(mean.users) > 1:
                return "its batch norm is called more than once"
        devices = {value(t).device for t in tensors if isinstance(t, Node)}
        if len(devices) != 1:
            return "its operands are on several devices"
        if any(value(t).dtype not in DTYPES for t in tensors if isinstance(t, Node)):
            return "a dtype has no fused form"
        if not all(isinstance(value(layer.x).shape[-1], int) for layer in block.layers):
            return "its width is not known when it is compiled"
        later = [n for n in inputs if self.flow.order[n] > self.flow.order[block.out]]
        if later:
            return f"{later[0].name} is made later"
        return self.flow.disturbed(inside, block.out, inputs)
