"""Norms, activations and drop-path that a model spells out in small steps.

A region is what lies between one value and another: a few cheap ops with a single input. It is
recognised by what it computes, not by how it is written: its nodes are run on numbers that tell the
norms, their eps and the activations apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..reference import ACTIVATION_FUNCTIONS
from ..spec import ACTIVATIONS
from .reading import Op, is_float, read, shape, value

LONGEST = 16  # nodes of a region: tanh-GELU has nine, LlamaRMSNorm seven

_STEPS = {
    *("to", "float", "type_as", "pow", "square", "mean", "var", "std", "rsqrt", "sqrt", "add"),
    *("sub", "rsub", "mul", "div", "truediv", "neg", "exp", "erf", "tanh", "sigmoid", "relu"),
    *("reciprocal", "abs", "clamp", "maximum", "minimum", "log1p", "softplus"),
}


def _is_step(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _STEPS
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _STEPS and "out" not in node.kwargs


def _regions(node: Node, order: dict[Node, int]) -> Iterator[tuple[Node, list[Node]]]:
    """(x, nodes) for values x that alone lead to `node`, the nearest first."""
    frontier = {node}
    inside: list[Node] = []
    while len(inside) < LONGEST:
        last = max(frontier, key=order.__getitem__)
        if not _is_step(last):
            return
        frontier.remove(last)
        inside.append(last)
        frontier.update(last.all_input_nodes)
        if len(frontier) == 1 and len(inside) > 1:
            (x,) = frontier
            yield x, inside[::-1]


def run_nodes(nodes: Iterable[Node], values: dict[Node, Any]) -> None:
    """Runs call nodes one after another; `values` has their inputs and gets their results."""
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            function: Any = node.target
            values[node] = function(*args, **kwargs)


def _close(y: Tensor, other: Tensor, rounding: float) -> bool:
    error = (y.double() - other.double()).abs()
    return bool((error <= rounding * other.double().abs().clamp_min(1e-3)).all())


def _constants(nodes: Iterable[Node]) -> set[float]:
    return {a for node in nodes for a in node.args if isinstance(a, float) and 0 < a < 1e-2}


def _probe(x: Node) -> Tensor:
    """Rows of x's rank, dtype and width whose sizes lie around every eps in use."""
    v = value(x)
    width, generator = int(v.shape[-1]), torch.Generator().manual_seed(0)
    rows = torch.randn(6, width, generator=generator, dtype=torch.float64) + 0.3
    rows *= torch.tensor([[1e-4], [1e-3], [1e-2], [0.3], [1.0], [3.0]], dtype=torch.float64)
    return rows.to(v.dtype).view(*[1] * (v.dim() - 2), 6, width)


def _name(x: Node, nodes: list[Node], node: Node) -> Op | None:
    probe = _probe(x)
    values: dict[Node, Any] = {x: probe}
    try:
        run_nodes(nodes, values)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    y = values[node]
    if not isinstance(y, Tensor) or y.shape != probe.shape or y.dtype != probe.dtype:
        return None
    rounding, inside = 64 * torch.finfo(y.dtype).eps, tuple(nodes[:-1])
    for name in ACTIVATIONS:
        if _close(y, ACTIVATION_FUNCTIONS[name](probe), rounding):
            return Op("act", x, settings={"activation": name}, inside=inside)
    width = probe.shape[-1:]
    for eps in _constants(nodes):
        for norm, function in (("rms", F.rms_norm), ("layer", F.layer_norm)):
            if _close(y, function(probe, width, eps=eps), rounding):
                return Op("norm", x, {}, {"norm": norm, "eps": eps}, inside=inside)
    return None


def _mask(node: Node) -> tuple[float, tuple[Node, ...]] | None:
    """Probability and nodes of a drop-path mask (B, 1, ...): empty, bernoulli_, div_."""
    nodes: list[Node] = [node]
    root: Any = node
    while root.op == "call_method" and root.target in ("bernoulli_", "div_"):
        root = root.args[0]
        nodes.append(root)
    if root.target not in ("new_empty", torch.empty):
        return None
    for n in nodes:  # the results of in-place steps may have no readers
        nodes += [user for user in n.users if user.target == "div_" and user not in nodes]
    drawn = [n for n in nodes if n.target == "bernoulli_"]
    scaled = [n for n in nodes if n.target == "div_"]
    if len(drawn) != 1 or len(nodes) != 2 + len(scaled) or len(drawn[0].args) != 2:
        return None
    keep = drawn[0].args[1]
    if not isinstance(keep, float) or [n.args[1] for n in scaled] != [keep]:
        return None
    return 1.0 - keep, (*nodes, *_sizes(root))


def _sizes(node: Node) -> list[Node]:
    """Questions for sizes that only `node` asks, x.shape[0] say: who asks them reads no value."""
    asked: list[Node] = []
    for source in node.all_input_nodes:
        alone = all(user is node for user in source.users)
        if alone and not isinstance(value(source), Tensor):
            asked += [source, *_sizes(source)]
    return asked


def _read_drop_path(node: Node) -> Op | None:
    x, mask = (*node.args, None, None)[:2]
    name = getattr(node.target, "__name__", node.target)
    if name not in ("mul", "mul_") or not (isinstance(x, Node) and isinstance(mask, Node)):
        return None
    sizes = shape(mask) if isinstance(value(mask), Tensor) else ()
    if sizes[:1] != shape(x)[:1] or any(size != "1" for size in sizes[1:]) or len(sizes) < 2:
        return None
    found = _mask(mask)
    if found is None:
        return None
    return Op("droppath", x, settings={"drop_path": found[0]}, inside=found[1])


def _scaled_norm(gate: Op, order: dict[Node, int]) -> Op | None:
    """A norm whose scale is a product of its own."""
    inside, x = [], gate.x
    while len(x.users) == 1:
        op = read_long(x, order)
        inside.append(x)
        if op is None or op.kind not in ("same", "norm"):
            return None
        if op.kind == "norm":
            scale = gate.tensors["gate"]
            if any(op.tensors.values()) or shape(scale) != shape(x)[-1:]:
                return None
            inside += op.inside
            return op._replace(tensors={"norm_weight": scale}, inside=tuple(inside))
        x = op.x
    return None


def read_long(node: Any, order: dict[Node, int]) -> Op | None:
    """As `read`, and stages that take more than one node."""
    op = read(node)
    if op is None and isinstance(node, Node) and isinstance(value(node), Tensor):
        op = _read_drop_path(node)
        if op is None and _is_step(node) and value(node).dim() > 1:
            for x, nodes in _regions(node, order):
                if is_float(x) and isinstance(value(x).shape[-1], int) and shape(x) == shape(node):
                    op = _name(x, nodes, node)
                    if op is not None:
                        break
    elif op is not None and op.kind == "gate":
        return _scaled_norm(op, order) or op
    return op
