"""What a call must look like. A message says op, argument, what came and what was expected.

Inside the package nothing checks again: code behind these functions assumes.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from .operands import Operands
from .spec import Spec, meant, one_of

OP = "fused_residual"
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_TENSORS = (*Operands._fields[:-1], "dy", "z", "stats")
_SEED = _TENSORS.index("seed")


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_memory(error: RuntimeError) -> None:
    """Raises torch's own error where a C++ op found no memory: the stable ABI cannot throw it."""
    if "fusedres: CUDA out of memory" in str(error):
        raise torch.OutOfMemoryError(str(error)) from error


def check_feature_counts(op: str, **counts: Any) -> list[int]:
    """The counts as ints, if they are positive integers of any kind."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{op}: {name} must be a positive int, got {value!r}")
    return [int(value) for value in counts.values()]


_Init = TypeVar("_Init", bound=Callable[..., None])


def names_checked(init: _Init) -> _Init:
    """A constructor that refuses an argument it does not have by the layer's name, and asks which
    was meant.
    """
    known = tuple(inspect.signature(init).parameters)[1:]

    @wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__}: unknown argument {name!r}; {meant(name, known)}"
                    f"known: {', '.join(known)}"
                )
        init(self, *args, **settings)

    return cast(_Init, checked)


def check_settings(op: str, bias: Any, momentum: Any, gate: Any, gate_init: Any) -> None:
    """Those that would be taken for something else or, with a warning, for nothing: from a
    constructor.
    """
    if not isinstance(bias, (bool, Integral)) and type(bias).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{op}: bias must be True or False, got {bias!r}")
    if momentum is not None and not (isinstance(momentum, Real) and 0 <= float(momentum) <= 1):
        raise ValueError(f"{op}: momentum must be None or between 0 and 1, got {momentum!r}")
    if gate is None and gate_init is not None:
        told = f"{op}: gate_init={gate_init!r} does nothing, since gate is None"
        warnings.warn(told, stacklevel=4)  # past names_checked


def refuse_assignment(op: str, name: str, instead: str) -> NoReturn:
    """Of what only the constructor reads: to assign it would change nothing, or half of it."""
    raise AttributeError(f"{op}: {name} cannot be assigned, it is the constructor's; {instead}")


SCRIPT = (
    "torch.jit.script cannot read this layer; use torch.jit.trace or torch.export, or script "
    "torch.nn modules"
)


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    if isinstance(value, Tensor) or (optional and value is None):
        return
    if type(value).__name__ == "Proxy":
        raise TypeError(
            f"{OP}: {name} is a torch.fx.Proxy; torch.fx.symbolic_trace cannot look into this "
            f"layer: make it a leaf (Tracer.is_leaf_module), or use torch.export"
        )
    expected = "a torch.Tensor or None" if optional else "a torch.Tensor"
    raise TypeError(f"{OP}: {name} must be {expected}, got {type(value).__name__}")


def check_dense(name: str, t: Tensor) -> None:
    if t.is_nested or t.layout != torch.strided:
        came = "a nested tensor" if t.is_nested else str(t.layout)
        raise TypeError(f"{OP}: {name} must be dense (torch.strided), got {came}")


def check_all_dense(o: Operands) -> None:
    """Apart from check_call, as every call would pay for it."""
    for name, t in zip(_TENSORS, o, strict=False):
        if isinstance(t, Tensor):
            check_dense(name, t)


def _check_vector(
    name: str, value: Tensor | None, size: int, meaning: str, device: torch.device
) -> None:
    if value is None:
        return
    check_tensor(name, value)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{OP}: {name} has shape {_shape(value)}, expected ({size},), {meaning}")
    if not value.is_floating_point():
        raise TypeError(f"{OP}: {name} has dtype {value.dtype}, expected a floating dtype")
    if value.device != device:
        raise ValueError(f"{OP}: {name} is on {value.device}, x is on {device}; move it with .to()")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise TypeError(f"{OP}: {name} has dtype {dtype}, expected one of {known}")


def _check_beside_x(name: str, value: Tensor, x: Tensor) -> None:
    check_dtype(name, value.dtype)
    if value.device != x.device:
        raise ValueError(
            f"{OP}: {name} is on {value.device}, x is on {x.device}; move one with .to()"
        )


def check_product(x: torch.dtype, weight: torch.dtype) -> None:
    """Whether torch multiplies what reaches ``linear`` by the weight."""
    if x != weight:
        raise TypeError(
            f"{OP}: weight has dtype {weight}, x has {x}; they must agree: convert one with .to(), "
            f"or run under torch.autocast"
        )


def check_x(x: Any, in_features: int, name: str = "in_features") -> None:
    """The part of the checks that a module can do before it computes its shortcut. `name`: what the
    module calls its width.
    """
    check_tensor("x", x)
    check_dense("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{OP}: x has shape {_shape(x)}, expected (..., {in_features}): {name}={in_features}"
        )


def check_call(spec: Spec, o: Operands, pad: bool) -> None:
    """Everything that can be wrong with the operands of one call, x (..., K) and residual (..., R).
    `pad`: a narrower shortcut is zero-padded.
    """
    x, weight, bias, residual = o.x, o.weight, o.bias, o.residual
    check_tensor("x", x)
    check_tensor("weight", weight)
    for name, value in (("bias", bias), ("residual", residual), ("gate", o.gate)):
        check_tensor(name, value, optional=True)
    check_dtype("x", x.dtype)
    check_dense("x", x)
    check_dense("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{OP}: weight has shape {_shape(weight)}, expected (N, K)")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        features = "no" if x.dim() == 0 else x.shape[-1]
        raise ValueError(
            f"{OP}: x has {features} features (shape {_shape(x)}), "
            f"weight (N={N}, K={K}) expects {K}"
        )
    _check_beside_x("weight", weight, x)
    if bias is not None:
        _check_vector("bias", bias, N, f"one value for each of weight's {N} rows", x.device)
        if bias.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{OP}: bias has dtype {bias.dtype}, weight has {weight.dtype}")
    _check_norm(spec, o)
    _check_gate(spec, o.gate, spec.width("gate", K, N), x.device)
    check_residual(spec, x, residual, spec.width("add", K, N), pad)
    if residual is not None:
        _check_beside_x("residual", residual, x)


def check_devices(o: Operands, *saved: Tensor) -> None:
    """Of every fake: all tensors are where x is. `saved`: a backward's dy, z and stats."""
    for name, t in zip(_TENSORS, (*o[:-1], *saved), strict=False):
        if t is not None and t.device != o.x.device:
            raise RuntimeError(f"fusedres: {name} is on {t.device}, x is on {o.x.device}")


def check_fits(spec: Spec, o: Operands, *saved: Tensor | None) -> None:
    """What the C++ ops ask of their operands (csrc/call.h), asked by those in Python, in few words:
    `check_call` says more when `run` sees the RuntimeError. `saved`: a backward's dy and z.
    """
    x, weight, residual = o.x, o.weight, o.residual
    if x.dim() != 2 or weight.dim() != 2:
        raise RuntimeError(f"fusedres: x {_shape(x)}, weight {_shape(weight)}: expected matrices")
    (M, K), N, device = x.shape, weight.shape[0], x.device
    norm, add = (spec.width("norm", K, N),), spec.width("add", K, N)
    gate = (1 if spec.gate == "scalar" else spec.width("gate", K, N),)
    R = K if residual is None else residual.shape[-1]
    z = (M, N) if spec.saves_z else (0,)
    sizes = ((M, K), (N, K), (N,), norm, norm, gate, (M, R), norm, norm, (1,), (M, N), z)
    for i, (t, size) in enumerate(zip((*o[:-1], *saved), sizes, strict=False)):
        if t is not None and (t.device != device or t.shape != size):
            came = f"shape {_shape(t)} on {t.device}"
            raise RuntimeError(f"fusedres: {_TENSORS[i]} has {came}, expected {size} on {device}")
        if t is not None and t.is_floating_point() == (i == _SEED):
            raise RuntimeError(f"fusedres: {_TENSORS[i]} has dtype {t.dtype}")
    if (spec.gate and o.gate is None) or (spec.random and o.seed is None):
        raise RuntimeError(f"fusedres: gate or seed is None, needed by '{spec}'")
    running = spec.norm == "batch" and not spec.batch_stats
    if running and (o.running_mean is None or o.running_var is None):
        raise RuntimeError(f"fusedres: running_mean or running_var is None, needed by '{spec}'")
    if spec.adds and add < R:
        raise RuntimeError(f"fusedres: the shortcut has {R} features, the sum {add}")
    if o.bias is not None and o.bias.dtype != weight.dtype:
        raise RuntimeError(f"fusedres: bias has dtype {o.bias.dtype}, weight {weight.dtype}")


def check_operands(spec: Spec, x: Any, size: torch.Size, residual: Any, pad: bool) -> None:
    """The part of check_call that is about x and residual: what a module must ask on every call.
    `size`: the weight's.
    """
    K = size[1]
    try:
        fits = isinstance(x, Tensor) and x.dim() != 0 and x.shape[-1] == K
    except RuntimeError:  # a nested tensor has no shape
        fits = False
    if not fits:
        check_x(x, K)
    if residual is not None:
        check_tensor("residual", residual)
    width = size[0] if "add" in spec.epilogue else K
    if residual is not None or (width != K and spec.adds):
        check_residual(spec, x, residual, width, pad)


def batch_fits(spec: Spec, o: Operands) -> bool:
    """Whether check_call would find nothing in what only batch statistics ask: more than one row,
    and running statistics that the update, after the op, would not broadcast.
    """
    x, mean, var = o.x, o.running_mean, o.running_var
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    if mean is not None and var is not None:
        shape = (spec.width("norm", o.weight.shape[1], o.weight.shape[0]),)
        if mean.shape != shape or var.shape != shape or not mean.is_floating_point():
            return False
        if mean.dtype is not var.dtype or mean.device != x.device or var.device != x.device:
            return False
    elif mean is not var:
        return False
    return x.dim() > 1 and math.prod(x.shape[:-1]) != 1


def _check_norm(spec: Spec, o: Operands) -> None:
    x, mean, var = o.x, o.running_mean, o.running_var
    if spec.norm is None:
        for name, value in (("norm_weight", o.norm_weight), ("norm_bias", o.norm_bias)):
            if value is not None:
                raise ValueError(
                    f"{OP}: {name} was given, but order '{'-'.join(spec.stages)}' runs no norm"
                )
        return
    N, K = o.weight.shape
    width = spec.width("norm", K, N)
    meaning = f"the width where the norm acts (order '{'-'.join(spec.stages)}')"
    _check_vector("norm_weight", o.norm_weight, width, meaning, x.device)
    _check_vector("norm_bias", o.norm_bias, width, meaning, x.device)
    if spec.norm != "batch":
        return
    _check_vector("running_mean", mean, width, meaning, x.device)
    _check_vector("running_var", var, width, meaning, x.device)
    if (mean is None) != (var is None):
        raise ValueError(f"{OP}: give both running_mean and running_var, or neither")
    if not spec.batch_stats and mean is None:
        raise ValueError(
            f"{OP}: batch norm in evaluation needs running_mean and running_var (or training=True)"
        )
    rows = math.prod(x.shape[:-1])
    if spec.batch_stats and rows == 1:
        raise ValueError(
            f"{OP}: batch norm in training needs more than 1 row to have a variance, got x of "
            f"shape {_shape(x)}; use more rows or .eval()"
        )


def _check_gate(spec: Spec, gate: Tensor | None, width: int, device: torch.device) -> None:
    if (gate is None) != (spec.gate is None):
        came = "no tensor" if gate is None else "a tensor"
        raise ValueError(f"{OP}: gate={spec.gate!r} but {came} was given as the gate")
    if gate is not None:
        size = 1 if spec.gate == "scalar" else width
        _check_vector("gate", gate, size, f"gate={spec.gate!r}", device)


def check_residual(spec: Spec, x: Tensor, residual: Tensor | None, width: int, pad: bool) -> None:
    if residual is None:
        if spec.adds and x.shape[-1] != width and not (pad and x.shape[-1] < width):
            residual_required(x.shape[-1], width)
        return
    check_dense("residual", residual)
    if not spec.adds:
        raise ValueError(
            f"{OP}: residual was given, but order '{'-'.join(spec.stages)}' has no 'add' stage"
        )
    features = residual.shape[-1] if residual.dim() else 0
    fits = features == width or (pad and 0 < features < width)
    if not fits or residual.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{OP}: residual has shape {_shape(residual)}, expected {(*x.shape[:-1], width)}"
            + (" or fewer features (shortcut='pad')" if pad else "")
        )


def residual_required(features: int, width: int) -> NoReturn:
    raise ValueError(
        f"{OP}: x has {features} features and the sum {width}, so x cannot be its own shortcut: "
        f"pass residual=(..., {width}), or use shortcut='linear' or 'pad'"
    )


def check_shortcut_input(source: Tensor, in_features: int) -> None:
    if source.shape[-1] != in_features:
        raise ValueError(
            f"{OP}: the shortcut's input has shape {_shape(source)}, "
            f"expected (..., {in_features}), the in_features of the linear shortcut"
        )


def check_shortcut_weight(source: Any, weight: Any, bias: Any) -> None:
    """Of a linear shortcut of source (..., K): weight (R, K), bias (R,)."""
    check_tensor("shortcut_weight", weight)
    check_tensor("shortcut_bias", bias, optional=True)
    check_tensor("residual", source)
    check_dense("shortcut_weight", weight)
    K = source.shape[-1] if source.dim() else None
    if weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(
            f"{OP}: shortcut_weight has shape {_shape(weight)}, expected (R, {K}), since the "
            f"shortcut's input has shape {_shape(source)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: shortcut_bias has shape {_shape(bias)}, expected ({weight.shape[0]},)"
        )


def check_backend_name(backend: Any) -> None:
    one_of("backend", backend, BACKENDS)
