"""The residual block of two matmuls: two fused calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn

from . import chain, checks
from .checks import Backend
from .glu import glu as gated_unit
from .layers import activation_name
from .links import NARROW, Part, joined, links_of, unchained
from .modules import FusedResidual, project
from .spec import STAGES, Gate, Norm, make_spec, one_of, unknown_stage

MLP_ORDERS = {
    "prenorm": "norm-linear-act-linear-add",
    "postnorm": "linear-act-linear-add-norm",
    "branch-norm": "linear-act-linear-norm-add",
    "bro": "linear-norm-act-linear-norm-add",
    "note": "linear-norm-act-linear-norm-act-add",
    "resnet-v1": "linear-norm-act-linear-norm-add-act",
    "preact": "norm-act-linear-norm-act-linear-add",
}

MLP_SHORTCUTS = ("identity", "linear")
# What a block hands to its layers, and what their shapes come from.
_OF_LAYERS = ("norm", "activation", "bias", "eps", "momentum", "gate", "gate_init", "dropout",
              "hidden_dropout", "drop_path", "residual_scale")  # fmt: skip
_FIXED = ("features", "hidden_features", "out_features", "order", "adds", "glu")


def split_order(order: str) -> tuple[str, str]:
    """The orders of the two fused layers that make up an order of two matmuls.

    Stages between the matmuls join the first layer's epilogue; from the first one on that this
    layer has already, they are the second layer's prologue.
    """
    if not isinstance(order, str):
        raise ValueError(f"fusedres: order must be a string of two 'linear' stages, got {order!r}")
    stages = MLP_ORDERS.get(order, order).split("-")
    for stage in stages:
        if stage not in STAGES:
            raise unknown_stage(stage, order, MLP_ORDERS)
    if stages.count("linear") != 2:
        raise ValueError(
            f"fusedres: order {order!r} has {stages.count('linear')} 'linear' stages; "
            f"this block needs two, FusedResidual one"
        )
    first = stages.index("linear")
    second = stages.index("linear", first + 1)
    for stage in ("gate", "droppath", "add"):
        if stage in stages[:second]:
            raise ValueError(
                f"fusedres: stage {stage!r} must follow the second 'linear' in order {order!r}"
            )
    for cut in range(second, first, -1):
        halves = stages[:cut], stages[cut:]
        if all(len(set(half)) == len(half) for half in halves):
            return "-".join(halves[0]), "-".join(halves[1])
    raise ValueError(f"fusedres: order {order!r} does not split into two layers of distinct stages")


def gated_halves(order: str) -> tuple[str, str]:
    """What split_order gives, without the ``act`` between the matmuls: the gated unit is that one.

    Raises ValueError for an order that has anything else there.
    """
    split_order(order)
    stages = MLP_ORDERS.get(order, order).split("-")
    first = stages.index("linear")
    second = stages.index("linear", first + 1)
    if stages[first + 1 : second] != ["act"]:
        raise ValueError(
            f"fusedres: glu=True needs 'act' alone between the two 'linear', got order {order!r}"
        )
    return "-".join(stages[: first + 1]), "-".join(stages[second:])


class FusedResidualMLP(nn.Module):
    """The residual block of two matmuls, W1 (hidden, K) and W2 (N, hidden), in two fused calls.

    | order         | y                                   | where it is found                   |
    | ------------- | ----------------------------------- | ----------------------------------- |
    | "prenorm"     | r + drop(gate * W2 act(W1 norm(x))) | ViT, ConvNeXt, SimBa, RTDL's ResNet |
    | "postnorm"    | norm(r + drop(W2 act(W1 x)))        | BERT, the first transformer         |
    | "branch-norm" | r + norm(W2 act(W1 x))              | mesh graph nets                     |
    | "bro"         | r + norm(W2 act(norm(W1 x)))        | BRO                                 |
    | "note"        | r + act(norm(W2 act(norm(W1 x))))   | the note's layer, twice             |
    | "resnet-v1"   | act(r + norm(W2 act(norm(W1 x))))   | ResNet                              |
    | "preact"      | r + W2 act(norm(W1 act(norm(x))))   | ResNet v2; PINNs with norm=None     |

    W x stands for ``x @ weight.T + bias``, r for ``residual_scale`` times the shortcut of x. Any
    other string of FusedResidual's stages with two ``linear`` is an order, too. Every ``norm`` is
    of the same kind with parameters of its own.

    Args:
        features: K, the size of x's last dimension.
        hidden_features: the width between the matmuls, default ``4 * features``.
        out_features: N, default K.
        order: an alias of the table or a string of stages.
        hidden_dropout: probability of dropout before the second matmul, in training: the first
            layer's last stage, unless the order says where. ViT has it, and RTDL's ResNet (there
            norm="batch", activation="relu").
        dropout, drop_path, gate, gate_init, residual_scale: of the branch and shortcut, at the sum.
        shortcut: "identity" (default where K = N), "linear" (default where not: parameters
            ``shortcut.weight`` (N, K) and ``shortcut.bias``) or a module. "identity" with K != N
            makes `residual` required.
        glu: a gated linear unit, ``act(a) * b``, in the place of ``act(z)``: SwiGLU with
            activation="silu", GEGLU with "gelu", ReGLU with "relu". ``fc1.linear`` gives ``2 *
            hidden_features`` (its weight is (2 hidden, K)), a is their first half; torch's F.glu
            and timm's GluMlp activate the second. Orders with ``act`` alone between the matmuls.
        norm, activation, bias, eps, momentum, backend, device, dtype: as in FusedResidual.

    Shapes: x (..., K), residual (..., N) or what the shortcut takes, y (..., N); floating dtypes.

    State-dict keys: those of the FusedResidual layers ``fc1`` and ``fc2`` (``fc1.linear.weight``,
    those of a norm where it stands, ``fc2.gate``, ...), and ``shortcut.*``.

    Raises ValueError for a setting outside these lists, TypeError or ValueError for a tensor that
    does not fit, NotImplementedError where a named backend cannot run a call.

    Sources: https://arxiv.org/abs/2010.11929 (ViT), https://arxiv.org/abs/2106.11959 (RTDL),
    https://arxiv.org/abs/1810.04805 (BERT), https://arxiv.org/abs/2405.16158 (BRO),
    https://arxiv.org/abs/2002.05202 (GLU).
    """

    @checks.names_checked
    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        order: str = "prenorm",
        norm: Norm | None = "layer",
        activation: str | None = "gelu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gate: Gate | None = None,
        gate_init: float | None = None,
        hidden_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        shortcut: Literal["identity", "linear"] | nn.Module | None = None,
        glu: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        (K,) = checks.check_feature_counts(op, features=features)
        H, N = checks.check_feature_counts(
            op,
            hidden_features=4 * K if hidden_features is None else hidden_features,
            out_features=K if out_features is None else out_features,
        )
        checks.check_settings(op, bias, momentum, gate, gate_init)
        first, second = self._halves(order, glu, activation)
        self.features, self.hidden_features, self.out_features, self.order = K, H, N, order
        self.glu = glu
        self._activation = activation or ""  # what the gated unit names
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        settings: dict[str, Any] = {
            "norm": norm,
            "activation": activation,
            "bias": bias,
            "eps": eps,
            "momentum": momentum,
            "backend": backend,
            **where,
        }
        self._backend = backend
        if glu:  # it acts behind the unit, where no layer's stages reach
            make_spec("linear-dropout", dropout=hidden_dropout)  # raises if it is no probability
        self.hidden_drop = nn.Dropout(float(hidden_dropout)) if glu else None
        its = {"order": first, "dropout": 0.0 if glu else hidden_dropout, **settings}
        self.fc1 = FusedResidual(K, 2 * H if glu else H, **its)
        self.fc2 = FusedResidual(
            H,
            N,
            order=second,
            gate=gate,
            gate_init=None if gate is None else gate_init,
            dropout=dropout,
            drop_path=drop_path,
            residual_scale=residual_scale,
            shortcut="identity",
            **settings,
        )
        self.adds = "add" in second.split("-")
        self._default_shortcut = shortcut is None
        if shortcut is None:
            shortcut = "linear" if K != N else "identity"
        self.shortcut: nn.Module | None
        self.register_module("shortcut", None)
        if isinstance(shortcut, nn.Module):
            self.shortcut = shortcut
        elif one_of("shortcut", shortcut, MLP_SHORTCUTS) == "linear" and self.adds:
            self.shortcut = nn.Linear(K, N, **where)

    @staticmethod
    def _halves(order: str, glu: bool, activation: object) -> tuple[str, str]:
        if not isinstance(glu, bool):
            raise TypeError(f"fusedres: glu must be True or False, got {glu!r}")
        if glu and activation is None:
            raise ValueError("fusedres: glu=True needs an activation, 'silu' say, got None")
        return gated_halves(order) if glu else split_order(order)

    @property
    def backend(self) -> str:
        """Of both layers and of a linear shortcut; may be assigned."""
        return self._backend

    @backend.setter
    def backend(self, name: Backend) -> None:
        checks.check_backend_name(name)
        self._backend = self.fc1.backend = self.fc2.backend = name

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_LAYERS:
            gated = name == "hidden_dropout" and self.__dict__.get("glu")
            where = "set .hidden_drop.p" if gated else "set it of .fc1 and .fc2"
            checks.refuse_assignment(type(self).__name__, name, where)
        if name in _FIXED and name in self.__dict__:
            checks.refuse_assignment(type(self).__name__, name, "make another block")
        super().__setattr__(name, value)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (..., N) from x (..., K); `residual` is what goes into the shortcut, default x.

        A residual (..., N) skips the default linear shortcut.
        """
        checks.check_x(x, self.features, "features")
        checks.check_tensor("residual", residual, optional=True)
        joins = residual is None and chain.backend_of(x) == "cpu" and unchained(x) is None
        parts = self.parts() if joins else None
        if parts is not None:
            links = links_of(parts, x)
            y = joined(x, links) if len(links) == len(parts) else None
            if y is not None:
                return y
        if self.adds:
            residual = self._shortcut(x, residual)
        return self.fc2(self._hidden(x), residual)

    def _hidden(self, x: Tensor) -> Tensor:
        """What the second matmul gets, (..., hidden)."""
        z = self.fc1(x)
        if self.hidden_drop is None:
            return z
        return self.hidden_drop(gated_unit(z, self._activation, self.backend))

    def parts(self) -> list[Part] | None:
        """Its two layers, where they are all that a call with x alone is, and narrow enough for one
        call to be faster than two.
        """
        if self.glu:
            return None
        if self.adds and (self.shortcut is not None or self.features != self.out_features):
            return None
        if self.features * self.hidden_features > NARROW:
            return None
        return [Part(self.fc1), Part(self.fc2, 1)]

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def _shortcut(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            checks.check_dense("residual", residual)
        fits = residual is not None and residual.shape[-1] == self.out_features
        if residual is not None and fits and self._default_shortcut:
            return residual
        source = x if residual is None else residual
        shortcut: Any = self.shortcut
        if shortcut is None:
            if residual is None and self.features != self.out_features:
                checks.residual_required(self.features, self.out_features)
            return source
        if isinstance(shortcut, nn.Linear):
            checks.check_shortcut_input(source, shortcut.in_features)
        return project(shortcut, source, self.backend)

    @classmethod
    def from_layers(
        cls,
        linear1: nn.Linear,
        linear2: nn.Linear,
        norm: nn.Module | Sequence[nn.Module] | None = None,
        activation: str | nn.Module | None = None,
        *,
        order: str = "prenorm",
        gate: Gate | nn.Parameter | None = None,
        gate_init: float | None = None,
        hidden_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        shortcut: Literal["identity", "linear"] | nn.Module | None = None,
        glu: bool = False,
        backend: Backend = "auto",
    ) -> FusedResidualMLP:
        """A block that shares the parameters of the given layers (the same modules become its
        layers' submodules).

        Args:
            linear1, linear2: the nn.Linear (K to hidden, with `glu` to 2 hidden) and (hidden to N).
            norm: an nn.LayerNorm, nn.RMSNorm or nn.BatchNorm1d; a pair of them for orders with two.
            activation: a name, a torch.nn module such as nn.GELU(), or None.
            gate: as the constructor's, or the nn.Parameter of a LayerScale, which is shared.
            order, gate_init, hidden_dropout, dropout, drop_path: as the constructor's.
            residual_scale, shortcut, glu, backend: as the constructor's.

        Raises TypeError or ValueError where a layer does not fit.
        """
        op, halves = f"{cls.__name__}.from_layers", cls._halves(order, glu, activation)
        for name, linear in (("linear1", linear1), ("linear2", linear2)):
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{op}: {name} must be an nn.Linear, got {type(linear).__name__}")
        (K, H), (h, N) = ((f.in_features, f.out_features) for f in (linear1, linear2))
        if h * (1 + glu) != H:
            twice = ", glu=True needs twice as many" if glu else ""
            raise ValueError(f"{op}: linear2 takes {h} features, linear1 gives {H}{twice}")
        several = isinstance(norm, (list, tuple, nn.ModuleList))
        norms: list[Any] = [] if norm is None else list(cast(Any, norm)) if several else [norm]
        wanted = sum("norm" in half.split("-") for half in halves)
        if norms and len(norms) != wanted:
            raise ValueError(f"{op}: order '{order}' needs {wanted} norms, got {len(norms)}")
        left = iter(norms)
        weight = linear1.weight
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        gating = activation_name(activation) if glu else None
        block = cls(
            K, h, N, order=order, norm=None, activation=gating, hidden_dropout=hidden_dropout,
            shortcut=shortcut, glu=glu, backend=backend, device="meta",
        )  # fmt: skip
        if isinstance(block.shortcut, nn.Linear) and block.shortcut is not shortcut:
            block.shortcut = nn.Linear(K, N, **where)
        head = {"dropout": 0.0 if glu else hidden_dropout}
        tail: dict[str, Any] = {
            "gate": gate, "gate_init": gate_init, "dropout": dropout, "drop_path": drop_path,
            "residual_scale": residual_scale, "shortcut": "identity",
        }  # fmt: skip
        block.fc1, block.fc2 = (
            FusedResidual.from_layers(
                linear, next(left, None) if "norm" in half.split("-") else None, activation,
                order=half, backend=backend, **its,
            )
            for linear, half, its in zip(
                (linear1, linear2), halves, (head, tail), strict=True
            )
        )  # fmt: skip
        return block.train(linear1.training)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(f"FusedResidualMLP: {checks.SCRIPT}")

    def extra_repr(self) -> str:
        glu = f", glu={self._activation}" if self.glu else ""
        widths = f"{self.features}, {self.hidden_features}, {self.out_features}"
        return f"{widths}, order={self.order!r}{glu}"
