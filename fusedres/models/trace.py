"""torch.fx with example values: a module's forward as a graph whose nodes know shapes and dtypes.

torch.fx alone stops where a forward asks its input anything. Here every proxy carries a fake tensor
or a number, so such questions have answers, and what was answered is what the graph holds for:
dtypes, devices, ranks, and sizes where they were asked for.
"""

from __future__ import annotations

import builtins
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.utils._pytree import tree_unflatten

from ..layers import hooked
from .guard import Modules
from .reading import value


class CannotTrace(Exception):
    """A forward does what a graph cannot hold; the message says what and where."""


_KNOWN_OF_TENSORS = {
    *("dtype", "device", "layout", "is_cuda", "ndim", "is_nested", "is_sparse", "is_meta"),
    *("dim", "is_floating_point", "is_complex", "ndimension"),
}
_BY_VALUES = ("GuardOnDataDependentSymNode", "DataDependentOutputException")  # fake tensors'
_NOT_KNOWN = {"requires_grad", "data", "grad", "is_contiguous", "stride", "grad_fn", "is_leaf"}


class _Proxy(Proxy):
    """Answers what its example value knows."""

    def __getattr__(self, name: str) -> Any:
        v = value(self.__dict__.get("node"))
        if name.startswith("_"):
            raise AttributeError(name)
        if not isinstance(v, Tensor):
            return super().__getattr__(name)
        if name in _KNOWN_OF_TENSORS:
            return getattr(v, name)
        if name in _NOT_KNOWN:
            raise CannotTrace(f"it asks for .{name} of a tensor")
        if not callable(getattr(v, name)):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __len__(self) -> int:
        v = value(self.node)
        return int(v.shape[0]) if isinstance(v, Tensor) else len(v)

    def __index__(self) -> int:
        return int(value(self.node))

    __int__ = __index__

    def __float__(self) -> float:
        return float(value(self.node))


_isinstance = isinstance
_OWN = ("torch.", "fusedres.")  # whose own code goes by what a proxy is


def _is_instance(thing: Any, kinds: Any) -> bool:
    """isinstance for a model's code, to which the proxy of a tensor is a tensor."""
    if _isinstance(thing, kinds):
        return True
    if type(thing) is not _Proxy or not _isinstance(value(thing.node), Tensor):
        return False
    asks = sys._getframe(1).f_globals.get("__name__", "")
    return not asks.startswith(_OWN) and issubclass(Tensor, kinds)


@contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    """Not by their __class__, which C++ would believe."""
    builtins.isinstance = _is_instance
    try:
        yield
    finally:
        builtins.isinstance = _isinstance


class _Kept:
    """What a model's modules hold: a forward that is read may assign what only stands for it."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.modules = Modules(modules)
        self.buffers = [(m._buffers, dict(m._buffers)) for m in modules]
        self.dicts = [(m.__dict__, dict(m.__dict__)) for m in modules]

    def put_back(self) -> bool:
        """Whether something had changed; now it has not."""
        try:
            changed = self.modules.find([]) is None
        except Exception:  # comparisons of what only stands for a value
            changed = True
        for now, before in self.buffers:
            changed |= list(now) != list(before) or any(now[k] is not before[k] for k in before)
        if changed:
            for now, before in (*self.buffers, *self.dicts):
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)
        return changed


# Private to torch, hence the getattr.
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def current_state() -> tuple[Any, ...]:
    """Gradients and autocast: what else a forward goes by."""
    if not _any_autocast():
        return torch.is_grad_enabled(), False, False
    return torch.is_grad_enabled(), *(
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        for kind in ("cpu", "cuda")
    )


def _is_constant(v: Any) -> bool:
    """Whether it is a number, or numbers, that hold whatever the sizes are."""
    if isinstance(v, (tuple, list)):
        return all(map(_is_constant, v))
    return isinstance(v, (bool, int, float, torch.dtype, torch.device)) or v is None


def callable_as_is(module: nn.Module) -> bool:
    """Whether to call the module does what its class's forward does and nothing else."""
    return "forward" not in module.__dict__ and not hooked(module.__dict__)


class ExampleTracer(Tracer):
    """Reads a module's forward through every submodule but those that must be called: `opaque`
    ones, and those that have hooks or a forward of their own.

    `flat` are its arguments as a flat list, `tree` their structure. `sizes`: "free" lets every
    dimension but the last of an argument be another one next time (equal ones equal), "fixed" none.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, flat: list[Any], tree: Any, sizes: str, opaque: Callable[[nn.Module], bool]
    ) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.flat, self.tree, self.opaque = flat, tree, opaque
        # these two, and what _argument imports, take seconds to import
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.shapes = ShapeEnv(duck_shape=True)
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.free = sizes == "free"
        self.through: list[nn.Module] = []
        self.calling: list[nn.Module] = []
        self.running, self.state = False, current_state()

    # what torch.fx calls

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        self.through.append(self.root)
        self.calling.append(self.root)
        flat = [
            self._argument(i, v) if isinstance(v, Tensor) else v for i, v in enumerate(self.flat)
        ]
        args, kwargs = tree_unflatten(flat, self.tree)
        kind = getattr(self.root, "_fusedres_kind", type(self.root))  # of a converted module
        return (lambda: kind.forward(self.root, *args, **kwargs)), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.opaque(m) or not callable_as_is(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        if not self.is_leaf_module(m, ""):
            self.through.append(m)
        self.calling.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.calling.pop()  # not where it failed: `calling` then tells where
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and type(a) is not nn.Parameter:  # would stay the same one
            raise CannotTrace("it makes a tensor of its own")
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, *call: Any, **more: Any) -> Any:
        if current_state() != self.state:
            raise CannotTrace("it switches autocast or gradients")
        proxy = super().create_proxy(kind, target, *call, **more)
        if kind != "placeholder":
            v = proxy.node.meta["val"] = self._value(proxy.node)
            if kind in ("call_function", "call_method") and _is_constant(v):
                return v
        return proxy

    def to_bool(self, obj: Proxy) -> bool:
        if isinstance(value(obj.node), Tensor):
            raise CannotTrace("it decides by the values of a tensor")
        return bool(value(obj.node))

    def iter(self, obj: Any) -> Iterator[Any]:
        return (obj[i] for i in range(len(obj)))

    # the values

    def _argument(self, i: int, t: Tensor) -> Proxy:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        proxy = self.create_proxy("placeholder", f"in{i}", (), {})
        dims = [DimDynamic.DYNAMIC if self.free else DimDynamic.STATIC] * (t.dim() - 1)
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[*dims, DimDynamic.STATIC][: t.dim()], constraint_sizes=[None] * t.dim()
        )
        source = ConstantSource(f"in{i}")
        proxy.node.meta["val"] = self.mode.from_tensor(t, source=source, symbolic_context=context)
        return proxy

    def _value(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        self.running = True
        try:
            if node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                return self.mode.from_tensor(
                    getattr(self.root.get_submodule(owner), name), static_shapes=True
                )
            with self.mode:
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                if node.op == "call_module":
                    return self.root.get_submodule(str(node.target))(*args, **kwargs)
                function: Any = node.target
                return function(*args, **kwargs)
        finally:
            self.running = False

    @property
    def asked(self) -> bool:
        """Whether the forward, or an op, asked for a size that is free."""
        return bool(self.shapes.guards) or bool(self.shapes.replacements)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of what fake tensors could not do: that is an answer, no failure."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _told(error: BaseException) -> str:
    if type(error).__name__ in _BY_VALUES:
        return "it decides by the values of a tensor"
    return str(error).splitlines()[0]


def _where(error: BaseException) -> str:
    """The line of the model that an error came from."""
    ours = ("/torch/", "/fusedres/models/")
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not any(folder in f.filename for folder in ours)
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" at {frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"


def trace(
    module: nn.Module, flat: list[Any], tree: Any, opaque: Callable[[nn.Module], bool]
) -> tuple[Graph, ExampleTracer]:
    """The graph of one module's forward, which calls submodules that cannot be traced.

    Raises CannotTrace if its own forward cannot.
    """
    shut: set[nn.Module] = set()
    sizes = "free"
    while True:
        tracer = ExampleTracer(flat, tree, sizes, lambda m: m in shut or opaque(m))
        drawn, kept = (torch.get_rng_state(), random.getstate()), _Kept(module)
        try:
            with _quiet(), _proxies_are_tensors():
                graph = tracer.trace(module)
        except Exception as error:  # whatever a model's code raises at what it is given
            culprit = tracer.calling[-1] if tracer.calling else module
            if sizes == "free" and not isinstance(error, CannotTrace):
                sizes = "fixed"
            elif culprit is module or culprit in shut:
                raise CannotTrace(f"{_told(error)}{_where(error)}") from None
            else:
                shut.add(culprit)
            continue
        finally:
            changed = kept.put_back()
        if changed:
            raise CannotTrace("it changes attributes of its modules")
        if not torch.equal(drawn[0], torch.get_rng_state()) or drawn[1] != random.getstate():
            torch.set_rng_state(drawn[0])
            random.setstate(drawn[1])
            raise CannotTrace("it draws random numbers of its own")
        if sizes == "free" and tracer.asked:
            sizes = "fixed"
            continue
        return graph, tracer
