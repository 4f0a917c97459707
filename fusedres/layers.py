"""torch's own layers: which stages they are, what recipes call their settings, and whether to call
one does anything but what its class's forward does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .spec import ACTIVATIONS, one_of

_NORMS = {
    nn.LayerNorm: "layer",
    nn.RMSNorm: "rms",
    nn.BatchNorm1d: "batch",
    nn.SyncBatchNorm: "batch",
}

_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU6: "relu6",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
}

_FIXED = {
    nn.LeakyReLU: {"negative_slope": 0.01},
    nn.ELU: {"alpha": 1.0},
    nn.Softplus: {"beta": 1.0, "threshold": 20.0},
}

_STAGES: dict[Any, str] = {
    nn.Linear: "linear",
    nn.Dropout: "dropout",
    **dict.fromkeys(_NORMS, "norm"),
    **dict.fromkeys(_ACTIVATIONS, "act"),
}


# Each one's stage and forward, as torch had it when this was imported; and what calls a module.
_KNOWN: dict[Any, tuple[str, Any]] = {kind: (_STAGES[kind], kind.forward) for kind in _STAGES}
_KNOWN[nn.SyncBatchNorm] = "norm over processes", nn.SyncBatchNorm.forward
_Module, _CALL = nn.Module, nn.Module.__call__


def stage_of(module: nn.Module) -> str | None:
    """The stage that a module of torch's own is, by its exact class; None for any other module."""
    return _STAGES.get(type(module))


def torch_kind(module: Any) -> Any:
    """Which of torch's layers the module is, by its class or by one that this inherits from (as a
    parametrized one does) without another way to be called. None: it is a layer of another kind.
    """
    own = type(module)
    kind: Any = next((kind for kind in own.__mro__ if kind in _KNOWN), None)
    same = kind and own.forward is kind.forward and own.__call__ is _Module.__call__
    return kind if same else None


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(own: dict[str, Any]) -> bool:
    """Whether the module whose `__dict__` this is has hooks."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def customised(module: Any, stage: str | None = None) -> str | None:
    """Why the module (as `stage`) must be called; None where that would do nothing but what torch's
    own forward does with its parameters and settings: whoever reads these may do it instead, unless
    `watched`.

    Pruning, weight_norm and lazy layers work by hooks, tools that offload or cast parameters by a
    forward of the instance's own.
    """
    own, kind = module.__dict__, type(module)
    if kind not in _KNOWN:
        kind = torch_kind(module)
        if kind is None:
            return f"it is a {type(module).__name__}, not torch's own"
    known, forward = _KNOWN[kind]
    if stage is not None and known != stage:
        return f"it is a {kind.__name__}, not torch's {stage}"
    if kind.forward is not forward or "forward" in own:
        return "its forward was replaced"
    if (  # `hooked`, without a call more on the way of every layer
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return None


def watched() -> str | None:
    """Why every module must be called: a call that is not made would be missed."""
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return "all modules have hooks"
    if _Module.__call__ is _CALL or torch.compiler.is_exporting():  # which keeps a stack by it
        return None
    return "torch.nn.Module.__call__ was replaced"


def parameter(module: Any, name: str) -> Any:
    """module.name, or None; past nn.Module's own look-up where it is a plain parameter. It is none
    where it is parametrized or pruned, or where a wrapper or a user put a tensor in its place.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """`parameter` of both, for less."""
    own = module._parameters
    weight = own["weight"] if "weight" in own else module.weight
    return weight, own["bias"] if "bias" in own else module.bias


def first_parameter(module: nn.Module) -> Any:
    """Tells dtype and device. None where there is none; to ask a parametrized module for its weight
    may change it.
    """
    return next(module.parameters(), None)


def activation_name(activation: str | nn.Module | None) -> str | None:
    """The name of a torch activation module, nn.GELU("tanh") say; names and None pass through."""
    if activation is None or isinstance(activation, nn.Identity):
        return None
    if isinstance(activation, str):
        return one_of("activation", activation, ACTIVATIONS)
    kind = type(activation)
    if kind not in _ACTIVATIONS:
        known = ", ".join(module.__name__ for module in _ACTIVATIONS)
        raise ValueError(
            f"fusedres: activation module {kind.__name__} has no fused form; known: {known}"
        )
    for setting, value in _FIXED.get(kind, {}).items():
        came = getattr(activation, setting)
        if came != value:
            raise ValueError(
                f"fusedres: {kind.__name__} is fused with {setting}={value} only, got {came}"
            )
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS[kind]


def norm_features(norm: Any) -> int | None:
    """How many features a norm module normalises; None for no norm."""
    if norm is None:
        return None
    return norm.num_features if hasattr(norm, "num_features") else norm.normalized_shape[0]


def norm_kind(norm: Any) -> str | None:
    """What a recipe calls a norm module; "layer" for a foreign one, which is only ever called."""
    return None if norm is None else _NORMS.get(torch_kind(norm), "layer")


def norm_eps(norm: Any, dtype: torch.dtype | None) -> Any:
    """The eps of a norm over `dtype`; nn.RMSNorm's default is that of what it sums in."""
    eps = getattr(norm, "eps", None)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(exact).eps if eps is None else eps


def norm_settings(norm: nn.Module | None, dtype: torch.dtype) -> dict[str, Any]:
    """The `norm`, `eps` and `momentum` of a torch norm module."""
    if norm is None:
        return {"norm": None}
    kind: Any = type(norm)
    if kind not in _NORMS:
        raise ValueError(
            f"fusedres: norm module {kind.__name__} has no fused form; "
            f"known: {', '.join(module.__name__ for module in _NORMS)}"
        )
    module: Any = norm
    if _NORMS[kind] == "batch":
        return {"norm": "batch", "eps": module.eps, "momentum": module.momentum}
    if len(module.normalized_shape) != 1:
        raise ValueError(
            f"fusedres: a fused {kind.__name__} runs over the last dimension only, "
            f"got normalized_shape {tuple(module.normalized_shape)}"
        )
    return {"norm": _NORMS[kind], "eps": norm_eps(module, dtype)}
