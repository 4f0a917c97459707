"""Puts fused calls in the place of what the matcher found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..functional import run
from ..glu import gated, glu
from ..operands import Operands
from ..spec import Spec, make_spec
from .block import Block, Layer
from .chains import Line, Run, fused_chain
from .reading import shape, value

Look = Callable[[Any], Any]  # from a node of the model's graph to the one that has its value


def fused_layer(recipe: str, momentum: float | None, x: Tensor, *operands: Tensor | None) -> Tensor:
    """One fused call in a graph: y (..., N) from x (..., K) and the fields of `Operands` that
    follow x, in order, up to running_var. `recipe`: ``str(spec)``.

    As a layer's call it reads autocast and gradient mode when it runs. Raises as `fused_residual`.
    """
    return run(Spec.parse(recipe), Operands(x, *operands), momentum, False, "auto", True)  # type: ignore[arg-type]


def fused_unit(activation: str, second: bool, *given: Tensor) -> Tensor:
    """A gated linear unit in a graph: h (..., H) of z (..., 2 H), of whose halves the second is
    activated if `second`; or of a and b (..., H).
    """
    if len(given) == 1:
        return glu(given[0], activation, "auto", second)
    a, b = given
    return gated(a, b, activation)


def spec_of(layer: Layer, chance: bool = True) -> Spec:
    """The layer's recipe; without `chance`, dropout and drop-path are off."""
    s = layer.settings
    gate = None
    if "gate" in layer.stages:
        one = "factor" in s or shape(layer.tensors["gate"])[-1:] in ((), ("1",))
        gate = "scalar" if one else "channel"
    spec = make_spec(
        layer.order,
        s.get("norm"),
        s.get("activation"),
        gate,
        s.get("eps", 1e-5),
        s.get("dropout", 0.0),
        s.get("drop_path", 0.0),
        s.get("residual_scale", 1.0),
        chance,
    )
    return spec.with_batch_stats(s.get("batch_stats", False))


def constant(owner: GraphModule, number: float, like: Node) -> str:
    """The name of a buffer of `owner` that holds a factor, as a gate."""
    device = value(like).device
    for name, buffer in owner.named_buffers(recurse=False):
        if name.startswith("fusedres_factor") and buffer.device == device and buffer == number:
            return name
    name = f"fusedres_factor_{len(list(owner.buffers(recurse=False)))}"
    owner.register_buffer(name, torch.full((1,), number, device=device), persistent=False)
    return name


def _gate(graph: Graph, owner: GraphModule, layer: Layer, look: Look) -> Any:
    if "factor" in layer.settings and "gate" in layer.stages:
        return graph.get_attr(constant(owner, layer.settings["factor"], layer.x))
    gate = layer.tensors.get("gate")
    if gate is None or len(shape(gate)) == 1:
        return look(gate)
    return graph.call_method("reshape", (look(gate), -1))


def emit(graph: Graph, owner: GraphModule, run: Run, look: Look, chance: bool = True) -> Node:
    """Appends the calls of a run to the graph, where it inserts now. Returns y's node."""
    if not run.is_chain:
        return _block(graph, owner, run.blocks[0], look, chance)
    lines: list[Line] = []
    operands: list[Any] = []
    for block in run.blocks:
        (layers,) = block.branches
        for layer in layers:
            back = len(layers) - 1 if layer is layers[-1] else 0
            lines.append((spec_of(layer, chance).text, layer.settings.get("momentum"), back))
            operands += _operands(graph, owner, layer, look)
    y = graph.call_function(fused_chain, (tuple(lines), look(run.data[0]), *operands))
    y.meta = dict(run.out.meta)
    return y


def _block(graph: Graph, owner: GraphModule, block: Block, look: Look, chance: bool) -> Node:
    original = residual = look(block.residual)
    if block.rows:
        residual = graph.call_method("flatten", (residual, 0, -2))
    for branch in block.branches:
        y = look(branch[0].start)
        if block.rows:
            y = graph.call_method("flatten", (y, 0, -2))
        for layer in branch:
            last = residual if layer is branch[-1] else None
            y = _call(graph, owner, layer, y, last, look, chance)
        residual = y
    if block.rows:
        meta, y = y.meta, graph.call_method("view_as", (y, original))
        y.meta = dict(meta)
    return y


def _operands(graph: Graph, owner: GraphModule, layer: Layer, look: Look) -> list[Any]:
    """A layer's tensors: weight, bias, norm_weight, norm_bias, gate, running_mean, running_var."""
    t = layer.tensors
    weight, *rest = (look(t.get(n)) for n in ("weight", "bias", "norm_weight", "norm_bias"))
    if layer.settings.get("transposed"):
        weight = graph.call_method("t", (weight,))
    statistics = (look(t.get(name)) for name in ("running_mean", "running_var"))
    return [weight, *rest, _gate(graph, owner, layer, look), *statistics]


def _call(
    graph: Graph, owner: GraphModule, layer: Layer, x: Node, residual: Any, look: Look, chance: bool
) -> Node:
    """Appends one fused call, after those that make its input from x."""
    if layer.gating is not None:
        unit, heads = layer.gating.unit, layer.gating.heads
        given = [_call(graph, owner, head, x, None, look, chance) for head in heads]
        x = graph.call_function(fused_unit, (unit.activation, unit.second, *given))
    operands = _operands(graph, owner, layer, look)
    operands.insert(5, residual)
    while operands[-1] is None:
        operands.pop()
    head = (spec_of(layer, chance).text, layer.settings.get("momentum"), x)
    y = graph.call_function(fused_layer, (*head, *operands))
    if layer.last is not None:
        y.meta = dict(layer.last.meta)
    return y


def replace(owner: GraphModule, run: Run, moved: dict[Node, Node]) -> None:
    """The run's nodes give way to its fused calls, in a graph that `owner` is to recompile.
    `moved`: the nodes that earlier runs ended in, to those that stand for them.
    """
    graph, out = owner.graph, run.out
    with graph.inserting_before(out):
        y = emit(graph, owner, run, lambda n: moved.get(n, n))
    out.replace_all_uses_with(y)
    moved[out] = y
    for node in sorted(run.nodes, reverse=True):
        graph.erase_node(node)
