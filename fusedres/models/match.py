"""The matcher: residual adds of a graph, and the layers of the grammar that end in them.

From an add backwards, along the branch, through every stage that the grammar has, to the matmul
that it must contain; and on through the stages before it, to a second matmul if there is one. What
is found is proved by the graph: nobody else reads a value in between, nobody writes into what is
read, all of it runs in one state of autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..checks import DTYPES
from .block import Block, Layer, cut
from .dataflow import Dataflow, is_transformed
from .describe import describe
from .identify import read_long
from .reading import Op, read, shape, value

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
_HEAVY = {
    *("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "__matmul__", "lstm", "gru"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "scatter_add", "index_add"),
    *_CONVOLUTIONS,
}


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
        self.flow = Dataflow(graph)
        self.taken: set[Node] = set()
        self._known: dict[Any, Op | None] = {}

    def find(self) -> list[ResidualAdd]:
        found = []
        for node in self.flow.nodes:
            sides = self._sides(node)
            if sides is None:
                continue
            add = self._residual_add(node, *sides)
            if add is not None:
                found.append(add)
        return found

    def _read(self, node: Any) -> Op | None:
        if node not in self._known:
            self._known[node] = read_long(node, self.flow.order)
        return self._known[node]

    def _sides(self, node: Node) -> tuple[Node, Node] | None:
        """Both operands of a sum of equals, the one made later first."""
        op = read(node)
        if op is None or op.kind != "add" or "other" not in op.tensors:
            return None
        x, other = op.x, op.tensors["other"]
        if x is other or shape(x) != shape(other) or len(shape(x)) < 2:
            return None
        if "get_attr" in (x.op, other.op) or value(x).device.type == "meta":
            return None
        return (x, other) if self.flow.order[x] > self.flow.order[other] else (other, x)

    def _stream(self, node: Node) -> set[Node]:
        """Sums that a skip carries on, and what a projection of it projects."""
        stream, todo = set(), [node]
        while todo:
            n = todo.pop()
            if n in stream:
                continue
            stream.add(n)
            op = self._read(n)
            name = getattr(n.target, "__name__", n.target)
            if op is not None and op.kind == "add":
                todo += [op.x, op.tensors["other"]]
            elif op is not None and op.kind not in ("act", "droppath"):
                todo.append(op.x)
            elif name in (*_CONVOLUTIONS, "batch_norm", "avg_pool2d", "max_pool2d"):
                todo += [a for a in n.args[:1] if isinstance(a, Node)]
        return stream

    def _heavy(self, branch: Node, stream: set[Node]) -> Node | None:
        """The last op with weights or attention of a branch, before it leaves the stream."""
        todo, seen = [branch], set(stream)
        while todo:
            n = max(todo, key=self.flow.order.__getitem__)
            todo.remove(n)
            if n in seen:
                continue
            seen.add(n)
            name = getattr(n.target, "__name__", n.target)
            if name in _HEAVY or n.op == "call_module":
                return n
            todo += n.all_input_nodes
        return None

    def _residual_add(self, node: Node, later: Node, sooner: Node) -> ResidualAdd | None:
        for branch, skip in ((later, sooner), (sooner, later)):
            stream = self._stream(skip)
            if not any(self.flow.leads_to(s, branch) or _comes_in(s) for s in stream):
                continue
            heavy = self._heavy(branch, stream)
            if heavy is None:
                continue
            name = getattr(heavy.target, "__name__", "")
            add = ResidualAdd(node, name in _CONVOLUTIONS)
            if is_transformed(node):
                add.why_not = "it runs inside a torch.func transform"
                return add
            alpha = node.kwargs.get("alpha", 1)
            if alpha != 1:
                add.why_not = f"it adds {alpha} times its second operand"
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
        tail, n, kind = Layer(branch), branch, ""
        reads = _Reads(add, skip, {add})
        while kind != "linear":
            op = self._read(n)
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
        layers = self._before(tail, reads)
        block = Block(add, layers, skip)
        if block.rows and "droppath" in tail.stages:
            return "its rows are cut into other samples before it adds"
        tail.put(Op("add", branch), add)
        self._scaled_skip(block)
        self._after(block)
        return self._unsafe(block) or block

    def _before(self, tail: Layer, reads: _Reads) -> list[Layer]:
        """The layers of the block: stages before the matmul, and the matmul before them."""
        steps: list[tuple[Op, Node]] = []
        n, linears = tail.x, 0
        while True:
            op = self._read(n)
            if op is None or op.kind in ("add", "gate", "factor", "droppath"):
                break
            if self._blocked(n, op, reads) is not None or (op.kind == "linear" and linears):
                break
            linears += op.kind == "linear"
            steps.append((op, n))
            reads.nodes |= {n, *op.inside}
            n = op.x
        return cut(tail, steps)

    def _scaled_skip(self, block: Block) -> None:
        """c * r + branch, where nobody else reads c * r."""
        op = self._read(block.residual)
        if op is not None and op.kind == "factor" and set(block.residual.users) == {block.add}:
            if op.writes or block.residual in self.taken:
                return
            tail = block.layers[-1]
            tail.nodes.insert(0, block.residual)
            tail.settings["residual_scale"] = op.settings["factor"]
            block.residual = op.x

    def _after(self, block: Block) -> None:
        """A norm and an activation that alone read the sum."""
        tail = block.layers[-1]
        while len(block.out.users) == 1:
            (n,) = block.out.users
            op = self._read(n)
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
            op = self._read(node)
            if op is not None and op.writes and op.x not in inside:
                reason = self.flow.seen_later(op.x, node)
                if reason is not None:
                    return reason
        tensors = [block.layers[0].x, block.residual]
        tensors += [t for layer in block.layers for t in layer.tensors.values() if t is not None]
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


def _comes_in(node: Node) -> bool:
    """Whether it is an activation that was made outside the graph: who knows from what."""
    v = value(node)
    return node.op == "placeholder" and isinstance(v, Tensor) and not isinstance(v, nn.Parameter)
