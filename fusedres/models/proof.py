"""Each kind of replacement runs once beside what it replaces, on numbers of its own."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .chains import Run
from .reading import value
from .rewrite import emit


class Pair:
    """A run of blocks twice as functions of the same inputs: as the model has it, and fused.
    Without chance: dropout and drop-path are off in both.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.inputs = run, run.inputs
        self.original, self.fused = self._original(), self._fused()
        self.autocast = _autocast(run.out)

    def _graph(self) -> tuple[Graph, dict[Any, Any]]:
        graph = Graph()
        return graph, {n: graph.placeholder(f"in{i}") for i, n in enumerate(self.inputs)}

    def _original(self) -> GraphModule:
        graph, values = self._graph()
        passing = {n: x for layer in self.run.layers for n, x in layer.passing.items()}
        for node in sorted(self.run.nodes):
            if node in passing:
                values[node] = values.get(passing[node])
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                # by its target's name, not its own, so that blocks of a kind have the same code
                values[node] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(values[self.run.out])
        return GraphModule(nn.Module(), graph)

    def _fused(self) -> GraphModule:
        graph, values = self._graph()
        module = GraphModule(nn.Module(), Graph())
        look = values.get
        graph.output(emit(graph, module, self.run, look, chance=False))
        module.graph = graph
        module.cpu()
        return module

    def numbers(self, small: bool) -> list[Any]:
        """Inputs from a generator of their own: of the model's shapes, or of a few rows."""
        return [self._number(i, node, small) for i, node in enumerate(self.inputs)]

    def _number(self, i: int, node: Node, small: bool) -> Any:
        v = value(node)
        if not isinstance(v, Tensor):
            return v
        data, size = (*self.run.data, self.run.residual), list(map(_hint, v.shape))
        if node in data:
            rows = [2] * (len(size) - 2) + [3] if small else size[:-1]
            if self.run.rows:  # what reshapes them is not part of the block
                rows = [6] if small else [math.prod(rows)]
            size = [*rows, size[-1]]
        generator = torch.Generator().manual_seed(i)
        t = torch.randn(size, generator=generator, device="cpu")
        if node in data and small:  # small rows, for eps to show
            t *= 10.0 ** (torch.arange(t[..., 0].numel()) % 4 - 2).view(t.shape[:-1]).unsqueeze(-1)
        elif v.dim() == 2:
            t *= size[-1] ** -0.5
        if any(layer.tensors.get("running_var") is node for layer in self.run.layers):
            t = t.abs() + 0.1
        return t.to(v.dtype)

    def key(self) -> tuple[Any, ...]:
        """Equal where the same would be compared."""
        facts = [(v.dtype, str(v.shape)) for n in self.inputs if isinstance(v := value(n), Tensor)]
        enabled = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        mode = getattr(self.autocast, "fast_dtype", None), enabled
        return self.original.code, self.fused.code, self.run.rows, *facts, mode


def _hint(size: Any) -> int:
    """A size as it was when the graph was made; 2 where that depends on data."""
    hint = size if isinstance(size, int) else size.node.hint
    return 2 if hint is None else int(hint)


def _autocast(out: Node) -> AbstractContextManager[Any]:
    """The state that the graph itself switches on around the node."""
    enters: list[Node] = []
    for node in out.graph.nodes:
        if node is out:
            break
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            enters.append(node)
        elif name == "_exit_autocast":
            enters.remove(node.args[0])
    if not enters:
        device = value(out).device.type
        if device in ("cpu", "meta") or not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast("cpu", torch.get_autocast_dtype(device))
    _, dtype, enabled, *_ = enters[-1].args
    return torch.autocast("cpu", dtype, enabled=bool(enabled))  # type: ignore[arg-type]


_PROVED: dict[tuple[Any, ...], str | None] = {}


def disproof(pair: Pair) -> str | None:
    """None if both give the same numbers, in the same dtype, else what is wrong."""
    key = pair.key()
    if key not in _PROVED:
        _PROVED[key] = _compare(pair)
    return _PROVED[key]


def _compare(pair: Pair) -> str | None:
    numbers = pair.numbers(small=True)
    results = []
    for module in (pair.original, pair.fused):
        copies = [t.clone() if isinstance(t, Tensor) else t for t in numbers]
        try:
            with torch.no_grad(), pair.autocast:
                results.append((module(*copies), *(t for t in copies if isinstance(t, Tensor))))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"to compare it with torch failed: {str(error).splitlines()[0]}"
    (expected, *_), (came, *_) = results
    if came.dtype != expected.dtype or came.shape != expected.shape:
        return f"it gives {came.dtype} {tuple(came.shape)}, torch {expected.dtype}"
    least = max(_precision(t) for t in (*pair.numbers(small=True), expected, pair.autocast))
    off = (came.double() - expected.double()).abs().max()
    if not off <= 64 * least * expected.double().abs().max():
        return f"it differs from torch by {off:.1e}"
    return None


@lru_cache(maxsize=64)
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _precision(t: Any) -> float:
    dtype = getattr(t, "dtype", None) or getattr(t, "fast_dtype", None)
    if dtype is None and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return _eps(dtype) if dtype is not None and dtype.is_floating_point else 0.0
