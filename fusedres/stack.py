"""Many residual layers of one kind: one module, one parameter of each kind, one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends, chain, checks, wiring
from .checks import Backend
from .dtypes import typed, y_dtype
from .functional import PLAIN, cast_for, run, update_running_statistics
from .layers import activation_name, norm_kind
from .links import LARGEST, autocast_dtype, too_large, unchained
from .modules import FusedResidual
from .operands import Operands
from .reference import SETTINGS, Residual, rows_per_sample, spec_of
from .spec import Gate, Norm, Spec, parse_order, spec_from

_FIXED = ("features", "layers_per_block", "gate_kind")  # parameters have shapes by these
_LAST_ONLY = ("gate", "droppath", "add")  # stages of a block's last layer


def _inner(order: str) -> str:
    """The order of a block's layers before the last."""
    return "-".join(stage for stage in parse_order(order) if stage not in _LAST_ONLY)


class _Kind(NamedTuple):
    """A kind of parameter or buffer of a stack, and where a layer has it."""

    name: str
    owner: str  # the layer's submodule; "": the layer itself
    of_layer: str

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.of_layer}" if self.owner else self.of_layer


_PARAMETERS = (
    _Kind("weight", "linear", "weight"),
    _Kind("bias", "linear", "bias"),
    _Kind("norm_weight", "norm", "weight"),
    _Kind("norm_bias", "norm", "bias"),
    _Kind("gate", "", "gate"),
)
_GATE = 0b1000  # the fifth kind, as a bit: csrc/chain/links.h
_BUFFERS = (
    _Kind("running_mean", "norm", "running_mean"),
    _Kind("running_var", "norm", "running_var"),
    _Kind("num_batches_tracked", "norm", "num_batches_tracked"),
)


class FusedResidualStack(nn.Module):
    """`depth` residual layers of one width, in one call forward and one backward.

    y = x_L,  x_l+1 = act(norm(x_l @ weight[l].T + bias[l])) + x_l         # order "note"

    One parameter of each kind holds all layers', so an optimiser, autograd and the call see five
    tensors instead of five a layer. With `layers_per_block` = B only each B-th layer adds, and what
    it adds is the input of its block of B layers: x + f4(f3(f2(f1(x)))) for 4; the layers before
    have the stages of `order` but ``add``, ``gate`` and ``droppath``.

    Args:
        features: N, the width of x, y and every layer.
        depth: L, the number of layers, a multiple of `layers_per_block`.
        layers_per_block: B.
        recompute: keep only the layers' inputs for backward and compute their products again: half
            the memory for a third more products.
        order, norm, activation, bias, eps, momentum: of each layer, as in FusedResidual.
        gate, gate_init, dropout, drop_path, residual_scale, backend, device, dtype: the same.

    Shapes: x and y (..., N), in parameters' dtype unless autocast casts; parameters ``weight``
    (L, N, N), ``bias``, ``norm_weight``, ``norm_bias`` (L, N), ``gate`` (L / B, 1) or (L / B, N);
    buffers of batch norm ``running_mean``, ``running_var`` (L, N), ``num_batches_tracked`` (L).
    They are initialised layer by layer, as an nn.Sequential of FusedResidual is.

    ``stack[l]`` is layer l, a FusedResidual on views of the parameters, and ``stack[a:b]`` a stack
    of whole blocks on views; both train the stack. `from_layers` and `to_layers` copy; a state_dict
    of an nn.Sequential of layers (``0.linear.weight``, ...) loads, too.

    All layers are one call on a CPU for N <= 512. On a GPU they are where the Triton backend can
    run them. For N = 16, 32, 64, 128 and 256 without dropout, drop-path and batch norm,
    in bfloat16 and float16, under autocast, too (float32: up to 64; 256 for no more rows than one
    wave of programs takes, from Hopper on), it is one launch forward and three backward; else a
    launch or two a layer, and all weights' gradients in few products. Else layers are called one by
    one. `why_not_joined` tells why.

    Raises ValueError for a setting outside these lists, TypeError or ValueError for a tensor that
    does not fit, NotImplementedError where a named backend cannot run a call.

    Source: the layers one by one; He et al., arxiv.org/abs/1512.03385.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate: Tensor | None

    @checks.names_checked
    def __init__(
        self,
        features: int,
        depth: int,
        *,
        layers_per_block: int = 1,
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
        recompute: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        counts = {"features": features, "depth": depth, "layers_per_block": layers_per_block}
        features, depth, layers_per_block = checks.check_feature_counts(op, **counts)
        if depth % layers_per_block:
            raise ValueError(
                f"{op}: depth must be a multiple of layers_per_block={layers_per_block}, "
                f"got {depth}"
            )
        checks.check_backend_name(backend)
        L, N, B = depth, features, layers_per_block
        settings = (order, norm, activation, gate, eps, dropout, drop_path, residual_scale)
        checks.check_settings(op, bias, momentum, gate, gate_init)
        spec = spec_from(*settings, training=True)
        if B > 1 and "add" in spec.prologue:
            raise ValueError(f"{op}: order {order!r} adds before linear; use layers_per_block=1")
        self.features, self.layers_per_block, self.recompute = N, B, recompute
        self.order, self.activation, self.residual_scale = order, activation, residual_scale
        self.dropout, self.drop_path = dropout, drop_path
        self.norm: Any = spec.norm
        self.gate_kind: Any = spec.gate
        self.eps, self.momentum = eps, momentum
        self.backend: Any = backend
        self.gate_init = gate_init
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        gates = (L // B, 1 if spec.gate == "scalar" else N)
        for name, shape in (
            ("weight", (L, N, N)),
            ("bias", (L, N) if bias else None),
            ("norm_weight", (L, N) if spec.norm else None),
            ("norm_bias", (L, N) if spec.norm in ("layer", "batch") else None),
            ("gate", gates if spec.gate else None),
        ):
            made = None if shape is None else nn.Parameter(torch.empty(shape, **where))
            self.register_parameter(name, made)
        batch = spec.norm == "batch"
        self.register_buffer("running_mean", torch.empty(L, N, **where) if batch else None)
        self.register_buffer("running_var", torch.empty(L, N, **where) if batch else None)
        count = torch.empty(L, dtype=torch.long, device=device) if batch else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As an nn.Sequential of FusedResidual layers is initialised, layer by layer."""
        bound = 1 / math.sqrt(self.features)
        for layer in range(len(self)):
            nn.init.kaiming_uniform_(self.weight[layer], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias[layer], -bound, bound)
        gate_init = 0.0 if self.gate_kind == "scalar" else 1e-5
        gate_init = gate_init if self.gate_init is None else self.gate_init
        for name, value in (
            ("norm_weight", 1),
            ("norm_bias", 0),
            ("gate", gate_init),
            ("running_mean", 0),
            ("running_var", 1),
            ("num_batches_tracked", 0),
        ):
            t = getattr(self, name)
            if t is not None:
                t.fill_(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "depth" or (name in _FIXED and name in self.__dict__):
            checks.refuse_assignment(type(self).__name__, name, "make another stack")
        if name == "backend":
            checks.check_backend_name(value)
        value = activation_name(value) if name == "activation" else value
        super().__setattr__(name, value)

    # ---- the call

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) from x (..., N)."""
        checks.check_x(x, self.features, "features")
        given = self._given()
        way = self._way(x, given)
        if not isinstance(way, str):
            rows, text = x if x.dim() == 2 else x.reshape(-1, self.features), self._text(x, given)
            autocast = autocast_dtype(x.device.type)
            if autocast:
                given[:2] = [cast_for(t, autocast) for t in given[:2]]
            operands = [t for t in given if t is not None]
            try:
                y, statistics = chain.run_stacked(
                    rows, text, len(self), self.recompute, operands,
                    self._seeds(), rows_per_sample(x), way.loop,
                )  # fmt: skip
                if statistics is not None:
                    self._update(statistics, rows.shape[0])
                return y if x.dim() == 2 else y.view(x.shape)
            except RuntimeError as error:  # the layers one by one tell more
                checks.check_memory(error)
        return self._one_by_one(x)

    def _specs(self) -> tuple[Spec, Spec]:
        """The recipes of a block's last layer and of those before it, as they are now."""
        rest = self.eps, self.dropout
        last = spec_of(
            self.order, self.norm, self.activation, self.gate_kind, *rest, self.drop_path,
            self.residual_scale, self.training,
        )  # fmt: skip
        if self.layers_per_block == 1:
            return last, last
        inner = _inner(self.order)
        return last, spec_of(
            inner, self.norm, self.activation, None, *rest, 0.0, 1.0, self.training
        )

    def why_not_joined(self, x: Tensor) -> str | None:
        """Why a call with x (..., N) runs layer by layer; None if it is one call."""
        way = self._way(x, self._given())
        return way if isinstance(way, str) else None

    def _given(self) -> list[Any]:
        """The operands as torch looks them up, since one of them may be computed: parameters, and
        running statistics where the norm goes by them.
        """
        by_running = self.norm == "batch" and not self.training
        return [getattr(self, k.name) for k in _PARAMETERS] + [
            getattr(self, k.name) if by_running else None for k in _BUFFERS[:2]
        ]

    def _update(self, statistics: Tensor, M: int) -> None:
        """The running statistics, by the batch's (L, 2, N)."""
        mean, var = statistics.view(len(self), 2, self.features).unbind(1)
        own: Any = (getattr(self, kind.name) for kind in _BUFFERS)
        running_mean, running_var, tracked = own
        update_running_statistics(
            running_mean, running_var, (mean, var), M / (M - 1), M, self.momentum, tracked
        )

    def _way(self, x: Tensor, given: list[Any]) -> chain.Way | str:
        """How one call runs all layers, or why it does not."""
        reason = unchained(x, in_graphs=True)
        if reason is not None:
            return reason
        if self.norm == "batch" and self.training and x.numel() == x.shape[-1]:
            return "a batch norm gets one row"
        N = self.features
        in_graph = is_dynamo_compiling() or is_exporting()  # where rows may be a symbol
        on_cpu = chain.backend_of(x) == "cpu"
        if on_cpu and (N * N > LARGEST or (not in_graph and too_large((N, N), x))):
            return f"weights of {N} x {N} are too large to be packed for x {tuple(x.shape)}"
        for kind, t in zip((*_PARAMETERS, *_BUFFERS[:2]), given, strict=True):
            if t is None:
                continue
            if t.device != x.device or not (is_exporting() or type(t) in PLAIN):
                return f"{kind.name} is a {type(t).__name__} on {t.device}"
            if t.requires_grad and kind in _BUFFERS:
                return f"{kind.name} asks for a gradient"
            if t.dtype not in checks.DTYPES or (kind.name == "bias" and t.dtype != given[0].dtype):
                return f"{kind.name} is {t.dtype}, weight {given[0].dtype}"
        try:
            before, text, product = self._typed(x, given[0].dtype)
        except TypeError:
            return f"weight is {given[0].dtype}, x {x.dtype}"
        if before is None:
            return f"a block makes another dtype of x's {x.dtype}"
        if not on_cpu:
            return chain.way_of(self.backend, self._text(x, given), x, product, N, N)
        chosen = backends.choose(self.backend, text, product, x.device, N, N, False)
        return chain.Way() if chosen == "cpu" else f"the backend is '{chosen}'"

    def _typed(self, x: Tensor, weight: torch.dtype) -> tuple[list[str] | None, str, Any]:
        """The recipes' texts of a block's layers before the last and of the last one, where each
        has its dtypes, and the product's dtype. None in place of the first: blocks differ.
        """
        last, inner = self._specs()
        kind = x.device.type
        autocast = autocast_dtype(kind)
        texts, dtype, product, before = [], x.dtype, weight, self.layers_per_block - 1
        for spec, residual in [(inner, None)] * before + [
            (last, x.dtype if before and last.adds else None)
        ]:
            text = spec.text
            if autocast or dtype != weight or x.dtype != weight:
                text, product = typed(text, dtype, weight, residual, autocast, kind)
            texts.append(text)
            dtype = y_dtype(text, product)
        same = dtype == x.dtype or len(self) == before + 1
        return texts[:-1] if same else None, texts[-1], product

    def _seeds(self) -> int:
        """How many layers drop at random."""
        last, inner = self._specs()
        B = self.layers_per_block
        return len(self) // B * (last.random + (B - 1) * inner.random)

    def _text(self, x: Tensor, given: list[Any]) -> str:
        """The links' lines."""
        inner, last, _ = self._typed(x, given[0].dtype)
        there = sum(1 << i for i, t in enumerate(given[1:]) if t is not None)
        before = [wiring.line_of(there & ~_GATE, 0, text) for text in inner or ()]
        back = len(before) if self._specs()[0].adds else 0
        return "\n".join([*before, wiring.line_of(there, back, last)])

    def _one_by_one(self, x: Tensor) -> Tensor:
        """The layers as so many fused calls."""
        last, inner = self._specs()
        B = self.layers_per_block
        names = [kind.name for kind in (*_PARAMETERS, *_BUFFERS)]
        stacks = {name: getattr(self, name) for name in names}
        # unbind: one gradient of all layers, where indexing would make one of zeros for each
        each = {name: None if t is None else t.unbind() for name, t in stacks.items()}
        tracks = self.training and each["num_batches_tracked"] is not None
        y = source = x
        for layer in range(len(self)):
            source = y if layer % B == 0 else source
            ends = layer % B == B - 1
            own: dict[str, Any] = {
                n: None if t is None else t[layer] for n, t in each.items() if n != "gate"
            }
            count = own.pop("num_batches_tracked")
            gate = each["gate"][layer // B] if ends and each["gate"] is not None else None
            spec = last if ends else inner
            o = Operands(
                y, gate=gate, residual=source if spec.adds and source is not y else None, **own
            )
            tracked = count if tracks else None
            y = run(spec, o, self.momentum, False, self.backend, False, tracked)
        return y

    # ---- layers

    def __len__(self) -> int:
        weight = self._parameters.get("weight")
        return len(self.weight if weight is None else weight)

    def __iter__(self) -> Iterator[FusedResidual]:
        return (self[layer] for layer in range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:
        """Layer `index` on views of the parameters, or a stack of whole blocks."""
        if isinstance(index, slice):
            return self._blocks(index)
        L = len(self)
        if not -L <= index < L:
            raise IndexError(f"{type(self).__name__}: no layer {index}, there are {L}")
        layer = self._empty_layer(index % L)
        for kind, owner, t in self._of_layer(layer, index % L):
            name = kind.of_layer
            if name in owner._parameters and t is not None:
                del owner._parameters[name]
            setattr(owner, name, t)
        return layer

    def _blocks(self, index: slice) -> FusedResidualStack:
        first, last, step = index.indices(len(self))
        B, what = self.layers_per_block, type(self).__name__
        if step != 1 or last <= first or first % B or last % B:
            raise IndexError(
                f"{what}: a slice takes whole blocks of {B}, one after the other, and at least "
                f"one; got [{first}:{last}:{step}] of {len(self)} layers"
            )
        part = FusedResidualStack.__new__(FusedResidualStack)
        nn.Module.__init__(part)
        own = vars(self).items()
        part.__dict__.update({k: v for k, v in own if k not in part.__dict__})
        part.training = self.training
        for kind in (*_PARAMETERS, *_BUFFERS):
            t, per = getattr(self, kind.name), B if kind.name == "gate" else 1
            view = None if t is None else t[first // per : last // per]
            if kind in _BUFFERS:
                part.register_buffer(kind.name, view)
            elif view is None:
                part.register_parameter(kind.name, None)
            else:
                setattr(part, kind.name, view)
        return part

    def _empty_layer(self, index: int) -> FusedResidual:
        """Layer `index` without its parameters."""
        ends = index % self.layers_per_block == self.layers_per_block - 1
        last: dict[str, Any] = {"gate": self.gate_kind, "drop_path": self.drop_path}
        last["residual_scale"] = self.residual_scale
        return FusedResidual(
            self.features,
            order=self.order if ends else _inner(self.order),
            norm=self.norm,
            activation=self.activation,
            bias=self.bias is not None,
            eps=self.eps,
            momentum=self.momentum,
            dropout=self.dropout,
            backend=self.backend,
            device="meta",
            dtype=self.weight.dtype,
            **(last if ends else {}),
        ).train(self.training)

    def _of_layer(self, layer: nn.Module, index: int) -> Iterator[tuple[_Kind, nn.Module, Any]]:
        """What kinds of tensor the layer has, their modules, and what the stack has for each."""
        for kind in (*_PARAMETERS, *_BUFFERS):
            owner: Any = getattr(layer, kind.owner) if kind.owner else layer
            if owner is None or getattr(owner, kind.of_layer, None) is None:
                continue
            entry = index // self.layers_per_block if kind.name == "gate" else index
            t = getattr(self, kind.name)
            yield kind, owner, None if t is None else t[entry]

    def to_layers(self) -> list[FusedResidual]:
        """The layers with copies of the parameters. Without blocks, ``nn.Sequential(*layers)``
        gives the stack's numbers; in a block the last layer is called with the block's input as
        `residual`.
        """
        layers = []
        for index in range(len(self)):
            layer = self._empty_layer(index)
            for kind, owner, t in self._of_layer(layer, index):
                copy = None if t is None else t.detach().clone()
                if copy is not None and kind in _PARAMETERS:
                    copy = nn.Parameter(copy)
                setattr(owner, kind.of_layer, copy)
            layers.append(layer)
        return layers

    @classmethod
    def from_layers(
        cls, layers: Iterable[Residual], *, recompute: bool = False
    ) -> FusedResidualStack:
        """A stack with copies of the parameters of `layers`, Residual or FusedResidual of one kind
        and width. Where only each B-th has an ``add``, blocks are of B layers.

        Raises TypeError or ValueError, which name the layer that does not fit.
        """
        found = list(layers)
        what = f"{cls.__name__}.from_layers"
        for i, layer in enumerate(found):
            if not isinstance(layer, Residual):
                raise TypeError(
                    f"{what}: layer {i} is a {type(layer).__name__}, expected Residual layers"
                )
        B = next((i + 1 for i, layer in enumerate(found) if layer.spec.adds), 0)
        if not B or len(found) % B:
            raise ValueError(
                f"{what}: expected blocks of layers whose last one adds, got {len(found)} layers, "
                f"of which the first that adds is number {B}"
            )
        like: Any = found[B - 1]
        norm: Any = like.norm
        settings = {name: getattr(like, name) for name in SETTINGS}
        kinds: dict[str, Any] = {"gate": like.spec.gate, "backend": like.backend}
        kinds["momentum"] = getattr(norm, "momentum", 0.1)
        kinds["eps"] = 1e-5 if norm is None else like.spec.eps
        weight = like.linear.weight
        stack = cls(
            like.in_features, len(found), layers_per_block=B, recompute=recompute,
            norm=cast(Any, norm_kind(norm)), bias=like.linear.bias is not None,
            device=weight.device, dtype=weight.dtype, **settings, **kinds,
        )  # fmt: skip
        stack.train(like.training)
        with torch.no_grad():
            for i, layer in enumerate(found):
                twin = stack._empty_layer(i)
                same = str(twin.spec) == str(layer.spec) and layer.shortcut is None
                theirs = layer.state_dict()
                own = {kind.path: t for kind, _, t in stack._of_layer(twin, i)}
                shapes = [{k: t.shape for k, t in d.items()} for d in (theirs, own)]
                if not same or shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{what}: layer {i}, {layer}, is not of one kind with layer {B - 1}, {like}"
                    )
                for path, t in own.items():
                    t.copy_(theirs[path])
        return stack

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **more: Any
    ) -> None:
        """Stacks what an nn.Sequential of the same layers had saved."""
        B, L = self.layers_per_block, len(self)
        for kind in (*_PARAMETERS, *_BUFFERS):
            of_layers = range(B - 1, L, B) if kind.name == "gate" else range(L)
            keys = [f"{prefix}{layer}.{kind.path}" for layer in of_layers]
            if getattr(self, kind.name) is not None and all(key in state_dict for key in keys):
                state_dict[prefix + kind.name] = torch.stack([state_dict.pop(k) for k in keys])
        super()._load_from_state_dict(state_dict, prefix, *args, **more)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}: {checks.SCRIPT}")

    def extra_repr(self) -> str:
        words = [f"{self.features}, {len(self)}, layers_per_block={self.layers_per_block}"]
        words += [f"order={self.order!r}, norm={self.norm!r}, activation={self.activation!r}"]
        words += ["recompute=True"] if self.recompute else []
        return ", ".join(words)
