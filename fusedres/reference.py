"""The residual layer in plain torch: the formula every kernel is tested against.

    z = x @ weight.T + bias
    y = act(norm(z)) + residual_scale * residual         # order "note"

`composite` does every order: it is the oracle (in float64), the "reference" backend, and what runs
under function transforms and in double backward. `Residual` is the same layer as a module that
calls its submodules one by one: the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import checks
from .checks import Backend
from .layers import activation_name, first_parameter, hooked, norm_eps, norm_kind
from .operands import Operands
from .spec import ACTIVATIONS, SHORTCUTS, Gate, Norm, Shortcut, Spec, make_spec, one_of, spec_from
from .tracing import by_value

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
    "hardsigmoid": lambda h: F.relu6(h + 3) / 6,  # F.hardsigmoid's float64 gradient is 1/6 in fp32
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "softsign": F.softsign,
}

ELEMENT_STREAM, SAMPLE_STREAM = 0, 1  # third word of the Philox counter: dropout, drop-path


def philox(seed: Tensor, index: Tensor, stream: int) -> Tensor:
    """First 32-bit word of Philox4x32-10, as int64, for each element of `index`.

    Key: the 64 bits of `seed`. Counter: (index low, index high, stream, 0). The 64-bit products
    wrap, which leaves their bits right. Source: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3" (SC 2011).
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
    """(1,) int64 from torch's generator of `device`: torch.manual_seed makes masks repeat."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """(count,): as so many calls of draw_seed."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)


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


def composite(
    spec: Spec,
    o: Operands,
    momentum: float = 0.1,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Every order in plain torch, differentiable any number of times. Returns y (M, N).

    Batch norm by this batch's statistics updates o.running_mean and o.running_var in place, as
    nn.BatchNorm1d does. A recipe with dtypes in it is computed in these, without autocast; what
    follows ``linear`` in y's, which is no less exact than eager. `product`: instead of ``linear``.
    """
    y_dtype = None if spec.y_dtype is None else getattr(torch, spec.y_dtype)

    def plain_norm(t: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        if spec.norm == "batch":
            mean, var = o.running_mean, o.running_var
            return F.batch_norm(t, mean, var, w, b, spec.batch_stats, momentum, spec.eps)
        float32 = all(p is None or p.dtype == torch.float32 for p in (w, b))
        if not (float32 and t.is_cpu and t.itemsize == 2):  # torch takes such as they are
            w, b = (p if p is None else p.to(t.dtype) for p in (w, b))
        if spec.norm == "layer":
            return F.layer_norm(t, t.shape[-1:], w, b, spec.eps)
        h = F.rms_norm(t, t.shape[-1:], w, spec.eps)
        return h if b is None else h + b.to(h.dtype)

    def norm(t: Tensor) -> Tensor:
        if is_dynamo_compiling():  # torch 2.11 to 2.15 cannot compile the jvp of affine norms
            h = plain_norm(t, None, None)
            h = h if o.norm_weight is None else h * o.norm_weight.to(t.dtype)
            return h if o.norm_bias is None else h + o.norm_bias.to(t.dtype)
        return plain_norm(t, o.norm_weight, o.norm_bias)

    def linear(t: Tensor) -> Tensor:
        if product is not None:
            z = product(t)
        else:
            z = F.linear(t.to(o.weight.dtype) if spec.dtypes else t, o.weight, o.bias)
        return z if y_dtype is None else z.to(y_dtype)

    return run_stages(spec, o.x, linear, norm, o.gate, o.residual, o.seed, o.sample_rows)


def rows_per_sample(x: Tensor) -> int:
    """How many rows of x.reshape(-1, K) belong to one index of x's first dimension."""
    rows = 1
    for size in x.shape[1:-1]:
        rows *= size
    return max(rows, 1)


def spec_of(*settings: Any) -> Spec:
    """make_spec; dynamo traces it, since it cannot hold an object that it did not see being
    made.
    """
    return (
        make_spec.__wrapped__(*by_value(settings))
        if is_dynamo_compiling()
        else spec_from(*settings)
    )


# What a layer takes its recipe from besides `norm` and `gate`.
SETTINGS = ("order", "activation", "dropout", "drop_path", "residual_scale")
# What became of the other settings.
_INSTEAD = {
    "eps": "set .norm.eps",
    "momentum": "set .norm.momentum",
    "bias": "set .linear.bias",
    "gate_init": "write into .gate",
}


def asked_of(norm: Any, gate: Tensor | None, x: Tensor | None) -> tuple[Any, ...]:
    """What else of a layer may change its recipe for x from call to call."""
    eps = None if norm is None else getattr(norm, "eps", None)
    if eps is None and norm is not None:
        eps = norm_eps(norm, getattr(x, "dtype", None))
    return type(norm), eps, 0 if gate is None else gate.numel()


class Residual(nn.Module):
    """The residual layer stage by stage, by torch's own ops: the reference, and the baseline.

    y = act(norm(x @ weight.T + bias)) + x, or another order. Same arguments, parameters, results
    and errors as ``fusedres.FusedResidual``, whose docstring lists them; `backend` is kept for
    it and unused here.

    Shapes: x (..., K), residual (..., R) as the shortcut takes it, y (..., N); floating dtypes.

    Source: He et al., "Deep residual learning for image recognition", arxiv.org/abs/1512.03385.
    """

    @checks.names_checked
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        order: str = "note",
        norm: Norm | None = "layer",
        activation: str | None = "relu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gate: Gate | None = None,
        gate_init: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        shortcut: Shortcut | nn.Module | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K, N = in_features, in_features if out_features is None else out_features
        op = type(self).__name__
        K, N = checks.check_feature_counts(op, in_features=K, out_features=N)
        checks.check_backend_name(backend)
        checks.check_settings(op, bias, momentum, gate, gate_init)
        self._features, self.backend = (K, N), backend
        self._specs: dict[bool, Spec] = {}
        self._asked: Any = None  # what _specs were made from
        settings = (order, norm, activation, gate, eps, dropout, drop_path, residual_scale)
        spec = spec_from(*settings, training=True)
        self.order, self.activation, self.residual_scale = order, activation, residual_scale
        self.dropout, self.drop_path = dropout, drop_path
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

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def _init_shortcut(self, shortcut: str | nn.Module | None, where: dict[str, Any]) -> None:
        spec = self.spec
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
                f"{self.in_features} features to {self._sum_features}; use shortcut='linear'"
            )
        if shortcut == "linear":
            self.shortcut = nn.Linear(self.in_features, self._sum_features, **where)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _INSTEAD:
            checks.refuse_assignment(type(self).__name__, name, _INSTEAD[name])
        if name not in SETTINGS:
            if name == "backend":
                checks.check_backend_name(value)
            super().__setattr__(name, value)
            return
        # not by nn.Module, which would take an nn.GELU() for a child
        value = activation_name(value) if name == "activation" else value
        own: dict[str, Any] = self.__dict__
        settings = {key: own[key] for key in SETTINGS if key in own} | {name: value}
        spec_from(**settings, training=True)  # refuses nonsense, as in the constructor
        own[name], own["_asked"] = value, None

    @property
    def in_features(self) -> int:
        """K of ``self.linear`` as it is now; of the construction if it does not tell."""
        return getattr(self.linear, "in_features", 0) or self._features[0]

    @property
    def out_features(self) -> int:
        """N of ``self.linear`` as it is now; of the construction if it does not tell."""
        return getattr(self.linear, "out_features", 0) or self._features[1]

    @property
    def _sum_features(self) -> int:
        spec = self.spec
        return spec.width("add", self.in_features, self.out_features) if spec.adds else 0

    @property
    def spec(self) -> Spec:
        """The recipe as the layer would run now: settings and children as they are, see train()."""
        return self._recipe(asked_of(self.norm, self.gate, first_parameter(self.linear)))

    def _recipe(self, asked: tuple[Any, ...]) -> Spec:
        """The recipe of a call now, made anew only where something changed."""
        if asked == self._asked:
            return self._specs[self.training]
        _, eps, size = asked
        norm = norm_kind(self.norm)
        kind = None if size == 0 else "scalar" if size == 1 else "channel"
        eps = eps if isinstance(eps, Real) else 1e-5  # of a foreign norm
        settings = (self.order, norm, self.activation, kind, eps, self.dropout, self.drop_path)
        specs = {t: spec_of(*settings, self.residual_scale, t) for t in (False, True)}
        if not is_dynamo_compiling():  # a graph is made once
            self._specs, self._asked = specs, asked
        return specs[self.training]

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
            return residual  # one of the sum's width skips the default linear shortcut
        source = x if residual is None else residual
        if isinstance(shortcut, nn.Linear):
            checks.check_shortcut_input(source, shortcut.in_features)
        return self._project(shortcut, source)

    def _project(self, shortcut: nn.Module, source: Tensor) -> Tensor:
        return shortcut(source)

    def eager(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer by its own submodules, one torch op after another."""
        if not hooked(self.linear.__dict__):  # which may take another x: a shard of it, say
            checks.check_x(x, self.in_features)
        spec = self.spec
        r = self._shortcut(x, residual)
        checks.check_residual(spec, x, r, self._sum_features, self.shortcut_kind == "pad")
        rows = x.reshape(-1, x.shape[-1])
        r = r if r is None else r.reshape(-1, r.shape[-1])
        seed = draw_seed(x.device) if spec.random else None
        norm: Any = self.norm
        y = run_stages(spec, rows, self.linear, norm, self.gate, r, seed, rows_per_sample(x))
        return y.view(*x.shape[:-1], y.shape[-1])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` (..., R) goes into the shortcut, default x."""
        return self.eager(x, residual)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}: {checks.SCRIPT}")

    def extra_repr(self) -> str:
        words = [f"{self.in_features}, {self.out_features}", f"order={self.order!r}"]
        spec = self.spec
        for name in ("norm", "activation", "gate"):
            words.append(f"{name}={getattr(spec, name)!r}")
        for name, off in (
            ("eps", 1e-5),
            ("dropout", 0.0),
            ("drop_path", 0.0),
            ("residual_scale", 1.0),
        ):
            value = getattr(spec if name == "eps" else self, name)
            if value != off:
                words.append(f"{name}={value:g}")
        words += [
            f"bias={getattr(self.linear, 'bias', None) is not None}",
            f"shortcut={self.shortcut_kind!r}",
            f"backend={self.backend!r}",
        ]
        return ", ".join(words)
