"""The modules: they own parameters and hand a call to functional.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .functional import plain_linear, run
from .layers import (
    activation_name,
    customised,
    first_parameter,
    norm_features,
    norm_settings,
    parameter,
    watched,
    weight_and_bias,
)
from .operands import Operands
from .reference import Residual, asked_of
from .spec import Spec

_OF_MODULES = frozenset({"bias", "eps", "momentum", "device", "dtype"})  # as from_layers takes them


def project(shortcut: nn.Module, source: Tensor, backend: str) -> Tensor:
    """The shortcut of source, in one fused call where it is torch's linear and nothing more."""
    if customised(shortcut, "linear") or watched():
        return shortcut(source)
    return plain_linear(source, *weight_and_bias(shortcut), backend)


def batch_norm_step(spec: Spec, norm: Any) -> tuple[Any, ...]:
    """Recipe, running mean and variance, momentum and count for this batch as nn.BatchNorm1d has
    them; the count only where it goes up.
    """
    training, momentum, tracked = norm.training, norm.momentum, None
    own = norm._buffers
    mean = own["running_mean"] if "running_mean" in own else norm.running_mean
    var = own["running_var"] if "running_var" in own else norm.running_var
    spec = spec.with_batch_stats(training or (mean is None and var is None))
    if training:
        if norm.track_running_stats:
            tracked = norm.num_batches_tracked
        else:
            mean = var = None
    return spec, mean, var, momentum, tracked


def must_be_called(linear: Any, norm: Any, gate: Tensor | None) -> str | None:
    reason = customised(linear, "linear")
    if reason is not None:
        return f"self.linear: {reason}"
    if norm is not None:
        reason = customised(norm, "norm")
        if reason is not None:
            return f"self.norm: {reason}"
    if gate is not None and gate.dim() != 1:
        return f"self.gate has {gate.dim()} dimensions"
    return watched()


class FusedResidual(Residual):
    """y = act(norm(x @ weight.T + bias)) + x, or another order, in one fused call.

    A drop-in for the same layer of torch's own modules: parameters, state_dict and results are
    those of ``fusedres.Residual``. Where calling a submodule does more than torch's own layer,
    or else (SyncBatchNorm, a LoRA layer, hooks), it runs stage by stage through its submodules; not
    so where only parameters were replaced or are computed. ``fusedres.explain(layer, x)`` tells
    which backend and kernel a call uses, and why not fused.

    All of it counts at the next call: children and parameters that were replaced or set to None,
    their settings (``layer.norm.eps``), and ``order``, ``activation``, ``dropout``, ``drop_path``,
    ``residual_scale``, ``backend``, which are attributes.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, default K.
        order: stages joined by "-", or an alias (``fusedres.ORDERS``).
        norm: None, "layer", "rms" or "batch"; its parameters live in ``self.norm``. Batch
            statistics run over all rows, that is over every dimension of x but the last.
        activation: None, a name in ``fusedres.ACTIVATIONS``, or one of your own, see
            ``fusedres.register_activation``.
        bias: whether ``self.linear`` has a bias.
        eps, momentum: of the norm. ``momentum=None``: a cumulative average, as in nn.BatchNorm1d.
        gate: None, "scalar" (ReZero, https://arxiv.org/abs/2003.04887) or "channel" (LayerScale,
            https://arxiv.org/abs/2103.17239): a learned factor ``self.gate`` on the branch.
        gate_init: its first value; default 0 for "scalar", 1e-5 for "channel".
        dropout: probability of elementwise dropout on the branch, in training.
        drop_path: probability of dropping a whole sample's branch, in training (stochastic depth,
            https://arxiv.org/abs/1603.09382). A sample is one index of x's first dimension.
        residual_scale: factor on the shortcut.
        shortcut: "identity", "linear" (parameters ``shortcut.weight``, ``shortcut.bias``), "pad"
            (zeros appended, option A of https://arxiv.org/abs/1512.03385) or a module. Default:
            "identity" where the widths agree, else "linear".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; "auto" falls back.
        device, dtype: of the parameters.

    Shapes: x (..., K), residual (..., R) as the shortcut takes it, y (..., N); floating dtypes.

    Raises:
        ValueError, TypeError: a setting outside these lists, or a tensor that does not fit; the
            message says what would.
        NotImplementedError: a named backend cannot run the call; the message says why.

    Source: He et al., "Deep residual learning for image recognition", arxiv.org/abs/1512.03385.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) is what goes into the shortcut, default
        x.
        """
        own = self.__dict__  # nn.Module's attribute look-up costs half a microsecond a name
        modules, parameters = own["_modules"], own["_parameters"]
        linear = modules["linear"] if "linear" in modules else self.linear
        norm: Any = modules["norm"] if "norm" in modules else self.norm
        shortcut = modules["shortcut"] if "shortcut" in modules else self.shortcut
        gate = parameters.get("gate")
        if must_be_called(linear, norm, gate) is not None:
            return self.eager(x, residual)
        if "gate" not in parameters:  # it is computed, which hooks on all modules would see
            gate = self.gate
            if gate is not None and gate.dim() != 1:
                return self.eager(x, residual)
        asked = asked_of(norm, gate, x)
        spec = own["_specs"][own["training"]] if asked == own["_asked"] else self._recipe(asked)
        norm_weight = norm_bias = mean = var = momentum = tracked = None
        if spec.norm == "rms":
            norm_weight = parameter(norm, "weight")
        elif spec.norm is not None:
            norm_weight, norm_bias = weight_and_bias(norm)
            if spec.norm == "batch":
                spec, mean, var, momentum, tracked = batch_norm_step(spec, norm)
        if norm_weight is None and spec.norm in ("layer", "rms"):  # whose shape would be checked
            width = spec.width("norm", self.in_features, self.out_features)
            if norm.normalized_shape != (width,):
                return self.eager(x, residual)
        r = residual
        if shortcut is not None:
            checks.check_x(x, self.in_features)
            r = self._shortcut(x, residual)
        weight, bias = weight_and_bias(linear)
        o = Operands(x, weight, bias, norm_weight, norm_bias, gate, r, mean, var)
        pad = own["shortcut_kind"] == "pad"
        try:  # costs nothing, unlike a question
            return run(spec, o, momentum, pad, own["backend"], True, tracked)
        except TypeError:
            if weight.dtype in checks.DTYPES:
                raise
            return self.eager(x, residual)

    def not_fused(self) -> str | None:
        """Why this layer runs through its submodules one by one; None if it does not."""
        weight = first_parameter(self.linear)
        if weight is not None and weight.dtype not in checks.DTYPES:
            return f"self.linear: its weight is stored as {weight.dtype}"
        return must_be_called(self.linear, self.norm, self.gate)

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
            settings: the other arguments of FusedResidual (order, gate, dropout, shortcut, ...);
                `gate` may be the nn.Parameter of a LayerScale, (1,) or (N,), which is shared.
                Not bias, eps, momentum, device, dtype, which the modules have.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"FusedResidual.from_layers: linear must be an nn.Linear, got "
                f"{type(linear).__name__}"
            )
        if norm is not None and not isinstance(norm, nn.Module):
            raise TypeError(
                f"FusedResidual.from_layers: norm must be a module such as nn.LayerNorm(64), whose "
                f"parameters are shared, got {norm!r}; FusedResidual(..., norm=...) takes names"
            )
        for name in sorted(_OF_MODULES & settings.keys()):
            raise TypeError(
                f"FusedResidual.from_layers: {name} is what the given modules have, "
                f"got {name}={settings[name]!r} besides"
            )
        settings |= norm_settings(norm, linear.weight.dtype)
        gate: Any = settings.get("gate")
        shared = isinstance(gate, nn.Parameter)
        if shared:
            settings["gate"] = "scalar" if gate.numel() == 1 else "channel"
        # parameters of its own
        own = (gate is not None and not shared) or settings.get("shortcut", "linear") == "linear"
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
        if shared:
            fits, shape = tuple(getattr(layer.gate, "shape", ())), tuple(gate.shape)
            if shape != fits:
                raise ValueError(
                    f"FusedResidual.from_layers: gate has shape {shape}, expected (1,) or {fits}"
                )
            layer.register_parameter("gate", gate)
        layer.linear = linear
        layer.register_module("norm", norm)
        return layer.train(linear.training)
