"""The residual layer in plain torch: the formula every kernel is tested against.

    z = x @ weight.T + bias
    y = act(norm(z)) + residual_scale * residual         # order "note"; `composite` does every
    order

`composite` is the oracle (in float64), the "reference" backend, and what runs under function
transforms and in double backward. `Residual` is the same layer as a module that calls its
submodules one by one: the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import checks
from .operands import Operands
from .spec import ACTIVATIONS, SHORTCUTS, Spec, make_spec, one_of

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu2": lambda h: F.relu(h).square(),
    "relu6": F.relu6,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": lambda h: (
        F.relu6(h + 3) / 6
    ),  # F.hardsigmoid's float64 gradient is 1/6 in float32
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "softsign": F.softsign,
}

ELEMENT_STREAM, SAMPLE_STREAM = 0, 1  # third word of the Philox counter: dropout, drop-path


def philox(seed: Tensor, index: Tensor, stream: int) -> Tensor:
    """First 32-bit word of Philox4x32-10, as int64, for each element of `index`.

    Key: the 64 bits of `seed`. Counter: (index low, index high, stream, 0). The 64-bit products
        wrap, which
    leaves their bits right. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011).
    """
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, (seed >> 32) & mask
    c0, c1 = index & mask, (index >> 32) & mask
    c2, c3 = torch.full_like(index, stream), torch.zeros_like(index)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask
        c2, c3 = ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from torch's generator of `device`, so that torch.manual_seed makes masks
    repeat.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def _drop(t: Tensor, seed: Tensor, index: Tensor, stream: int, p: float) -> Tensor:
    kept = philox(seed, index, stream) >= int(p * 2**32)
    return torch.where(
        kept,
        t * (1.0 / (1.0 - p) if p < 1.0 else 0.0),
        torch.zeros((), dtype=t.dtype, device=t.device),
    )


def run_stages(
    spec: Spec,
    x: Tensor,  # (M, K)
    linear: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None,
    gate: Tensor | None,
    residual: Tensor | None,  # (M, R); None: x
    seed: Tensor | None,
    sample_rows: int,
) -> Tensor:
    """The stages of `spec`, one by one."""
    t = x
    for stage in spec.stages:
        if stage == "linear":
            t = linear(t)
        elif stage == "norm":
            assert norm is not None
            t = norm(t)
        elif stage == "act":
            assert spec.activation is not None
            if spec.activation not in ACTIVATION_FUNCTIONS:  # unpickled, and not registered here
                one_of("activation", spec.activation, ACTIVATIONS)
            t = ACTIVATION_FUNCTIONS[spec.activation](t)
        elif stage == "gate":
            assert gate is not None
            t = t * gate.to(t.dtype)
        elif stage == "dropout":
            assert seed is not None
            index = torch.arange(t.shape[0] * t.shape[1], device=t.device).view(t.shape)
            t = _drop(t, seed, index, ELEMENT_STREAM, spec.dropout)
        elif stage == "droppath":
            assert seed is not None
            sample = torch.arange(t.shape[0], device=t.device)[:, None] // sample_rows
            t = _drop(t, seed, sample, SAMPLE_STREAM, spec.drop_path)
        else:
            r = x if residual is None else residual
            if r.shape[-1] < t.shape[-1]:
                r = F.pad(r, (0, t.shape[-1] - r.shape[-1]))
            t = t + (r if spec.residual_scale == 1.0 else spec.residual_scale * r)
    return t


def composite(spec: Spec, o: Operands, momentum: float = 0.1) -> Tensor:
    """Every order in plain torch, differentiable any number of times. Returns y (M, N).

    Batch norm by this batch's statistics updates o.running_mean and o.running_var in place, as
    nn.BatchNorm1d does.
    """

    def plain_norm(t: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        if spec.norm == "batch":
            mean, var = o.running_mean, o.running_var
            return F.batch_norm(t, mean, var, w, b, spec.batch_stats, momentum, spec.eps)
        w, b = (p if p is None else p.to(t.dtype) for p in (w, b))
        if spec.norm == "layer":
            return F.layer_norm(t, t.shape[-1:], w, b, spec.eps)
        h = F.rms_norm(t, t.shape[-1:], w, spec.eps)
        return h if b is None else h + b

    def norm(t: Tensor) -> Tensor:
        if (
            is_dynamo_compiling()
        ):  # torch 2.11 to 2.15 cannot compile the jvp of an affine layer or batch norm
            h = plain_norm(t, None, None)
            h = h if o.norm_weight is None else h * o.norm_weight.to(t.dtype)
            return h if o.norm_bias is None else h + o.norm_bias.to(t.dtype)
        return plain_norm(t, o.norm_weight, o.norm_bias)

    def linear(t: Tensor) -> Tensor:
        return F.linear(t, o.weight, o.bias)

    return run_stages(spec, o.x, linear, norm, o.gate, o.residual, o.seed, o.sample_rows)


def rows_per_sample(x: Tensor) -> int:
    """How many rows of x.reshape(-1, K) belong to one index of x's first dimension."""
    rows = 1
    for size in x.shape[1:-1]:
        rows *= size
    return max(rows, 1)


class Residual(nn.Module):
    """A residual layer in eager PyTorch, stage by stage: the reference implementation.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, default K.
        order: stages joined by "-", or an alias (``fusedres.ORDERS``).
        norm: None, "layer", "rms" or "batch"; its parameters live in ``self.norm``. Batch
            statistics run over all rows, that is over every dimension of x but the last.
        activation: None, a name in ``fusedres.ACTIVATIONS``, or one of your own, see
            ``fusedres.register_activation``.
        bias: whether ``self.linear`` has a bias.
        eps, momentum: of the norm. ``momentum=None`` keeps a cumulative average, as nn.BatchNorm1d
            does.
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
        backend: "auto", "reference", "cpu", "triton" or "cuda"; `Residual` itself always runs the
            reference.
        device, dtype: of the parameters.

    Shapes: x (..., K), residual (..., R), y (..., N); any floating dtype that the parameters have.

    Raises ValueError for a setting outside these lists, TypeError or ValueError for a tensor that
    does not fit.

    Source: He et al., "Deep residual learning for image recognition", https://arxiv.org/abs/1512.03385.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        order: str = "note",
        norm: str | None = "layer",
        activation: str | None = "relu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gate: str | None = None,
        gate_init: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        shortcut: str | nn.Module | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K, N = in_features, in_features if out_features is None else out_features
        checks.check_feature_counts(type(self).__name__, in_features=K, out_features=N)
        checks.check_backend_name(backend)
        self.in_features, self.out_features, self.order, self.backend = K, N, order, backend
        settings = (order, norm, activation, gate, eps, dropout, drop_path, residual_scale)
        self._specs = {training: make_spec(*settings, training) for training in (False, True)}
        spec = self._specs[True]
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        self.linear = nn.Linear(K, N, bias=bias, **where)
        norm_module: nn.Module | None = None
        if spec.norm is not None:
            kinds: dict[str, Any] = {
                "layer": nn.LayerNorm,
                "rms": nn.RMSNorm,
                "batch": partial(nn.BatchNorm1d, momentum=momentum),
            }
            norm_module = kinds[spec.norm](spec.width("norm", K, N), eps=eps, **where)
        self.register_module("norm", norm_module)
        self.register_parameter("gate", None)
        if spec.gate is not None:
            size, init = (1, 0.0) if spec.gate == "scalar" else (spec.width("gate", K, N), 1e-5)
            self.gate = nn.Parameter(
                torch.full((size,), init if gate_init is None else float(gate_init), **where)
            )
        self._init_shortcut(shortcut, where)

    def _init_shortcut(self, shortcut: str | nn.Module | None, where: dict[str, Any]) -> None:
        spec = self.spec
        self._sum_features = (
            spec.width("add", self.in_features, self.out_features) if spec.adds else 0
        )
        self._default_shortcut = shortcut is None
        self.register_module("shortcut", None)
        if isinstance(shortcut, nn.Module):
            self.shortcut, self.shortcut_kind = shortcut, "module"
            return
        if shortcut is None:
            shortcut = (
                "linear" if spec.adds and self._sum_features != self.in_features else "identity"
            )
        self.shortcut_kind = one_of("shortcut", shortcut, SHORTCUTS)
        if not spec.adds:
            return
        if shortcut == "pad" and self._sum_features < self.in_features:
            raise ValueError(
                f"{type(self).__name__}: shortcut='pad' appends zeros and cannot go from "
                f"{self.in_features} "
                f"features to {self._sum_features}; use shortcut='linear'"
            )
        if shortcut == "linear":
            self.shortcut = nn.Linear(self.in_features, self._sum_features, **where)

    @property
    def spec(self) -> Spec:
        """The recipe as the layer would run now (see train() and eval())."""
        return self._specs[self.training]

    def _shortcut(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The shortcut's value, (..., R); None where that is x itself."""
        shortcut = self.shortcut
        if shortcut is None:
            return residual
        if (
            residual is not None
            and self._default_shortcut
            and residual.shape[-1] == self._sum_features
        ):
            return (
                residual  # an explicit residual of out_features skips the default linear shortcut
            )
        source = x if residual is None else residual
        if self.shortcut_kind == "linear":
            checks.check_shortcut_input(source, self.in_features)
        return self._project(shortcut, source)

    def _project(self, shortcut: nn.Module, source: Tensor) -> Tensor:
        return shortcut(source)

    def eager(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer by its own submodules, one torch op after another."""
        checks.check_x(x, self.in_features)
        spec = self._specs[self.training]
        r = self._shortcut(x, residual)
        checks.check_residual(spec, x, r, self._sum_features, self.shortcut_kind == "pad")
        rows = x.reshape(-1, self.in_features)
        r = r if r is None else r.reshape(-1, r.shape[-1])
        seed = draw_seed(x.device) if spec.random else None
        norm: Any = self.norm
        y = run_stages(spec, rows, self.linear, norm, self.gate, r, seed, rows_per_sample(x))
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) is what goes into the shortcut, default
        x.
        """
        return self.eager(x, residual)

    def extra_repr(self) -> str:
        words = [f"{self.in_features}, {self.out_features}", f"order={self.order!r}"]
        spec = self._specs[True]
        for name in ("norm", "activation", "gate"):
            words.append(f"{name}={getattr(spec, name)!r}")
        for name, off in (
            ("eps", 1e-5),
            ("dropout", 0.0),
            ("drop_path", 0.0),
            ("residual_scale", 1.0),
        ):
            if getattr(spec, name) != off:
                words.append(f"{name}={getattr(spec, name):g}")
        words += [
            f"bias={self.linear.bias is not None}",
            f"shortcut={self.shortcut_kind!r}",
            f"backend={self.backend!r}",
        ]
        return ", ".join(words)
