"""A module's forward as a fused graph, and when it holds: what `convert` puts in a module's way.

A plan reads the parameters of the very same submodules at each call. It holds for arguments like
those it was made for, in the same state of autocast and gradients, as long as nobody has changed a
setting, a child, a mode, or added a hook to a module that it reads through. Else another plan is
made, up to a limit, or the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from ..layers import HOOKS, watched
from ..tracing import transforms_active
from .dataflow import written
from .fuse import fuse
from .reading import value
from .report import Add
from .trace import CannotTrace, ExampleTracer, current_state, trace

MOST = 8  # plans a module: further kinds of arguments run its own forward
_PLAIN = (Tensor, nn.Parameter)
_SIMPLE = (int, float, str, bool, type(None), torch.dtype, torch.device)


def flat_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's arguments as a flat list, and their structure (None: there is none)."""
    flat = [*args, *kwargs.values()]
    if any(isinstance(v, (tuple, list, dict)) for v in flat):
        return tree_flatten((args, kwargs))
    return flat, (len(args), *kwargs)


_INTERNAL = nn.Module().__dict__.keys() - {"training"}  # of every module


class _Modules:
    """The modules that a plan reads through, as they were: settings, children, hooks, classes."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.inner = modules[1:]  # hooks on the first one are called before its forward is
        own = [m.__dict__ for m in modules]
        names = [[name for name in d if name not in _INTERNAL] for d in own]
        self.settings = [
            (itemgetter(*names), d) for names, d in zip(names, own, strict=True) if names
        ]
        self.dicts = own
        self.children = [m._modules for m in modules if m._modules]
        self.hooks = [m.__dict__[name] for m in self.inner for name in HOOKS]
        absent = [(m._parameters, name) for m in modules for name in m._parameters]
        self.absent = [(d, name) for d, name in absent if d[name] is None]
        self.seen = self._facts()
        self.hooked = any(self.hooks)
        self.names = [dict(d) for d in self.children]

    def _facts(self) -> tuple[list[Any], ...]:
        settings = [get(d) for get, d in self.settings]
        return settings, list(map(len, self.dicts)), list(map(type, self.inner))

    def same(self) -> bool:
        try:
            return (
                self._facts() == self.seen
                and self.children == self.names
                and any(self.hooks) == self.hooked
                and all(d[name] is None for d, name in self.absent)
            )
        except (KeyError, RuntimeError, ValueError):  # one less; tensors that are not the same one
            return False


@dataclass
class Plan:
    """One fused forward; `call` is None where there is nothing to fuse, and the reason known."""

    structure: Any
    arguments: list[Any]  # a Tensor's dtype, device and sizes (None: free), else the value
    equal: list[tuple[int, int, int, int]]  # sizes of two tensors that must agree
    state: tuple[Any, ...]
    modules: _Modules
    fetch: list[tuple[dict[str, Any], str]]
    call: Callable[..., Any] | None
    adds: list[Add]
    why_not: str | None = None

    def holds(self, flat: list[Any], structure: Any, state: tuple[Any, ...]) -> bool:
        if structure != self.structure or state != self.state or len(flat) != len(self.arguments):
            return False
        for v, known in zip(flat, self.arguments, strict=True):
            if isinstance(known, _Sizes):
                if not known.fit(v):
                    return False
            elif type(v) is not type(known) or v != known:
                return False
        if any(flat[i].shape[d] != flat[j].shape[e] for i, d, j, e in self.equal):
            return False
        return self.modules.same()

    def run(self, flat: list[Any]) -> Any:
        assert self.call is not None
        tensors = [v for v in flat if isinstance(v, Tensor)]
        return self.call(*tensors, *[d[name] for d, name in self.fetch])


@dataclass
class _Sizes:
    dtype: torch.dtype
    device: torch.device
    rank: int
    fixed: list[tuple[int, int]]

    def fit(self, t: Any) -> bool:
        return (
            type(t) in _PLAIN
            and t.dtype is self.dtype
            and t.dim() == self.rank
            and t.device == self.device
            and all(t.shape[d] == size for d, size in self.fixed)
        )


def _arguments(flat: list[Any], fakes: dict[int, Any]) -> tuple[list[Any], list[Any]]:
    """What is to hold for arguments: of each, and of sizes that go by the same symbol."""
    known: list[Any] = []
    places: dict[str, tuple[int, int]] = {}
    equal = []
    for i, v in enumerate(flat):
        if not isinstance(v, Tensor):
            known.append(v)
            continue
        sizes = fakes[i].shape if i in fakes else v.shape
        fixed = [(d, size) for d, size in enumerate(sizes) if isinstance(size, int)]
        known.append(_Sizes(v.dtype, v.device, v.dim(), fixed))
        for d, size in enumerate(sizes):
            if not isinstance(size, int):
                j, e = places.setdefault(str(size), (i, d))
                if (j, e) != (i, d):
                    equal.append((i, d, j, e))
    return known, equal


def _lift(graph: Graph, root: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Parameters become arguments of the graph; returns where each call finds them."""
    fetch: list[tuple[dict[str, Any], str]] = []
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
            fetch.append((inside, attribute))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before():
                found[name] = graph.placeholder(f"p{len(fetch)}")
            found[name].meta = dict(node.meta)
            last.append(found[name])
        node.replace_all_uses_with(found[name])
        graph.erase_node(node)
    return fetch


def make_plan(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    when: str,
    opaque: Callable[[nn.Module], bool],
) -> Plan:
    """A plan for a call like this; one without `call` where its forward cannot be read."""
    flat, structure = flat_arguments(args, kwargs)
    leaves, tree = tree_flatten((args, kwargs))
    state, seen = current_state(), _Modules([root])
    fakes: dict[int, Any] = {}
    call, adds, why, fetch = None, [], None, []
    try:
        others = [v for v in leaves if not isinstance(v, _SIMPLE) and type(v) not in _PLAIN]
        if others:
            raise CannotTrace(f"it is given a {type(others[0]).__name__}")
        before = _Modules(list(root.modules()))
        graph, tracer = trace(root, leaves, tree, opaque)
        if not before.same():
            raise CannotTrace("it changes attributes of its modules")
        if len(leaves) == len(flat):
            fakes = _fakes(tracer, graph)
        seen = _Modules(tracer.through)
        graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output", "call_module") or bool(written(n))
        )
        fetch = _lift(graph, root)
        leaf = {str(n.target): n.target for n in graph.nodes if n.op == "call_module"}
        modules = {name: root.get_submodule(name) for name in leaf}
        module = GraphModule(modules, graph)
        adds = fuse(module, when)
        call = module.forward if any(add.fused for add in adds) else None
    except CannotTrace as error:
        why = str(error)
    arguments, equal = _arguments(flat, fakes)
    return Plan(structure, arguments, equal, state, seen, fetch, call, adds, why)


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

    def find(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """The plan that holds for a call, made now if there are not yet too many."""
        flat, structure = flat_arguments(args, kwargs)
        state = current_state()
        for plan in self.plans:
            if plan.modules.modules[0] is root and plan.holds(flat, structure, state):
                return plan
        if len(self.plans) >= MOST or any(
            isinstance(v, Tensor) and type(v) not in _PLAIN for v in flat
        ):
            return None
        self.plans.append(make_plan(root, args, kwargs, self.when, is_planned))
        return self.plans[-1]


def is_planned(module: nn.Module) -> bool:
    return "_fusedres_plans" in module.__dict__


class Planned:
    """Mixed into a converted module's class: the same module, whose forward goes by plans."""

    _fusedres_kind: Any  # the class that it had

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = None
        if not (is_compiling() or transforms_active() or watched() or torch.jit.is_tracing()):
            own = self.__dict__
            if "_fusedres_plans" in own and "_is_replica" not in own:  # of nn.DataParallel
                plan = own["_fusedres_plans"].find(self, args, kwargs)
        if plan is None or plan.call is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return plan.run(flat_arguments(args, kwargs)[0])

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
