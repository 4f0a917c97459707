"""`explain`: what a layer's call will do, said before it runs, and what is not fused and why."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from textwrap import indent
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..backends import LOOPS, environment_backend, plan
from ..chain import Way, rows_told
from ..functional import composite_only, fused_residual
from ..glu import why_not_one_pass
from ..layers import customised, first_parameter, watched
from ..links import links_of, unchained
from ..mlp import FusedResidualMLP
from ..modules import FusedResidual
from ..network import JOINED, FusedSequential
from ..reference import Residual
from ..spec import Spec, make_spec
from ..stack import FusedResidualStack
from .calls import Call, Context
from .choice import choose, unless_away

SPANS = 6  # of layers that say the same; of more their number is told
MANY = 1 << 62  # rows, of which no layer is small
_LINEAR = make_spec("linear", None, None)


@dataclass(frozen=True)
class Explanation:
    """The calls that a layer makes, in order, and what is not fused; print it."""

    title: str
    calls: tuple[Call, ...]
    notes: tuple[str, ...]

    @property
    def backend(self) -> str:
        """Of the last call, the layer's own."""
        return self.calls[-1].backend

    @property
    def saved_bytes(self) -> int | None:
        """Of all calls; a tensor that two calls save counts twice. None: torch decides."""
        total = 0
        for call in self.calls:
            if call.saved is None:
                return None
            total += sum(call.saved.values())
        return total

    def __str__(self) -> str:
        notes = (f"note: {note}" for note in self.notes)
        return "\n".join([self.title, *self._body(), *notes])

    def _body(self) -> Iterable[str]:
        return map(str, self.calls)


@dataclass(frozen=True)
class NetworkExplanation(Explanation):
    """Of a network: its layers' own, by name. Printed, what layers have in common is said once."""

    layers: dict[str, Explanation]
    names: tuple[str, ...]  # of all its modules

    def _body(self) -> Iterable[str]:
        told = ((name, str(layer)) for name, layer in self.layers.items())
        for place, text in _said_once(told, self.names):
            head = f"layer {place}:" if place in self.names else f"layers {place}: each a"
            yield f"{head} {indent(text, '  ').strip()}"


def _said_once(
    told: Iterable[tuple[str, str]], names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """What is told of modules by name, each text once with the places where it holds."""
    index, places = {name: i for i, name in enumerate(names)}, dict[str, list[int]]()
    for name, text in told:
        places.setdefault(text, []).append(index[name])
    for text, found in places.items():
        ends = [i for i in found if i + 1 not in found]
        starts = [i for i in found if i - 1 not in found]
        spans = [
            names[a] if a == b else f"{names[a]} to {names[b]}"
            for a, b in zip(starts, ends, strict=True)
        ]
        if len(spans) > SPANS:
            spans = [f"{len(found)} of {names[found[0]]} to {names[found[-1]]}"]
        yield ", ".join(spans), text


def explain(
    layer_or_call: Any,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> Explanation:
    """Which backend, kernel, tiles and launches ``layer_or_call(x, residual)`` would use, and why.

    Nothing runs and nothing changes: no counter of a batch norm, no random state.

    Args:
        layer_or_call: a FusedResidual, FusedResidualMLP or Residual,
            ``functools.partial(fused_residual, weight=..., ...)``; or a FusedSequential, an
            nn.Sequential with such layers or a FusedResidualStack: then the calls are their layers'
            own, of a stack the last one's, and notes tell which of them one call joins.
        x: (..., K), the call's input; a meta tensor will do, then the layer's device counts.
        residual: (..., R), if the call has one.
        device: explain the call as if on this device, for example "cuda" on a machine without one.

    Returns an ``Explanation``; print it, or read ``.backend``, ``.calls``, ``.saved_bytes``, and of
    a network ``.layers``, a dict. Printed, layers that say the same are told once.

    Raises TypeError for anything else than these calls, and what the call itself would raise for
    arguments that do not fit or a backend that cannot run it.
    """
    call = layer_or_call
    checks.check_tensor("x", x)
    checks.check_dense("x", x)
    checks.check_tensor("residual", residual, optional=True)
    if isinstance(call, partial) and call.func is fused_residual:
        keywords = {**call.keywords, **({} if residual is None else {"residual": residual})}
        bound = inspect.signature(fused_residual).bind(*call.args, x, **keywords)
        bound.apply_defaults()
        a = bound.arguments
        tensors = [t for t in a.values() if isinstance(t, Tensor)]
        context = _context(x, a["weight"], tensors, device, a["residual"])
        calls, notes = _of_function(context, **a)
        title = "fused_residual"
    elif isinstance(call, FusedResidualMLP):
        tensors = [x, *call.parameters()]
        context = _context(x, _weight(call.fc1), tensors, device, residual)
        calls, notes = _of_mlp(context, call, x.shape[-1], _features(residual))
        if residual is None and context.device.type == "cpu" and _joins(call, x):
            notes.append("one op runs both calls")
        title = "FusedResidualMLP"
    elif isinstance(call, Residual):
        tensors = [x, *call.parameters()]
        context = _context(x, _weight(call), tensors, device, residual)
        calls, notes = _of_layer(context, call, x.shape[-1], _features(residual))
        title = type(call).__name__
    elif _is_network(call):
        return _of_network(call, x, device)
    elif isinstance(call, FusedResidualStack):
        return _of_stack(call, x, device)
    else:
        raise TypeError(
            f"fusedres.explain: expected a FusedResidual, FusedResidualMLP or Residual layer, a "
            f"FusedSequential, an nn.Sequential with such layers, a FusedResidualStack or "
            f"functools.partial(fused_residual, weight=...), got {_came(call)}"
        )
    title = f"{title} on x {tuple(x.shape)}, {x.dtype}, {context.device}"
    return Explanation(title, tuple(calls), (*notes, *_notes(context, x)))


def _is_network(call: Any) -> bool:
    """Whether it calls its modules one after another, and explain knows one of them."""
    plain = isinstance(call, nn.Sequential) and type(call).forward is nn.Sequential.forward
    return isinstance(call, FusedSequential) or (plain and any(map(_known, call)))


def _known(module: Any) -> bool:
    layers = (Residual, FusedResidualMLP, FusedResidualStack)
    return isinstance(module, layers) or _is_network(module)


def _came(call: Any) -> str:
    """Its class and, where it has a layer inside, how to ask for that one."""
    inside = call.named_modules() if isinstance(call, nn.Module) else ()
    name = next((name for name, module in inside if _known(module)), None)
    advice = f"; explain a layer of it with what it gets, get_submodule({name!r}) say"
    return type(call).__name__ + (advice if name else "")


def _of_network(
    net: nn.Sequential, x: Tensor, device: torch.device | str | None
) -> NetworkExplanation:
    """Of the layers that explain knows. Which of them a FusedSequential joins its chains tell."""
    layers: dict[str, Explanation] = {}
    title = f"{type(net).__name__} on x {tuple(x.shape)}, {x.dtype}, {x.device}"
    names, joins = tuple(net._modules), isinstance(net, FusedSequential)
    notes = ["modules are called one by one; a FusedSequential calls layers in a row at once"]
    if isinstance(net, FusedSequential):
        chains = [(place, text) for place, _, text in (s.partition(": ") for s in net.chains(x))]
        alone = ((place, text) for place, text in chains if place in names)
        places = {text: place for place, text in _said_once(alone, names)}
        told = (f"{places.get(text, place)}: {text}" for place, text in chains)
        notes = list(dict.fromkeys(told))
    for name, module in net._modules.items():
        if _known(module):
            own = explain(module, x, device=device)
            layers[name] = replace(own, notes=()) if joins and type(module) in JOINED else own
        x = x.new_empty(()).expand(*x.shape[:-1], _width(module, x.shape[-1]))
    calls = tuple(call for layer in layers.values() for call in layer.calls)
    return NetworkExplanation(title, calls, tuple(notes), layers, names)


def _width(module: Any, features: int) -> int:
    """How many features it gives of so many: its `out_features`, else as many."""
    for child in module if isinstance(module, nn.Sequential) else ():
        features = _width(child, features)
    return int(getattr(module, "out_features", features))


def _joins(block: FusedResidualMLP, x: Tensor) -> bool:
    parts, rows = block.parts(), torch.empty((), dtype=x.dtype).expand(x.shape)
    return bool(parts) and unchained(rows) is None and len(links_of(parts or [], rows)) == 2


def _of_stack(
    stack: FusedResidualStack, x: Tensor, device: torch.device | str | None
) -> Explanation:
    """Of its last layer, and whether one call joins all."""
    block = stack.layers_per_block
    last = stack[-block:].to_layers()[-1]
    told = explain(last, x, x if block > 1 else None, device=device)
    where = torch.device(device) if device else (stack.weight if x.is_meta else x).device
    way: Way | str = f"on {where.type} layers are not joined"
    if where.type == "cpu":
        plain = torch.empty((), dtype=x.dtype).expand(x.shape)
        way = stack.why_not_joined(plain) or Way()
    elif where.type == "cuda":
        way = _way_on_a_gpu(stack, x, where)
    how = f"all in {way}" if isinstance(way, Way) else f"one by one: {way}"
    if where.type == "cuda" and isinstance(way, Way) and not way.loop:
        sums = stack.gate_kind == "scalar" or (stack.gate_kind and block > 1)
        how += ", one launch forward, three backward" + " and the gates' sums" * bool(sums)
    title = f"FusedResidualStack of {len(stack)} layers, of which the last is a {told.title}"
    return Explanation(title, told.calls, (f"layers run {how}", *told.notes))


def _way_on_a_gpu(stack: FusedResidualStack, x: Tensor, device: torch.device) -> Way | str:
    """The stack's own for x there, also on a GPU that is not here."""
    if x.device == device:
        return stack._way(x, stack._given())
    from ..backends import chain as triton_chain  # which imports Triton, if it is there

    N, M = x.shape[-1], math.prod(x.shape[:-1])
    there: Any = SimpleNamespace(dtype=x.dtype, device=device)
    given = stack._given()
    try:
        _, last, product = stack._typed(there, given[0].dtype)
    except TypeError:
        return f"weight is {given[0].dtype}, x {x.dtype}"
    text = stack._text(there, given)
    most = triton_chain.most_rows(text, product, N, N, plan.device_of(device))
    asked = environment_backend() if stack.backend == "auto" else stack.backend
    if asked in ("auto", "triton") and isinstance(most, int) and most >= M:
        return Way()
    backend = choose(stack.backend, Spec.parse(last), product, device, MANY, N, N).backend
    if backend not in LOOPS:
        return f"the backend is '{backend}'"
    return Way(backend, most if isinstance(most, str) else rows_told(most))


def _context(
    x: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    device: torch.device | str | None,
    residual: Tensor | None,
) -> Context:
    if x.dim() == 0:
        checks.check_x(x, weight.shape[-1])
    where = torch.device(device) if device else (weight if x.is_meta else x).device
    return Context(
        rows=tuple(x.shape[:-1]),
        x_dtype=x.dtype,
        weight_dtype=weight.dtype,
        device=where,
        composite=composite_only(x, weight),
        grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        residual_dtype=None if residual is None else residual.dtype,
    )


def _weight(layer: Any) -> Tensor:
    first = first_parameter(layer.linear)
    return layer.linear.weight if first is None else first


def _features(t: Tensor | None) -> int | None:
    return None if t is None else t.shape[-1]


def _notes(context: Context, x: Tensor) -> list[str]:
    notes: list[str] = []
    if context.composite:
        notes.append("a function transform or tensor subclass is active: torch operations run")
    else:
        notes.append("torch.func transforms, forward AD and double backward run torch operations")
    if context.device.type == "cuda" and not torch.cuda.is_available():
        notes.append("no GPU is here: this is what a machine with one would run")
    if context.dtype != context.weight_dtype:
        notes.append(f"autocast casts the weight and the bias to {context.dtype} first")
    if x.dim() > 2 and not x.is_contiguous():
        notes.append("x may be copied first: its leading dimensions are flattened to rows")
    return notes


def _of_layer(
    context: Context, layer: Residual, K: int, residual: int | None, name: str = "layer"
) -> tuple[list[Call], list[str]]:
    """The calls of one layer for x of K features and a residual of `residual` features."""
    calls, notes, text = [], [], "x" if residual is None else "residual"
    if layer.in_features != K:
        checks.check_x(torch.empty(*context.rows, K, device="meta"), layer.in_features)
    eager = layer.not_fused() if isinstance(layer, FusedResidual) else "a Residual always does"
    if eager is not None:
        notes.append(f"{name} runs stage by stage through its submodules: {eager}")
    shortcut: Any = layer.shortcut
    skipped = layer._default_shortcut and residual == layer._sum_features
    if shortcut is not None and layer.spec.adds and not skipped:
        source = K if residual is None else residual
        residual = layer._sum_features
        called = customised(shortcut, "linear") or watched()
        if called is None:
            plain = not isinstance(layer, FusedResidual)
            calls.append(_linear_shortcut(context, shortcut, source, layer.backend, plain))
            notes.append("the linear shortcut is a call of its own, before the layer's")
        else:
            notes.append(f"the shortcut runs on its own before the layer's call: {called}")
        context = replace(context, residual_dtype=context.dtype)
        text = f"shortcut({text})"
    pad = layer.shortcut_kind == "pad"
    calls.append(
        context.call(
            name,
            _spec_now(layer),
            K,
            layer.out_features,
            layer.backend,
            bias=getattr(layer.linear, "bias", None) is not None,
            residual=residual,
            shortcut=f"pad({text})" if pad else text,
            pad=pad,
            eager=eager is not None,
        )
    )
    return calls, notes


def _spec_now(layer: Residual) -> Spec:
    """The recipe that a call would use: a batch norm has a mode of its own, as in torch."""
    norm: Any = layer.norm
    if layer.spec.norm != "batch" or type(norm) is not nn.BatchNorm1d:
        return layer.spec
    return layer.spec.with_batch_stats(norm.training or norm.running_mean is None)


def _linear_shortcut(
    context: Context, shortcut: Any, source: int, backend: str, eager: bool = False
) -> Call:
    K, N, bias = shortcut.in_features, shortcut.out_features, shortcut.bias is not None
    checks.check_shortcut_input(torch.empty(*context.rows, source, device="meta"), K)
    return context.call("shortcut", _LINEAR, K, N, backend, bias=bias, eager=eager)


def _of_mlp(
    context: Context, mlp: FusedResidualMLP, K: int, residual: int | None
) -> tuple[list[Call], list[str]]:
    calls, notes = _of_layer(context, mlp.fc1, K, None, "fc1")
    hidden = context.typed(_spec_now(mlp.fc1))[2]
    third = context.residual_dtype or context.x_dtype
    shortcut: Any = mlp.shortcut
    if mlp.adds and shortcut is None:
        residual = K if residual is None else residual
    elif mlp.adds and not (mlp._default_shortcut and residual == mlp.out_features):
        source = K if residual is None else residual
        residual = mlp.out_features
        called = customised(shortcut, "linear") or watched()
        if called is None:
            calls.insert(0, _linear_shortcut(context, shortcut, source, mlp.backend))
        notes.append(f"the shortcut is a call of its own{f': {called}' if called else ''}")
        third = context.dtype
    context = replace(context, x_dtype=hidden, residual_dtype=third)
    if mlp.glu:
        call = mlp._activation, mlp.backend, context.device, hidden
        why_not = unless_away(context.device, why_not_one_pass, *call)
        how = (
            f"plain torch ops: {why_not}"
            if why_not
            else "one pass each way, for which what fc1 gives is kept"
        )
        notes.append(f"the gated linear unit between the matmuls is {how}")
    more, more_notes = _of_layer(context, mlp.fc2, mlp.hidden_features, residual, "fc2")
    return calls + more, [*notes, *more_notes, "two matmuls are two calls, fc1 and fc2"]


def _of_function(
    context: Context, *, weight: Tensor, gate: Tensor | None, residual: Tensor | None, **a: Any
) -> tuple[list[Call], list[str]]:
    kind = None if gate is None else "scalar" if gate.numel() == 1 else "channel"
    training = a["training"] or (a["norm"] == "batch" and a["running_mean"] is None)
    rates = (a["dropout"], a["drop_path"]) if a["training"] else (0.0, 0.0)
    spec = make_spec(
        a["order"],
        a["norm"],
        a["activation"],
        kind,
        a["eps"],
        *rates,
        a["residual_scale"],
        training,
    )
    calls, notes = [], []
    features, text, (N, K) = (
        _features(residual),
        "x" if residual is None else "residual",
        weight.shape,
    )
    checks.check_x(a["x"], K)
    if a["shortcut_weight"] is not None:
        source = K if features is None else features
        features, width = a["shortcut_weight"].shape
        linear = nn.Linear(width, features, a["shortcut_bias"] is not None, device="meta")
        calls.append(_linear_shortcut(context, linear, source, a["backend"]))
        notes.append("the linear shortcut is a call of its own, before the layer's")
        context, text = replace(context, residual_dtype=context.dtype), f"shortcut({text})"
    calls.append(
        context.call(
            "layer",
            spec,
            K,
            N,
            a["backend"],
            bias=a["bias"] is not None,
            residual=features,
            shortcut=text,
            pad=a["shortcut"] == "pad",
        )
    )
    return calls, notes
