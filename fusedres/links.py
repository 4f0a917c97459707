"""Layers as links of a chain: whether they can be joined for a call, in few look-ups a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import is_ as _is
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends, chain, graphs
from .chain import Link, Running
from .checks import DTYPES
from .dtypes import typed, y_dtype
from .functional import PLAIN, composite_only, update_by_batch
from .layers import customised, hooked, parameter, watched, weight_and_bias
from .modules import FusedResidual, batch_norm_step, must_be_called
from .reference import asked_of, rows_per_sample
from .spec import Spec
from .tracing import transforms_active

_modes = torch._C._len_torch_dispatch_stack
LARGEST = 1 << 18  # elements of a weight: those for which our own product is the best anywhere
NARROW = 1 << 16  # the same in a block of two matmuls
_OF_FEW_ROWS = 1 << 15  # the same for fewer than 8 rows: larger ones take longer to be packed


def too_large(weight: Any, x: Tensor) -> bool:
    """Whether the library multiplies x (..., K) and a weight of this shape better than a chain."""
    size = weight[0] * weight[1]
    return size > LARGEST or (size > _OF_FEW_ROWS and x.numel() < 8 * x.shape[-1])


def unchained(x: Tensor, in_graphs: bool = False) -> str | None:
    """Why no layers can be joined for x; None if they can. `in_graphs`: the call is one that
    torch.compile and torch.export keep as an op.
    """
    compiling, exporting = is_dynamo_compiling(), is_exporting()
    if in_graphs and (compiling or exporting):
        if transforms_active() or (not compiling and graphs.wants_plain_ops(exporting)):
            return "a transform looks into the layers, or a tool that knows torch's ops alone"
    elif compiling or exporting or graphs.wants_plain_ops(False) or _modes():
        return "something looks into the call: a tracer, or a torch dispatch mode"
    elif type(x) not in PLAIN or composite_only(x, x):
        return "a transform looks into the layers, or x is a tensor of another kind"
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on {x.device}; layers are joined on a CPU or a CUDA GPU"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
    if x.is_nested or x.layout != torch.strided:
        return "x is not dense"
    return None if x.dim() and x.numel() else f"x has shape {tuple(x.shape)}"


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes products of on `device`, "cpu" say, if it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _Known(NamedTuple):
    """A layer's link, and what it was made from."""

    link: Link
    width: int  # N
    dtype: torch.dtype  # y's
    size: int  # of the weight
    asked: Any  # what the layer's recipe was made from; another object once a setting changed
    training: bool
    eps: float | None
    linear: Any
    norm: Any
    kinds: tuple[Any, ...]  # classes, the backend asked for, `back`, device and dtypes
    parameters: tuple[Any, ...]
    batch: tuple[Any, ...]  # of a batch norm
    shape: Any  # of the weight
    weight: torch.dtype


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_CLASSES = (FusedResidual, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)
_FORWARDS = [kind.forward for kind in _CLASSES]


def _parameters(linear: Any, norm: Any, module: Any) -> tuple[Any, ...]:
    """Those that are no more than parameters: weight and bias of both, gate."""
    p, q = linear._parameters, {} if norm is None else norm._parameters
    gate = module._parameters.get("gate")
    return p.get("weight"), p.get("bias"), q.get("weight"), q.get("bias"), gate


def _batch(norm: Any) -> tuple[Any, ...]:
    """What a batch norm's call depends on beside its parameters and eps."""
    if type(norm) is not nn.BatchNorm1d:
        return ()
    own = norm.__dict__
    mean, var, count = map(own["_buffers"].get, _BUFFERS)
    return mean, var, count, own["training"], own["momentum"], own["track_running_stats"]


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Stream(NamedTuple):
    """What a link gets: x, or what a link before gives."""

    width: int
    dtype: torch.dtype
    residual: torch.dtype | None = None  # of what its `add` takes, if that is an earlier input


def _as_known(
    module: nn.Module, x: Tensor, stream: Stream, back: int, autocast: torch.dtype | None
) -> _Known | None:
    """What is known of a layer, if nothing has changed that Python alone can see: the op checks
    shapes, dtypes and devices. In a few dictionary look-ups, since nets have many layers.
    """
    known = _known.get(module)
    if known is None:
        return None
    own = module.__dict__
    linear, norm = own["_modules"].get("linear"), own["_modules"].get("norm")
    if linear is not known.linear or norm is not known.norm or own["_asked"] is not known.asked:
        return None
    if own["_modules"].get("shortcut") is not None:
        return None
    for owner in (own, linear.__dict__) if norm is None else (own, linear.__dict__, norm.__dict__):
        if hooked(owner) or "forward" in owner:
            return None
    found = _parameters(linear, norm, module)
    kinds = type(linear), type(norm), own["backend"], back, x.device, stream[1:], autocast
    if not all(map(_is, found, known.parameters)) or kinds != known.kinds:
        return None
    if known.batch and not all(map(_is, _batch(norm), known.batch)):
        return None
    weight, shape = found[0], known.shape
    if weight.dtype is not known.weight or weight.shape != shape or stream[0] != shape[1]:
        return None
    if own["training"] is not known.training or (norm is not None and norm.eps != known.eps):
        return None
    return known


def _computed(owner: Any, *names: str) -> bool:
    """Whether one of them is neither a parameter nor a plain attribute."""
    return any(name not in owner._parameters and name not in owner.__dict__ for name in names)


def typed_link(
    spec: Spec,
    operands: tuple[Tensor | None, ...],
    running: Running | None,
    x: Tensor,
    stream: Stream,
    back: int = 0,
    input_back: int = 0,
    backend: str = "auto",
) -> tuple[Link, Stream] | str:
    """A layer's tensors as a link in the dtypes of its call, and what it gives; or why not.

    `operands`: weight, bias, norm_weight, norm_bias, gate, running_mean, running_var, of shapes
    that fit; where `spec` goes by the batch's statistics, the last two are what `running` updates.
    """
    weight, bias, norm_weight, norm_bias, gate, mean, var = operands
    given = [t for t in operands if t is not None]
    if weight is None or any(type(t) not in PLAIN or t.device != x.device for t in given):
        return "a parameter is a tensor of another kind, or on another device than x"
    width, dtype, residual = stream
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype is not weight.dtype):
        return f"its weight is {weight.dtype}, its bias {getattr(bias, 'dtype', None)}"
    autocast = autocast_dtype(x.device.type)
    text, product = spec.text, weight.dtype
    if autocast or dtype is not product or residual is not None:
        try:
            text, product = typed(text, dtype, product, residual, autocast, x.device.type)
        except TypeError:
            return f"its weight is {weight.dtype}, its input {dtype}"
    N, K = weight.shape
    on_cpu = chain.backend_of(x) == "cpu"
    if width != K or (on_cpu and too_large(weight.shape, x)):
        return f"its weight has shape {(N, K)}, x has {width} features and shape {tuple(x.shape)}"
    cast = product if product is not weight.dtype else None
    if spec.batch_stats:
        mean = var = None  # it looks at this batch's
    link = Link.of(
        Spec.parse(text), weight, bias, norm_weight, norm_bias, gate, mean, var,
        back=back if spec.adds else 0, input_back=input_back, autocast=cast,
        running=running if spec.batch_stats else None, backend=backend,
    )  # fmt: skip
    if on_cpu:
        chosen = backends.choose(backend, text, product, x.device, N, K, False)
        reason = None if chosen == "cpu" else f"its backend is '{chosen}'"
    else:
        way = chain.way_of_links([link], x)
        reason = way if isinstance(way, str) else None
    return reason or (link, Stream(N, y_dtype(text, product)))


def link_of(
    module: nn.Module, x: Tensor, stream: Stream, back: int = 0
) -> tuple[tuple[Link, ...], Stream] | str:
    """`module` as a link that gets `stream`, after its linear shortcut if it has one, and what it
    gives; or why it cannot be one. `back`: how many links earlier the one is whose input it adds.
    """
    if type(module) is not FusedResidual:
        return f"it is a {type(module).__name__}"
    own = module.__dict__
    if "forward" in own or hooked(own):
        return "it has hooks, or its forward was replaced"
    linear: Any = module.linear
    norm: Any = module.norm
    computed = "a parameter is computed"  # which may change it, so not before the call is sure
    if _computed(module, "gate"):
        return computed
    gate: Any = module.gate
    reason = must_be_called(linear, norm, gate)
    if reason is not None:
        return reason
    spec = module._recipe(asked_of(norm, gate, x))
    norms = {"rms": ("weight",), None: ()}.get(spec.norm, ("weight", "bias"))
    if spec.norm == "batch" and any(
        name not in norm._buffers and name not in norm.__dict__ for name in _BUFFERS
    ):
        return computed
    if _computed(linear, "weight", "bias") or _computed(norm, *norms):
        return computed
    weight, bias = weight_and_bias(linear)
    norm_weight = norm_bias = None
    if spec.norm == "rms":
        norm_weight = parameter(norm, "weight")
    elif spec.norm is not None:
        norm_weight, norm_bias = weight_and_bias(norm)
    mean = var = running = None
    if spec.norm == "batch":
        spec, mean, var, momentum, tracked = batch_norm_step(spec, norm)
        if (mean is None) is not (var is None):
            return "its batch norm has one of running_mean and running_var"
        if spec.batch_stats and x.numel() == x.shape[-1]:
            return "its batch norm gets one row"
        running = Running(mean, var, momentum, tracked)
        if any(t is not None and t.requires_grad for t in running[:2]):
            return "its running statistics ask for a gradient"
    its = stream if spec.adds else stream._replace(residual=None)
    shortcut: tuple[Link, ...] = ()
    input_back = 0
    if spec.adds and module.shortcut is not None:
        projected = _shortcut_link(module.shortcut, spec, x, stream, back, module.backend)
        if isinstance(projected, str):
            return projected
        shortcut, its = projected[:1], its._replace(residual=projected[1])
        back, input_back = 0, 1  # it adds the latest value
    N, K = weight.shape
    padded = module.shortcut_kind == "pad" and K < N
    same = back or padded or spec.width("add", K, N) == K
    if spec.adds and not shortcut and not same:
        return "its shortcut is not the identity"
    if back and "add" in spec.prologue:
        return "it adds before linear"
    if spec.norm is not None:
        expected = (spec.width("norm", K, N),)
        own_shape = expected if spec.norm == "batch" else norm.normalized_shape
        shapes = [own_shape, *(t.shape for t in (mean, var) if t is not None)]
        if any(shape != expected for shape in shapes):
            return f"its norm is over {tuple(shapes[-1])}, not {expected}"
    operands = weight, bias, norm_weight, norm_bias, gate, mean, var
    linked = typed_link(spec, operands, running, x, its, back, input_back, module.backend)
    if isinstance(linked, str):
        return linked
    link, y = linked
    found = _parameters(linear, norm, module)
    batch = _batch(norm) if spec.norm == "batch" else ()
    known_tensors = (*found, *batch[:2])
    computes = not all(t is None or any(t is u for u in known_tensors) for t in operands)
    if not computes and module.shortcut is None:
        eps = None if norm is None else norm.eps
        autocast = autocast_dtype(x.device.type)
        _known[module] = _Known(
            link, N, y.dtype, N * K, own["_asked"], own["training"], eps, linear, norm,
            (type(linear), type(norm), module.backend, back, x.device, stream[1:], autocast),
            found, batch, weight.shape, weight.dtype,
        )  # fmt: skip
    return (*shortcut, link), y


def _shortcut_link(
    linear: Any, spec: Spec, x: Tensor, stream: Stream, back: int, backend: str
) -> tuple[Link, torch.dtype] | str:
    """The linear shortcut of a layer as a link, and its result's dtype."""
    if chain.backend_of(x) != "cpu":
        return "its shortcut is not the identity"
    reason = customised(linear, "linear")
    if reason is None and (back or "add" in spec.prologue):
        reason = "it is added before linear, or to an earlier layer's input"
    if reason is None and _computed(linear, "weight", "bias"):
        reason = "a parameter is computed"
    if reason is not None:
        return f"its shortcut: {reason}"
    weight, bias = weight_and_bias(linear)
    given = [t for t in (weight, bias) if t is not None]
    if any(type(t) not in PLAIN or t.device != x.device for t in given):
        return "a parameter of its shortcut is a tensor of another kind or device"
    text, product, dtypes = "linear", weight.dtype, {t.dtype for t in given}
    if len(dtypes) > 1 or product not in DTYPES:
        return "its shortcut's weight and bias have different dtypes"
    autocast = autocast_dtype("cpu")
    if autocast or stream.dtype is not product:
        try:
            text, product = typed(text, stream.dtype, product, None, autocast, "cpu")
        except TypeError:
            return f"its shortcut's weight is {weight.dtype}, its input {stream.dtype}"
    if weight.dim() != 2 or weight.shape[1] != stream.width or too_large(weight.shape, x):
        return f"its shortcut's weight has shape {tuple(weight.shape)}"
    if backends.choose(backend, text, product, x.device, *weight.shape, False) != "cpu":
        return "its shortcut's backend is another"
    cast = product if product is not weight.dtype else None
    return Link.of(Spec.parse(text), weight, bias, autocast=cast), y_dtype(text, product)


class Part(NamedTuple):
    """A layer, and how many layers earlier the one is whose input it adds."""

    layer: nn.Module
    back: int = 0


def goes_on(links: list[tuple[Link, ...]], link: Link, x: Tensor) -> bool:
    """Whether a call takes `link` after `links`: on a GPU all are alike, and the first one can."""
    if chain.backend_of(x) == "cpu":
        return True
    if not links:
        return isinstance(chain.way_of_links([link], x), chain.Way)
    kinds = [
        (one.line, one.backend, one.autocast, one.operands[0].dtype, one.operands[0].shape)
        for one in (links[0][0], link)
    ]
    return kinds[0] == kinds[1]


def links_of(parts: Iterable[Part], x: Tensor) -> list[tuple[Link, ...]]:
    """For each of as many of the first layers as one call can run its links; x is one that
    `unchained` allows.
    """
    links: list[tuple[Link, ...]] = []
    usual = [kind.forward for kind in _CLASSES] == _FORWARDS and watched() is None
    on_cpu = chain.backend_of(x) == "cpu"
    few = on_cpu and x.numel() < 8 * x.shape[-1]
    stream, autocast = Stream(x.shape[-1], x.dtype), autocast_dtype(x.device.type)
    dtypes = [x.dtype]  # of values
    for layer, back in parts:
        if back:
            stream = stream._replace(residual=dtypes[-1 - back])
        known = _as_known(layer, x, stream, back, autocast) if usual else None
        if known is None:
            found = link_of(layer, x, stream, back)
            if isinstance(found, str):
                break
            own, stream = found
            dtypes += [stream.dtype] * len(own)  # nobody adds a shortcut's but its own layer
        else:
            if few and known.size > _OF_FEW_ROWS:
                break
            own, stream = (known.link,), Stream(known.width, known.dtype)
            dtypes.append(stream.dtype)
        if not goes_on(links, own[0], x):
            break
        links.append(own)
    return links


def joined(x: Tensor, layers: list[tuple[Link, ...]]) -> Tensor | None:
    """y (..., N) from x (..., K) by the links of layers. None: the op refuses; the layers one by
    one tell why.
    """
    links = [link for own in layers for link in own]
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    try:
        y, statistics = chain.run(rows, links, rows_per_sample(x))
    except RuntimeError:
        return None
    if statistics is not None:
        _update(links, statistics, rows)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _update(links: list[Link], statistics: Tensor, rows: Tensor) -> None:
    """Of all batch norms in training their running statistics, as layer by layer."""
    M, at = rows.shape[0], 0
    for link in links:
        C = link.statistics
        if link.running is not None:
            mean, var, momentum, tracked = link.running
            batch = statistics[at : at + 2 * C].view(2, C)
            update_by_batch(mean, var, batch, M, momentum, tracked)
        at += 2 * C
