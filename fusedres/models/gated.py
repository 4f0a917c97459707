"""Gated linear units of a graph: act(a) * b, a and b being the halves of z, or two tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .reading import Op, is_float, shape, value

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul")
_PARTS = (torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")


class Unit(NamedTuple):
    """A gated linear unit as it stands in a graph."""

    activation: str
    given: tuple[Node, ...]  # z (..., 2 H); or a and b (..., H)
    second: bool  # the activation is of z's second half
    nodes: tuple[Node, ...]  # all that it is of, the product first


def read_unit(node: Node, read: Callable[[Any], Op | None]) -> Unit | None:
    """The unit that ends in `node`; `read` gives a node as a stage."""
    if node.target is F.glu:
        z, dim = (*node.args, node.kwargs.get("dim", -1))[:2]
        if isinstance(z, Node) and is_float(z) and dim in (-1, len(shape(z)) - 1):
            return Unit("sigmoid", (z,), True, (node,))
        return None
    if node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    if not all(isinstance(t, Node) and is_float(t) for t in node.args):
        return None
    p, q = cast(tuple[Node, Node], node.args)
    for acted, b in ((p, q), (q, p)):
        op = read(acted)
        if op is None or op.kind != "act" or op.writes or acted is b:
            continue
        if shape(op.x) != shape(b) or value(op.x).dtype != value(b).dtype:
            continue
        return _unit(str(op.settings["activation"]), op.x, b, (node, acted, *op.inside))
    return None


def _unit(activation: str, a: Node, b: Any, nodes: tuple[Node, ...]) -> Unit:
    first, other = _half(a), _half(b)
    if first is not None and other is not None and first[0] is other[0] and first[1] != other[1]:
        cuts = dict.fromkeys((*first[2], *other[2]))
        return Unit(activation, (first[0],), first[1], (*nodes, *cuts))
    return Unit(activation, (a, b), False, nodes)


def _half(node: Node) -> tuple[Node, bool, tuple[Node, ...]] | None:
    """(z, whether it is the second half of z's features, the nodes that cut it off)."""
    if node.target is not operator.getitem:
        return None
    source: Any = node.args[0]
    z, second = source, None
    if isinstance(value(source), (tuple, list)) and source.target in _PARTS and source.args:
        z, at = source.args[0], cast(int, node.args[1])
        second = (
            {0: False, 1: True, -1: True, -2: False}.get(at) if len(value(source)) == 2 else None
        )
    elif isinstance(value(source), Tensor):
        second = _slice(node.args[1], len(shape(z)), value(z).shape[-1])
    if second is None or not isinstance(z, Node) or not is_float(z):
        return None
    *rows, width = value(z).shape
    *own, half = value(node).shape
    if not isinstance(width, int):
        return None
    if list(map(str, rows)) != list(map(str, own)) or 2 * half != width:
        return None
    return z, second, (node,) if source is z else (node, source)


def _slice(index: Any, dim: int, width: Any) -> bool | None:
    """Whether z[index] is the second half of the last dimension; None if it is no half."""
    index = index if isinstance(index, tuple) else (index,)
    last = index[-1]
    everything = [i for i in index[:-1] if i is not Ellipsis]
    if not isinstance(last, slice) or last.step not in (None, 1) or last == slice(None):
        return None
    if any(i != slice(None) for i in everything) or (
        len(everything) == len(index) - 1 and len(index) != dim
    ):
        return None
    begin, end = last.start or 0, width if last.stop is None else last.stop
    if not isinstance(width, int) or not isinstance(begin, int) or not isinstance(end, int):
        return None
    half = width // 2
    end = width + end if end < 0 else end
    begin = width + begin if begin < 0 else begin
    return {(0, half): False, (half, width): True}.get((begin, end))
