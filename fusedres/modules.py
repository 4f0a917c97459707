"""The modules: they own parameters and hand a call to functional.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .functional import plain_linear, run
from .layers import activation_name, norm_features, norm_settings
from .operands import Operands
from .reference import Residual

_TORCH_FORWARDS = {
    None: None,
    "layer": nn.LayerNorm.forward,
    "rms": nn.RMSNorm.forward,
    "batch": nn.BatchNorm1d.forward,
}


def parameter(module: Any, name: str) -> Any:
    """module.name; past nn.Module's own look-up unless it is parametrized or no parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


class FusedResidual(Residual):
    """`Residual` in one fused call. Arguments, shapes, dtypes, errors and sources: see there.

    A drop-in replacement: same parameters, state_dict and results. Where a submodule was replaced
    by one that computes something else (SyncBatchNorm, a LoRA layer) or has hooks, the layer runs
    stage by stage through that submodule.

    `fusedres.explain(layer, x)` tells which backend and kernel a call uses. A call raises
    NotImplementedError, with the reason, where a named backend cannot run it.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) goes into the shortcut, default x."""
        modules = self._modules  # nn.Module's attribute look-up costs half a microsecond a name
        linear: Any = modules["linear"]
        norm: Any = modules["norm"]
        if self.not_fused() is not None:
            return self.eager(x, residual)
        if modules["shortcut"] is not None:
            checks.check_x(x, self.in_features)
            residual = self._shortcut(x, residual)
        spec, momentum, mean, var = self._specs[self.training], 0.0, None, None
        norm_weight = norm_bias = None
        if norm is not None:
            norm_weight, norm_bias = parameter(norm, "weight"), parameter(norm, "bias")
            if spec.norm == "batch":
                spec, mean, var, momentum = self._batch_norm_step(norm)
        weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
        gate = self._parameters["gate"]
        o = Operands(x, weight, bias, norm_weight, norm_bias, gate, residual, mean, var)
        return run(spec, o, momentum, self.shortcut_kind == "pad", self.backend, True)

    def not_fused(self) -> str | None:
        """Why this layer runs through its submodules one by one; None if it does not."""
        modules = self._modules
        linear: Any = modules["linear"]
        norm: Any = modules["norm"]
        if type(linear).forward is not nn.Linear.forward:
            return f"self.linear is a {type(linear).__name__}, not a torch.nn.Linear"
        if (
            linear._forward_hooks
            or linear._forward_pre_hooks
            or linear._backward_hooks
            or linear._backward_pre_hooks
        ):
            return "self.linear has hooks"
        if norm is None:
            return None
        if type(norm).forward is not _TORCH_FORWARDS[self._specs[True].norm]:
            return (
                f"self.norm is a {type(norm).__name__}, not torch's {self._specs[True].norm} norm"
            )
        if (
            norm._forward_hooks
            or norm._forward_pre_hooks
            or norm._backward_hooks
            or norm._backward_pre_hooks
        ):
            return "self.norm has hooks"
        return None

    def _batch_norm_step(self, norm: Any) -> tuple[Any, Tensor | None, Tensor | None, float]:
        """Recipe, running statistics, momentum for this batch, as nn.BatchNorm1d chooses them."""
        momentum = 0.0 if norm.momentum is None else norm.momentum
        training = norm.training
        if training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        mean, var = norm.running_mean, norm.running_var
        spec = self._specs[self.training].with_batch_stats(
            training or (mean is None and var is None)
        )
        keep = not training or norm.track_running_stats
        return spec, mean if keep else None, var if keep else None, momentum

    def _project(self, shortcut: nn.Module, source: Tensor) -> Tensor:
        if type(shortcut).forward is nn.Linear.forward:
            return plain_linear(source, shortcut.weight, shortcut.bias, self.backend)  # type: ignore[arg-type]
        return shortcut(source)

    @classmethod
    def from_layers(
        cls,
        linear: nn.Linear,
        norm: nn.Module | None = None,
        activation: str | nn.Module | None = None,
        **settings: Any,
    ) -> FusedResidual:
        """A layer that shares the given ones' parameters: they become its submodules.

        Args:
            linear: the nn.Linear.
            norm: an nn.LayerNorm, nn.RMSNorm or nn.BatchNorm1d; eps and momentum are taken from it.
            activation: a name, a torch.nn module such as nn.GELU(), or None.
            settings: the other arguments of FusedResidual (order, gate, dropout, shortcut, ...).

        Raises TypeError or ValueError for a module that has no fused form or does not fit.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"FusedResidual.from_layers: linear must be an nn.Linear, "
                f"got {type(linear).__name__}"
            )
        settings = {**norm_settings(norm, linear.weight.dtype), **settings}
        own = settings.get("gate") or settings.get("shortcut", "linear") == "linear"  # parameters
        layer = cls(
            linear.in_features,
            linear.out_features,
            activation=activation_name(activation),
            bias=linear.bias is not None,
            device=linear.weight.device if own else "meta",
            dtype=linear.weight.dtype,
            **settings,
        )
        if norm is not None:
            expected, came = norm_features(layer.norm), norm_features(norm)
            if expected != came:
                order = "-".join(layer.spec.stages)
                raise ValueError(
                    f"FusedResidual.from_layers: norm has {came} features, "
                    f"order '{order}' needs {expected}"
                )
        layer.linear = linear
        layer.register_module("norm", norm)
        return layer.train(linear.training)
