"""What a node of a torch.fx graph does, in the words of the grammar.

A graph may hold functions, operators, methods and their in-place forms: `read` makes one `Op` of
all of them. Nodes carry example values (fake tensors) in their meta: shapes and dtypes are known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node


class Op(NamedTuple):
    """One stage as it stands in a graph.

    kind: a stage of the grammar, or "same" (the value passes unchanged), "rows" (only leading
    dimensions change), "factor" (times a number).
    """

    kind: str
    x: Node  # what the stage acts on
    tensors: Mapping[str, Any] = MappingProxyType({})  # other operands, by their names in Operands
    settings: Mapping[str, Any] = MappingProxyType({})
    writes: bool = False  # into x
    inside: tuple[Node, ...] = ()  # nodes that belong to it besides the one that was read


def value(node: Any) -> Any:
    """The example value of a node, a fake tensor say; None where there is none."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def is_float(node: Any) -> bool:
    v = value(node)
    return isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided


def shape(node: Any) -> tuple[str, ...]:
    """As text, so that to compare symbols asks nothing of them."""
    return tuple(map(str, value(node).shape))


def is_vector(node: Any, features: Any) -> bool:
    """Whether a factor of this shape is a gate: one number, or one for each feature."""
    if not (isinstance(node, Node) and is_float(node)):
        return False
    *lead, last = shape(node) or ("1",)
    return all(size == "1" for size in lead) and last in ("1", str(features))


def _linear(input: Node, weight: Node, bias: Node | None = None) -> Op:
    return Op("linear", input, {"weight": weight, "bias": bias})


def _addmm(input: Node, mat1: Node, mat2: Node, *, beta: float = 1, alpha: float = 1) -> Op | None:
    if beta != 1 or alpha != 1 or len(shape(input)) != 1:
        return None
    return Op("linear", mat1, {"weight": mat2, "bias": input}, {"transposed": True})


def _over_last(input: Node, normalized_shape: Any) -> bool:
    return len(normalized_shape) == 1 and str(normalized_shape[0]) == shape(input)[-1]


def _layer_norm(
    input: Node,
    normalized_shape: Any,
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float = 1e-5,
) -> Op | None:
    if not _over_last(input, normalized_shape):
        return None
    tensors = {"norm_weight": weight, "norm_bias": bias}
    return Op("norm", input, tensors, {"norm": "layer", "eps": eps})


def _rms_norm(
    input: Node, normalized_shape: Any, weight: Node | None = None, eps: float | None = None
) -> Op | None:
    if not _over_last(input, normalized_shape):
        return None
    if eps is None:
        exact = torch.float64 if value(input).dtype == torch.float64 else torch.float32
        eps = torch.finfo(exact).eps
    return Op("norm", input, {"norm_weight": weight}, {"norm": "rms", "eps": eps})


def _batch_norm(
    input: Node,
    running_mean: Node | None,
    running_var: Node | None,
    weight: Node | None = None,
    bias: Node | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Op | None:
    if len(shape(input)) != 2:  # elsewhere torch takes dimension 1 for the features
        return None
    names = ("running_mean", "running_var", "norm_weight", "norm_bias")
    tensors = dict(zip(names, (running_mean, running_var, weight, bias), strict=True))
    settings = {"norm": "batch", "eps": eps, "momentum": momentum, "batch_stats": training}
    return Op("norm", input, tensors, settings)


def _dropout(
    input: Node, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Op | None:
    if not training or p == 0.0:
        return Op("same", input, writes=bool(inplace))
    return Op("dropout", input, settings={"dropout": p}, writes=bool(inplace))


def _activation(name: str, fixed: dict[str, Any], writes: bool) -> Callable[..., Op | None]:
    def read_activation(input: Node, *args: Any, inplace: bool = False, **settings: Any) -> Any:
        given = dict(zip(fixed, args, strict=False)) | settings
        if len(args) > len(fixed):  # what follows the settings is `inplace`
            inplace = args[len(fixed)]
        if any(given.get(key, standard) != standard for key, standard in fixed.items()):
            return None
        return Op("act", input, settings={"activation": name}, writes=writes or bool(inplace))

    return read_activation


def _gelu(input: Node, *, approximate: str = "none") -> Op:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return Op("act", input, settings={"activation": name})


def _mul(writes: bool) -> Callable[..., Op | None]:
    def read_product(input: Any, other: Any) -> Op | None:
        for x, factor in ((input, other), (other, input)):
            if not is_float(x) or (writes and x is not input):
                continue
            if isinstance(factor, (int, float)):
                return Op("factor", x, settings={"factor": float(factor)}, writes=writes)
            if len(shape(x)) > 1 and is_vector(factor, shape(x)[-1]):
                return Op("gate", x, {"gate": factor}, writes=writes)
        return None

    return read_product


def _div(writes: bool) -> Callable[..., Op | None]:
    def read_quotient(input: Any, other: Any) -> Op | None:
        if not isinstance(other, (int, float)) or other == 0 or not is_float(input):
            return None
        return Op("factor", input, settings={"factor": 1.0 / other}, writes=writes)

    return read_quotient


def _add(writes: bool) -> Callable[..., Op | None]:
    def read_sum(input: Any, other: Any, *, alpha: float = 1) -> Op | None:  # matcher asks alpha
        if not (is_float(input) and is_float(other)):
            return None
        return Op("add", input, {"other": other}, writes=writes)

    return read_sum


READERS: dict[Any, Callable[..., Op | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.gelu: _gelu,
}

# Functions of the activations, and the settings that they have fused forms for.
_ACTIVATIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "relu": ((F.relu, torch.relu, "relu"), {}),
    "leaky_relu": ((F.leaky_relu,), {"negative_slope": 0.01}),
    "relu6": ((F.relu6,), {}),
    "elu": ((F.elu,), {"alpha": 1.0}),
    "selu": ((F.selu, torch.selu), {}),
    "silu": ((F.silu,), {}),
    "mish": ((F.mish,), {}),
    "softplus": ((F.softplus,), {"beta": 1.0, "threshold": 20.0}),
    "hardswish": ((F.hardswish,), {}),
    "hardsigmoid": ((F.hardsigmoid,), {}),
    "sigmoid": ((torch.sigmoid, F.sigmoid, "sigmoid"), {}),
    "tanh": ((torch.tanh, F.tanh, "tanh"), {}),
    "sin": ((torch.sin, "sin"), {}),
    "softsign": ((F.softsign,), {}),
}
for _name, (_functions, _fixed) in _ACTIVATIONS.items():
    READERS |= dict.fromkeys(_functions, _activation(_name, _fixed, False))
READERS |= dict.fromkeys((F.relu_, torch.relu_, "relu_"), _activation("relu", {}, True))

for _reader, _plain, _in_place in (
    (_mul, (operator.mul, torch.mul, torch.multiply, "mul"), (operator.imul, "mul_")),
    (_div, (operator.truediv, torch.div, "div"), (operator.itruediv, "div_")),
    (_add, (operator.add, torch.add, "add"), (operator.iadd, "add_")),
):
    READERS |= dict.fromkeys(_plain, _reader(False)) | dict.fromkeys(_in_place, _reader(True))

# Of these a value comes out as it went in, if its shape and dtype say so.
_PASSING = {"contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "clone"}
_RESHAPING = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"} | {
    "squeeze",
    "unsqueeze",
}
_RESHAPING_FUNCTIONS = (torch.reshape, torch.flatten, torch.unflatten, torch.squeeze)


def _read_passing(node: Node) -> Op | None:
    x = node.args[0] if node.args else None
    if not (isinstance(x, Node) and is_float(x) and is_float(node)):
        return None
    if value(x).dtype != value(node).dtype or value(x).device != value(node).device:
        return None
    reshapes = node.target in _RESHAPING or node.target in _RESHAPING_FUNCTIONS
    if shape(x) == shape(node) and (reshapes or node.target in _PASSING):
        return Op("same", x)
    if reshapes and shape(x)[-1:] == shape(node)[-1:] and len(shape(node)) > 1 < len(shape(x)):
        return Op("rows", x)
    return None


def read(node: Any) -> Op | None:
    """The node as one stage; None where it is none by itself."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    reader = READERS.get(node.target)
    if reader is None:
        return _read_passing(node)
    try:
        op = reader(*node.args, **node.kwargs)
    except TypeError:  # another overload, say with out=
        return None
    return op if op is not None and isinstance(op.x, Node) and is_float(op.x) else None
