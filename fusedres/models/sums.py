"""Which sums of a graph are residual adds: those of a skip and of a branch that comes from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from .dataflow import Dataflow
from .identify import read_long
from .reading import Op, read, shape, value

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
_HEAVY = {
    *("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "__matmul__", "lstm", "gru"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "scatter_add", "index_add"),
    *CONVOLUTIONS,
}


class Sums:
    """The sums of one graph as it stood when this was made."""

    def __init__(self, graph: Graph) -> None:
        self.flow = Dataflow(graph)
        self._known: dict[Any, Op | None] = {}

    def read(self, node: Any) -> Op | None:
        """The node as a stage, of one node or several."""
        if node not in self._known:
            self._known[node] = read_long(node, self.flow.order)
        return self._known[node]

    def sides(self, node: Node) -> tuple[Node, Node] | None:
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
            op = self.read(n)
            name = getattr(n.target, "__name__", n.target)
            if op is not None and op.kind == "add":
                todo += [op.x, op.tensors["other"]]
            elif op is not None and op.kind not in ("act", "droppath"):
                todo.append(op.x)
            elif name in (*CONVOLUTIONS, "batch_norm", "avg_pool2d", "max_pool2d"):
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

    def weighed(self, branch: Node, skip: Node) -> Node | None:
        """The branch's last op with weights or attention, if the branch comes from the skip."""
        stream = self._stream(skip)
        if any(self.flow.leads_to(s, branch) or _comes_in(s) for s in stream):
            return self._heavy(branch, stream)
        return None


def alpha(node: Node) -> Any:
    """What a sum's second operand is multiplied by."""
    return node.kwargs.get("alpha", 1)


def _comes_in(node: Node) -> bool:
    """Whether it is an activation that was made outside the graph: who knows from what."""
    v = value(node)
    return node.op == "placeholder" and isinstance(v, Tensor) and not isinstance(v, nn.Parameter)
