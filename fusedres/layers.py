"""What torch's own layers are called here: modules as stages, norms and activations as settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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

_STAGES: dict[type, str] = {
    nn.Linear: "linear",
    nn.Dropout: "dropout",
    **dict.fromkeys(_NORMS, "norm"),
    **dict.fromkeys(_ACTIVATIONS, "act"),
}


def stage_of(module: nn.Module) -> str | None:
    """The stage that a module of torch's own is, by its exact class; None for any other module."""
    return _STAGES.get(type(module))


def customised(module: nn.Module) -> str | None:
    """Why calling the module does more than its class's forward; None if it does not."""
    m: Any = module
    if "forward" in m.__dict__:
        return "its forward was replaced"
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return "it has hooks" if hooks else None


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
    eps = torch.finfo(dtype).eps if module.eps is None else module.eps  # as nn.RMSNorm does
    return {"norm": _NORMS[kind], "eps": eps}
