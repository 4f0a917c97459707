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
from .chain import Link
from .functional import PLAIN, composite_only
from .layers import hooked, parameter, watched, weight_and_bias
from .modules import FusedResidual, must_be_called
from .reference import asked_of
from .tracing import transforms_active

_modes = torch._C._len_torch_dispatch_stack
LARGEST = 1 << 18  # elements of a weight: those for which our own product is the best anywhere
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
    if x.device.type != "cpu":
        return f"x is on {x.device}; layers are joined on a CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if x.is_nested or x.layout != torch.strided:
        return "x is not dense"
    return None if x.dim() and x.numel() else f"x has shape {tuple(x.shape)}"


class _Known(NamedTuple):
    """A layer's link, and what it was made from."""

    link: Link
    width: int  # N
    size: int  # of the weight
    asked: Any  # what the layer's recipe was made from; another object once a setting changed
    training: bool
    eps: float | None
    linear: Any
    norm: Any
    kinds: tuple[Any, ...]  # classes, the backend asked for, and `back`
    parameters: tuple[Any, ...]
    shape: Any


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_CLASSES = (FusedResidual, nn.Linear, nn.LayerNorm, nn.RMSNorm)
_FORWARDS = [kind.forward for kind in _CLASSES]


def _parameters(linear: Any, norm: Any, module: Any) -> tuple[Any, ...]:
    """Those that are no more than parameters: weight and bias of both, gate."""
    p, q = linear._parameters, {} if norm is None else norm._parameters
    gate = module._parameters.get("gate")
    return p.get("weight"), p.get("bias"), q.get("weight"), q.get("bias"), gate


def _as_known(module: nn.Module, x: Tensor, width: int, back: int) -> _Known | None:
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
    kinds = type(linear), type(norm), own["backend"], back
    if not all(map(_is, found, known.parameters)) or kinds != known.kinds:
        return None
    weight = found[0]
    if weight.dtype is not x.dtype or weight.shape != known.shape or width != known.shape[1]:
        return None
    if own["training"] is not known.training or (norm is not None and norm.eps != known.eps):
        return None
    return known


def _computed(owner: Any, *names: str) -> bool:
    """Whether one of them is neither a parameter nor a plain attribute."""
    return any(name not in owner._parameters and name not in owner.__dict__ for name in names)


def link_of(module: nn.Module, x: Tensor, width: int, back: int = 0) -> Link | str:
    """`module` as a link that gets (M, width) of x's dtype, or why it cannot be one. `back`: how
    many links earlier the one is whose input it adds.
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
    if spec.random:
        return "it drops at random"
    if spec.norm == "batch":
        return "it has a batch norm"
    norms = {"layer": ("weight", "bias"), "rms": ("weight",), None: ()}[spec.norm]
    if _computed(linear, "weight", "bias") or _computed(norm, *norms):
        return computed
    weight, bias = weight_and_bias(linear)
    norm_weight = norm_bias = None
    if spec.norm == "rms":
        norm_weight = parameter(norm, "weight")
    elif spec.norm is not None:
        norm_weight, norm_bias = weight_and_bias(norm)
    given = [t for t in (weight, bias, norm_weight, norm_bias, gate) if t is not None]
    if any(type(t) not in PLAIN or t.device != x.device for t in given):
        return "a parameter is a tensor of another kind, or on another device than x"
    if weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        return f"its weight is {weight.dtype}, x {x.dtype}"
    N, K = weight.shape
    if width != K or too_large(weight.shape, x):
        return f"its weight has shape {(N, K)}, x has {width} features and shape {tuple(x.shape)}"
    if spec.adds and (module.shortcut is not None or (N != K and not back)):
        return "its shortcut is not the identity"
    if back and "add" in spec.prologue:
        return "it adds before linear"
    if spec.norm is not None:
        expected = (spec.width("norm", K, N),)
        if norm.normalized_shape != expected:
            return f"its norm is over {tuple(norm.normalized_shape)}, not {expected}"
    chosen = backends.choose(module.backend, spec.text, x.dtype, x.device, N, K, False)
    if chosen != "cpu":
        return f"its backend is '{chosen}'"
    given_back = back if spec.adds else 0
    link = Link.of(spec.text, weight, bias, norm_weight, norm_bias, gate, back=given_back)
    found = _parameters(linear, norm, module)
    if all(t is None or any(t is u for u in found) for t in given):  # none of them is computed
        eps = None if norm is None else norm.eps
        _known[module] = _Known(
            link, N, N * K, own["_asked"], own["training"], eps, linear, norm,
            (type(linear), type(norm), module.backend, back), found, weight.shape,
        )  # fmt: skip
    return link


class Part(NamedTuple):
    """A layer, and how many layers earlier the one is whose input it adds."""

    layer: nn.Module
    back: int = 0


def links_of(parts: Iterable[Part], x: Tensor) -> list[Link]:
    """The links of as many of the first layers as one call can run; x is one that `unchained`
    allows.
    """
    links: list[Link] = []
    usual = [kind.forward for kind in _CLASSES] == _FORWARDS and watched() is None
    width = x.shape[-1]
    few = x.numel() < 8 * width
    for layer, back in parts:
        known = _as_known(layer, x, width, back) if usual else None
        link = link_of(layer, x, width, back) if known is None else known.link
        if isinstance(link, str):
            break
        if known is not None and few and known.size > _OF_FEW_ROWS:
            break
        width = link.operands[0].shape[0] if known is None else known.width
        links.append(link)
    return links


def joined(x: Tensor, links: list[Link]) -> Tensor | None:
    """y (..., N) from x (..., K). None: the op refuses; the layers one by one tell why."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    try:
        y = chain.run(rows, links)
    except RuntimeError:
        return None
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
