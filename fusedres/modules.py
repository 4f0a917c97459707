"""The modules: they own parameters and hand a call to functional.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .functional import plain_linear, run
from .layers import activation_name, customised, norm_features, norm_settings, parameter
from .operands import Operands
from .reference import Residual
from .spec import Spec


def project(shortcut: nn.Module, source: Tensor, backend: str) -> Tensor:
    """The shortcut of source, in one fused call where it is torch's linear and nothing more."""
    if customised(shortcut, "linear") is not None:
        return shortcut(source)
    weight, bias = parameter(shortcut, "weight"), parameter(shortcut, "bias")
    return plain_linear(source, weight, bias, backend)


def _batch_norm_step(spec: Spec, norm: Any) -> tuple[Any, ...]:
    """Recipe, running mean and variance, momentum and count for this batch as nn.BatchNorm1d has
    them; the count only where it goes up.
    """
    training, momentum, tracked = norm.training, norm.momentum, None
    mean, var = norm.running_mean, norm.running_var
    spec = spec.with_batch_stats(training or (mean is None and var is None))
    if training:
        if norm.track_running_stats:
            tracked = norm.num_batches_tracked
        else:
            mean = var = None
    return spec, mean, var, momentum, tracked


class FusedResidual(Residual):
    """`Residual` in one fused call: same arguments (see there), parameters, state_dict and results.

    A drop-in replacement: checkpoints move both ways. Where calling a submodule does more than
    torch's own layer, or else (SyncBatchNorm, a LoRA layer, hooks), this one runs stage by stage
    through its submodules; not so where only parameters were replaced or are computed.

    `fusedres.explain(layer, x)` tells which backend and kernel a call uses, and why not fused.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) is what goes into the shortcut, default
        x.
        """
        own = self.__dict__  # nn.Module's attribute look-up costs half a microsecond a name
        modules = own["_modules"]
        linear, norm = modules["linear"], modules.get("norm")
        if self.not_fused() is not None:
            return self.eager(x, residual)
        spec = self._recipe(getattr(x, "dtype", None))
        norm_weight = norm_bias = mean = var = momentum = tracked = None
        if spec.norm is not None:
            norm_weight = parameter(norm, "weight")
            if spec.norm == "batch":
                spec, mean, var, momentum, tracked = _batch_norm_step(spec, norm)
            elif norm_weight is None and norm.normalized_shape != (
                spec.width("norm", self.in_features, self.out_features),
            ):
                return self.eager(x, residual)  # torch's own error
            if spec.norm != "rms":
                norm_bias = parameter(norm, "bias")
        if modules.get("shortcut") is not None:
            checks.check_x(x, self.in_features)
            residual = self._shortcut(x, residual)
        weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
        gate = parameter(self, "gate")
        o = Operands(x, weight, bias, norm_weight, norm_bias, gate, residual, mean, var)
        pad = own["shortcut_kind"] == "pad"
        return run(spec, o, momentum, pad, own["backend"], True, tracked)

    def not_fused(self) -> str | None:
        """Why this layer runs through its submodules one by one; None if it does not."""
        modules = self._modules
        reason = customised(modules["linear"], "linear")
        if reason is not None:
            return f"self.linear: {reason}"
        norm: Any = modules.get("norm")
        if norm is not None:
            reason = customised(norm, "norm")
            if reason is not None:
                return f"self.norm: {reason}"
            if isinstance(norm, nn.SyncBatchNorm):
                return "self.norm: it is a SyncBatchNorm, which sums over processes"
        gate = self._parameters.get("gate")
        if gate is not None and gate.dim() != 1:
            return f"self.gate has {gate.dim()} dimensions"
        return None

    def _project(self, shortcut: nn.Module, source: Tensor) -> Tensor:
        return project(shortcut, source, self.backend)

    @classmethod
    def from_layers(
        cls,
        linear: nn.Linear,
        norm: nn.Module | None = None,
        activation: str | nn.Module | None = None,
        **settings: Any,
    ) -> FusedResidual:
        """A layer that shares the parameters of the given ones (the same modules become its
        submodules).

        Args:
            linear: the nn.Linear.
            norm: an nn.LayerNorm, nn.RMSNorm or nn.BatchNorm1d; eps and momentum are taken from it.
            activation: a name, a torch.nn module such as nn.GELU(), or None.
            settings: the other arguments of FusedResidual (order, gate, dropout, shortcut, ...).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"FusedResidual.from_layers: linear must be an nn.Linear, got "
                f"{type(linear).__name__}"
            )
        settings = {**norm_settings(norm, linear.weight.dtype), **settings}
        own = (
            settings.get("gate") or settings.get("shortcut", "linear") == "linear"
        )  # parameters of its own
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
                    f"FusedResidual.from_layers: norm has {came} features, order '{order}' needs "
                    f"{expected}"
                )
        layer.linear = linear
        layer.register_module("norm", norm)
        return layer.train(linear.training)
