"""A module's forward as a fused graph: what `convert` puts in a module's way.

A plan reads the parameters of the very same submodules at each call. It holds for arguments like
those it was made for, in the same state of autocast and gradients, as long as nobody has changed a
setting, a child, a mode, or added a hook to a module that it reads through (guard.py). Else another
plan is made, up to a limit, or the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Graph, GraphModule, Node

from ..layers import watched
from ..tracing import transforms_active
from .dataflow import written
from .fuse import fuse
from .guard import PLAIN, Guard, Modules, flatten, leaves
from .reading import value
from .report import Add
from .trace import CannotTrace, ExampleTracer, current_state, trace

MOST = 8  # plans a module: further kinds of arguments run its own forward
_is_tracing = torch._C._is_tracing  # torch.jit's, for less
_SIMPLE = (int, float, str, bool, type(None), torch.dtype, torch.device)


@dataclass
class Plan:
    """One fused forward; `call` is None where there is nothing to fuse, and the reason known."""

    root: nn.Module
    guard: Guard
    modules: Modules
    wanted: list[Any]  # dict, key, dict, key, ...: where each call finds the parameters
    call: Callable[..., Any] | None
    adds: list[Add]
    why_not: str | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[Any]) -> Any:
        assert self.call is not None
        if self.guard.only_tensors:
            return self.call(*args, *parameters)
        tensors = [v for v in leaves(args, kwargs) if isinstance(v, Tensor)]
        return self.call(*tensors, *parameters)


def _lift(graph: Graph, root: nn.Module) -> list[Any]:
    """Parameters become arguments of the graph; returns where each call finds them."""
    wanted: list[Any] = []
    last = [n for n in graph.nodes if n.op == "placeholder"]
    found: dict[str, Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in found:
            path, _, attribute = name.rpartition(".")
            owner = root.get_submodule(path)
            inside = owner._parameters if attribute in owner._parameters else owner._buffers
            if attribute not in inside:
                raise CannotTrace(f"it reads {name}, which is no parameter or buffer")
            wanted += [inside, attribute]
            with graph.inserting_after(last[-1]) if last else graph.inserting_before():
                found[name] = graph.placeholder(f"p{len(wanted) // 2}")
            found[name].meta = dict(node.meta)
            last.append(found[name])
        node.replace_all_uses_with(found[name])
        graph.erase_node(node)
    return wanted


def make_plan(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    when: str,
    opaque: Callable[[nn.Module], bool],
) -> Plan:
    """A plan for a call like this; one without `call` where its forward cannot be read."""
    flat, tree = flatten(args, kwargs)
    state, seen = current_state(), Modules([root])
    fakes: dict[int, Any] = {}
    call, adds, why, wanted = None, [], None, []
    try:
        others = [v for v in flat if not isinstance(v, _SIMPLE) and type(v) not in PLAIN]
        if others:
            kind = type(others[0]).__name__
            hint = " (without one: config.use_cache = False)" if kind.endswith("Cache") else ""
            raise CannotTrace(f"it is given a {kind}{hint}")
        for name, p in root.named_parameters():
            if type(p) not in PLAIN:  # convert comes before fully_shard or parallelize_module
                raise CannotTrace(f"its parameter {name} is a {type(p).__name__} already")
        graph, tracer = trace(root, flat, tree, opaque)
        fakes = _fakes(tracer, graph)
        seen = Modules(tracer.through)
        graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output", "call_module") or bool(written(n))
        )
        wanted = _lift(graph, root)
        leaf = {str(n.target): n.target for n in graph.nodes if n.op == "call_module"}
        modules = {name: root.get_submodule(name) for name in leaf}
        module = GraphModule(modules, graph)
        adds = fuse(module, when)
        call = module.forward if any(add.fused for add in adds) else None
    except CannotTrace as error:
        why = str(error)
    return Plan(root, Guard(args, kwargs, state, fakes), seen, wanted, call, adds, why)


def _fakes(tracer: ExampleTracer, graph: Graph) -> dict[int, Any]:
    if not tracer.free:
        return {}
    return {int(str(n.target)[2:]): value(n) for n in graph.nodes if n.op == "placeholder"}


class Plans:
    """The plans of one module. Copies and pickles begin anew: a plan is of these modules alone."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.plans: list[Plan] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"when": self.when, "plans": []}

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans(self.when)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def find(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Any]] | None:
        """The plan that holds for a call, and its parameters now; None where there is none."""
        state = current_state()
        for plan in self.plans:
            if plan.root is root and plan.guard.fits(args, kwargs, state):
                parameters = plan.modules.find(plan.wanted)
                if parameters is not None:
                    return plan, parameters
        return None

    def make(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Any]] | None:
        """As `find`, with a plan that is made for this call, if there are not yet too many."""
        replica = "_is_replica" in root.__dict__  # of nn.DataParallel, for one call
        other = any(isinstance(v, Tensor) and type(v) not in PLAIN for v in leaves(args, kwargs))
        if len(self.plans) >= MOST or replica or other:
            return None
        plan = make_plan(root, args, kwargs, self.when, _is_called)
        self.plans.append(plan)
        return plan, plan.modules.find(plan.wanted) or []


def is_planned(module: nn.Module) -> bool:
    return "_fusedres_plans" in module.__dict__


def _is_called(module: nn.Module) -> bool:
    """Whether a caller's plan calls it. SyncBatchNorm's forward goes by whether processes are there
    yet.
    """
    return is_planned(module) or isinstance(module, nn.SyncBatchNorm)


class Planned:
    """Mixed into a converted module's class: the same module, whose forward goes by plans."""

    _fusedres_kind: Any  # the class that it had

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plans = self.__dict__.get("_fusedres_plans")
        if plans is not None and not (
            is_compiling() or transforms_active() or watched() or _is_tracing()
        ):
            found = plans.find(self, args, kwargs) or plans.make(self, args, kwargs)
            if found is not None and found[0].call is not None:
                return found[0].run(args, kwargs, found[1])
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = getattr(self, "__getstate__", self.__dict__.copy)()
        return _rebuild, (self._fusedres_kind,), state


_KINDS: dict[type, type] = {}


def planned_kind(kind: type) -> type:
    """The class of a converted module of this kind; it goes by the same name."""
    if kind not in _KINDS:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _KINDS[kind] = type(kind.__name__, (Planned, kind), {**names, "_fusedres_kind": kind})
    return _KINDS[kind]


def _rebuild(kind: type) -> Any:
    made: Any = planned_kind(kind)
    return made.__new__(made)
