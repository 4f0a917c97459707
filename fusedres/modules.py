"""The modules: they own parameters and hand a call to functional.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .functional import plain_linear, run
from .layers import activation_name, norm_features, norm_settings
from .reference import Residual

_TORCH_FORWARDS = {
    None: None,
    "layer": nn.LayerNorm.forward,
    "rms": nn.RMSNorm.forward,
    "batch": nn.BatchNorm1d.forward,
}


class FusedResidual(Residual):
    """`Residual` in one fused call: same arguments (see there), parameters, state_dict and results.

    A drop-in replacement: checkpoints move both ways. Where a submodule was replaced by one that computes
    something else (SyncBatchNorm, a LoRA layer), the layer runs stage by stage through that submodule.
    Hooks on the submodules do not run in the fused call.

    `fusedres.explain(layer, x)` tells which backend and kernel a call uses.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) is what goes into the shortcut, default x."""
        if self.not_fused() is not None:
            return self.eager(x, residual)
        if self.shortcut is not None:
            checks.check_x(x, self.in_features)
            residual = self._shortcut(x, residual)
        spec, momentum, mean, var = self._specs[self.training], 0.0, None, None
        norm: Any = self.norm
        norm_weight = norm_bias = None
        if norm is not None:
            norm_weight, norm_bias = norm.weight, getattr(norm, "bias", None)
            if spec.norm == "batch":
                spec, mean, var, momentum = self._batch_norm_step(norm)
        linear = self.linear
        return run(
            spec, x, linear.weight, linear.bias, norm_weight, norm_bias, self.gate, residual, mean, var, momentum,
            self.shortcut_kind == "pad", self.backend,
        )  # fmt: skip

    def not_fused(self) -> str | None:
        """Why this layer runs through its submodules one by one; None if it does not."""
        if type(self.linear).forward is not nn.Linear.forward:
            return f"self.linear is a {type(self.linear).__name__}, not a torch.nn.Linear"
        norm, kind = self.norm, self._specs[True].norm
        if norm is not None and type(norm).forward is not _TORCH_FORWARDS[kind]:
            return f"self.norm is a {type(norm).__name__}, not torch's {kind} norm"
        return None

    def _batch_norm_step(self, norm: Any) -> tuple[Any, Tensor | None, Tensor | None, float]:
        """Recipe, running statistics and weight of this batch, as nn.BatchNorm1d.forward chooses them."""
        momentum = 0.0 if norm.momentum is None else norm.momentum
        training = norm.training
        if training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        mean, var = norm.running_mean, norm.running_var
        spec = self._specs[self.training].with_batch_stats(training or (mean is None and var is None))
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
        """A layer that shares the parameters of the given ones (the same modules become its submodules).

        Args:
            linear: the nn.Linear.
            norm: an nn.LayerNorm, nn.RMSNorm or nn.BatchNorm1d; eps and momentum are taken from it.
            activation: a name, a torch.nn module such as nn.GELU(), or None.
            settings: the other arguments of FusedResidual (order, gate, dropout, shortcut, ...).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"FusedResidual.from_layers: linear must be an nn.Linear, got {type(linear).__name__}")
        settings = {**norm_settings(norm, linear.weight.dtype), **settings}
        layer = cls(
            linear.in_features, linear.out_features, activation=activation_name(activation),
            bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype, **settings,
        )  # fmt: skip
        if norm is not None:
            expected, came = norm_features(layer.norm), norm_features(norm)
            if expected != came:
                order = "-".join(layer.spec.stages)
                raise ValueError(
                    f"FusedResidual.from_layers: norm has {came} features, order '{order}' needs {expected}"
                )
        layer.linear, layer.norm = linear, norm
        return layer.train(linear.training)
