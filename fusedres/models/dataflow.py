"""Who reads and who writes what in a graph: what makes it safe to move a computation."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .reading import read, value

_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem, operator.delitem),
}
# What follows these runs in another state: autocast, gradients on or off.
_STATES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_saved_tensors_hooks")


@lru_cache(maxsize=1024)
def _position_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


def written(node: Node) -> list[Node]:
    """The nodes whose memory a node writes into."""
    if node.op not in ("call_function", "call_method"):
        return []
    target, first = node.target, [a for a in node.args[:1] if isinstance(a, Node)]
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return [out]
    if target is F.batch_norm:
        op = read(node)
        training = op is None or op.settings["batch_stats"]
        return [a for a in node.args[1:3] if isinstance(a, Node)] if training else []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    mutable = getattr(getattr(target, "_schema", None), "is_mutable", False)
    if target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or mutable:
        return first if not mutable else node.all_input_nodes
    if node.kwargs.get("inplace"):
        return first
    position = _position_of_inplace(target) if callable(target) else None
    if position is not None and len(node.args) > position and node.args[position]:
        return first
    return []


_UNKNOWN = -1


def is_transformed(node: Node) -> bool:
    """Whether its value is inside a torch.func transform, which dynamo puts into the graph."""
    v = value(node)
    return isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)


def _memory(node: Node) -> int | None:
    v = value(node)
    if is_transformed(node):
        return _UNKNOWN
    return v.untyped_storage()._cdata if isinstance(v, Tensor) else None


class Dataflow:
    """Facts about one graph as it stood when this was made."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: list[int] = []  # bit j of the i-th: node i is made from node j
        self.state: dict[Node, int] = {}
        self.writers = [node for node in self.nodes if written(node)]
        state = 0
        for node in self.nodes:
            state += getattr(node.target, "__name__", "") in _STATES
            self.state[node] = state
            bits = 0
            for source in node.all_input_nodes:
                i = self.order[source]
                bits |= self.ancestors[i] | 1 << i
            self.ancestors.append(bits)

    def leads_to(self, source: Node, node: Node) -> bool:
        return bool(self.ancestors[self.order[node]] >> self.order[source] & 1)

    def disturbed(self, inside: set[Node], out: Node, inputs: Iterable[Node]) -> str | None:
        """Whether, between the first node of `inside` and `out`, somebody else writes into what the
        inputs are: read later than they were, they would be something else.
        """
        first = min(map(self.order.__getitem__, inside))
        memories = {_memory(node) for node in inputs} - {None}
        for writer in self.writers:
            if writer in inside or not first < self.order[writer] < self.order[out]:
                continue
            if any(_memory(node) in {*memories, _UNKNOWN} for node in written(writer)):
                return f"{writer.name} writes into what it reads"
        return None

    def seen_later(self, node: Node, writer: Node) -> str | None:
        """Who would miss it if `writer` no longer wrote into `node`'s memory."""
        memory = _memory(node)
        for other in self.nodes:
            if other is writer or _memory(other) != memory:
                continue
            if other.op in ("placeholder", "get_attr"):
                return "it writes in place into what the caller has"
            if self.leads_to(writer, other):
                continue
            if any(self.order[user] > self.order[writer] for user in other.users):
                return f"it writes in place into {other.name}, which is read again"
        return None
