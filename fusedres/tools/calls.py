"""One call of the op, described without running it: what `explain` is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import checks, ops
from ..backends import native, plan
from ..dtypes import typed
from ..operands import Operands
from ..spec import Spec
from .choice import Choice, choose

_NORM_NAMES = {"layer": "layer_norm", "rms": "rms_norm", "batch": "batch_norm"}


@dataclass(frozen=True)
class Call:
    """One call of the op on rows x (M, K) and weight (N, K)."""

    name: str  # "layer", "shortcut", "fc1" or "fc2"
    recipe: str  # str(spec)
    formula: str
    backend: str  # "eager": the layer's own submodules, one by one
    why: str  # it was chosen
    why_not: dict[str, str]  # the other backends that cannot run this call, with the reason
    kernel: str
    tiles: dict[str, Any]
    forward_launches: int | None  # kernels on a GPU, ops on a CPU; None: one a torch operation
    backward_launches: int | None  # at most, with every gradient asked for
    saved: dict[str, int] | None  # bytes kept for backward, without parameters; None: torch decides

    def __str__(self) -> str:
        tiles = "".join(f", {name}={value}" for name, value in self.tiles.items())
        counted = "calls" if self.backend in ("cpu", "reference", "eager") else "launches"
        launches = "one for each torch operation"
        if self.forward_launches is not None:
            launches = f"forward {self.forward_launches}, backward at most {self.backward_launches}"
        saved = "whatever torch's operations save"
        if self.saved is not None:
            parts = ", ".join(f"{name} {readable_size(size)}" for name, size in self.saved.items())
            saved = f"{parts}: {readable_size(sum(self.saved.values()))}" if parts else "nothing"
        lines = [
            f"{self.name}: {self.formula}",
            f"  recipe    {self.recipe}",
            f"  backend   {self.backend}",
            f"  chosen    {self.why}",
            *(f"    not {name}: {reason}" for name, reason in self.why_not.items()),
            f"  kernel    {self.kernel}{tiles}",
            f"  {counted:8}  {launches}",
            f"  saved     {saved}",
        ]
        return "\n".join(lines)


def readable_size(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} {unit}"


def formula(spec: Spec, bias: bool = True, shortcut: str = "x") -> str:
    """The recipe as a formula: "y = relu(layer_norm(x @ W.T + b)) + x"."""
    t, loose = "x", False  # loose: wants brackets inside a product
    for stage in spec.stages:
        inner = f"({t})" if loose else t
        if stage == "linear":
            t = f"{inner} @ W.T" + (" + b" if bias else "")
        elif stage == "norm":
            t = f"{_NORM_NAMES[str(spec.norm)]}({t})"
        elif stage == "act":
            t = f"{spec.activation}({t})"
        elif stage == "gate":
            t = f"gate * {inner}"
        elif stage == "dropout":
            t = f"dropout({t}, {spec.dropout:g})"
        elif stage == "droppath":
            t = f"drop_path({t}, {spec.drop_path:g})"
        else:
            scale = "" if spec.residual_scale == 1.0 else f"{spec.residual_scale:g} * "
            t = f"{t} + {scale}{shortcut}"
        loose = stage in ("linear", "gate", "add")
    return f"y = {t}"


@dataclass(frozen=True)
class Context:
    """What the calls of one explanation have in common."""

    rows: tuple[int, ...]  # x's leading dimensions
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    composite: bool
    grad: bool
    residual_dtype: torch.dtype | None = None  # None: x's

    @property
    def autocast(self) -> torch.dtype | None:
        """Its dtype where it is on."""
        on = self.device.type != "meta" and torch.is_autocast_enabled(self.device.type)
        return torch.get_autocast_dtype(self.device.type) if on else None

    @property
    def dtype(self) -> torch.dtype:
        """A product's."""
        double = self.weight_dtype == torch.float64
        return self.weight_dtype if double or self.autocast is None else self.autocast

    def typed(self, spec: Spec, residual: bool = False) -> tuple[Spec, torch.dtype, torch.dtype]:
        """The recipe with dtypes in it, the product's and y's."""
        third = self.residual_dtype if residual else None
        given = self.x_dtype, self.weight_dtype, third, self.autocast, self.device.type
        recipe, dtype = typed(spec.text, *given)
        spec = Spec.parse(recipe)
        return spec, dtype, getattr(torch, spec.y_dtype) if spec.y_dtype else dtype

    def call(
        self,
        name: str,
        spec: Spec,
        K: int,
        N: int,
        backend: str,
        *,
        bias: bool = True,
        residual: int | None = None,  # features of an explicit residual or of a shortcut's value
        shortcut: str = "x",
        pad: bool = False,
        eager: bool = False,
    ) -> Call:
        M = math.prod(self.rows)
        _check(spec, (*self.rows, K), self.x_dtype, self.weight_dtype, N, residual, pad)
        spec, dtype, _ = self.typed(spec, residual is not None)
        if eager:
            choice = Choice("eager", "by the layer, which calls its submodules", {})
        elif self.composite:
            told = "under a function transform or for a tensor subclass torch's own operations run"
            choice = Choice("reference", told, {})
        else:
            choice = choose(backend, spec, dtype, self.device, M, N, K)
        chosen = choice.backend
        size, exact = dtype.itemsize, 8 if dtype == torch.float64 else 4
        reads_x = not spec.casts or (residual is None and spec.saves_residual)
        third = self.residual_dtype or self.x_dtype
        kernel, tiles = _kernel(chosen, spec, dtype, M, N, K, self.device)
        saved: dict[str, int] | None = None
        forward = backward = None
        if chosen in ops.FORWARD:
            own, sizes = residual is not None, (dtype, M, N, K)
            forward = 1 + (chosen == "vendor" and bool(spec.epilogue or spec.y_dtype))
            apart = chosen == "triton" and plan.is_apart(spec, M, N, K)
            forward += apart or (chosen == "vendor" and bool(spec.prologue))
            backward = _backward_launches(chosen, spec, bias, own, *sizes, self.device)
            saved = {
                "x": M * K * self.x_dtype.itemsize if reads_x else 0,
                "cast of x": M * K * size if spec.casts else 0,
                "casts of parameters": (K + bias) * N * size if self.weight_dtype != dtype else 0,
                "residual": M * (residual or 0) * third.itemsize if spec.saves_residual else 0,
                "z": M * N * size if spec.saves_z else 0,
                "batch statistics": 2 * spec.width("norm", K, N) * exact if spec.batch_stats else 0,
                "row statistics": _row_statistics(chosen, spec, M),
                "seed": 8 if spec.random else 0,
            }
            saved = {what: n for what, n in saved.items() if n} if self.grad else {}
        text = formula(spec, bias, shortcut)
        return Call(name, str(spec), text, *choice, kernel, tiles, forward, backward, saved)


def _check(
    spec: Spec,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    N: int,
    residual: int | None,
    pad: bool,
) -> None:
    """Raises what the call would raise."""
    empty = partial(torch.empty, dtype=dtype, device="meta")
    K = shape[-1]
    gate = {None: None, "scalar": 1, "channel": spec.width("gate", K, N)}[spec.gate]
    running = empty(spec.width("norm", K, N)) if spec.norm == "batch" else None
    o = Operands(
        empty(shape),
        empty((N, K), dtype=weight_dtype),
        gate=None if gate is None else empty(gate),
        residual=None if residual is None else empty((*shape[:-1], residual)),
        running_mean=running,
        running_var=running,
    )
    checks.check_call(spec, o, pad)


def _kernel(
    backend: str, spec: Spec, dtype: torch.dtype, M: int, N: int, K: int, device: torch.device
) -> tuple[str, dict[str, Any]]:
    if backend == "triton":
        chosen = plan.plan(spec, dtype, M, N, K, plan.device_of(device))
        tiles = {
            **chosen.tile.options(dtype.itemsize),
            "programs": chosen.programs,
            "shared memory": readable_size(chosen.shared),
            "waves": round(chosen.waves, 2),
        }
        first = "residual_prologue_kernel, then " if chosen.apart else ""
        return f"{first}{chosen.kernel} ({chosen.family})", tiles
    if backend.startswith("cuda") and native.extension is not None:
        from ..backends import cuda

        name, tiles = cuda.kernel(spec, dtype, M, N, K, device)
        shared: Any = tiles.pop("shared")
        return name, tiles | {"shared memory": readable_size(shared)}
    if backend == "vendor":
        first = "residual_prologue_kernel, then " if spec.prologue else ""
        last = ", then residual_finish_kernel" if spec.epilogue or spec.y_dtype else ""
        return f"{first}the library's product{last}", {}
    if backend == "cpu" and native.extension is not None:
        tiles = native.extension.plan(M, N, K, str(dtype).removeprefix("torch."))
        return "fusedres::residual_forward (C++)", tiles
    return "torch operations, one after another", {}


def _row_statistics(backend: str, spec: Spec, M: int) -> int:
    """Bytes of mean and rstd of each row, which the backends of GPUs save."""
    return 8 * M if backend != "cpu" and spec.norm in ("layer", "rms") else 0


def _backward_launches(
    backend: str,
    spec: Spec,
    bias: bool,
    own_residual: bool,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    device: torch.device,
) -> int:
    if backend == "cpu":
        return 1
    if backend == "cuda":
        return 2
    from ..backends import triton

    sizes = (dtype, M, N, K, plan.device_of(device))
    return len(triton.backward_launches(spec, bias, own_residual, *sizes))
