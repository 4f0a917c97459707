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

from .checks import DTYPES
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


# What calling one comes to, as torch had it when this was imported.
_CALL = nn.Module.__call__
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in _STAGES}


def stage_of(module: nn.Module) -> str | None:
    """The stage that a module of torch's own is, by its exact class; None for any other module."""
    return _STAGES.get(type(module))


def torch_kind(module: Any) -> Any:
    """Which of torch's layers the module is, by its class or by one that this inherits from (as a
    parametrized one does) without another way to be called. None: it is a layer of another kind.
    """
    own = type(module)
    kind = next((kind for kind in own.__mro__ if kind in _STAGES), None)
    same = kind and own.forward is _FORWARDS[kind] and own.__call__ is _CALL
    return kind if same else None


def customised(module: Any, stage: str | None = None) -> str | None:
    """Why the module (as `stage`) must be called; None where that would do nothing but what torch's
    own forward does with its parameters and settings: whoever reads these may do it instead.

    Hooks, global ones too, see no call that is not made; pruning, weight_norm and lazy layers work
    by them. Offloading and casting tools replace `forward`, or store in a dtype nobody computes in.
    """
    own: dict[str, Any] = module.__dict__
    kind: Any = type(module)
    if kind.forward is not _FORWARDS.get(kind) or kind.__call__ is not _CALL:
        kind = torch_kind(module)
    if kind is None or (stage is not None and _STAGES[kind] != stage):
        return f"it is a {type(module).__name__}, not torch's own"
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return "its forward was replaced"
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return "every module has hooks, by torch's register_module_*_hook"
    weight = own["_parameters"].get("weight")
    if weight is not None and weight.dtype not in DTYPES:
        return f"its weight is stored as {weight.dtype}"
    return None


def parameter(module: Any, name: str) -> Any:
    """module.name, or None; past nn.Module's own look-up where it is a plain parameter. It is none
    where it is parametrized or pruned, or where a wrapper or a user put a tensor in its place.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


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


def norm_recipe(norm: Any, dtype: torch.dtype | None) -> tuple[str | None, float]:
    """What a recipe calls a norm module over values of `dtype`, and its eps.

    A foreign norm, which is only ever called, counts as "layer".
    """
    if norm is None:
        return None, 1e-5
    kind = _NORMS.get(type(norm)) or _NORMS.get(torch_kind(norm))
    if kind is None:
        return "layer", 1e-5
    eps = norm.eps
    if eps is None:  # nn.RMSNorm's default: that of the dtype it sums in
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return kind, eps


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
    return {"norm": _NORMS[kind], "eps": norm_recipe(module, dtype)[1]}
