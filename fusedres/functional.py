"""From a call to a backend: settings, autocast, checks, flattening to rows, seed, choice.

z = x @ weight.T + bias
y = act(norm(z)) + residual_scale * residual         # order "note"
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling, is_exporting

from . import backends, checks, graphs, ops
from .autograd import FusedResidualFunction, apply_plainly
from .backends import native
from .checks import Backend
from .dtypes import typed
from .operands import Operands
from .reference import composite, draw_seed, rows_per_sample, spec_of
from .spec import Norm, Shortcut, Spec, make_spec, one_of
from .tracing import transforms_active

_forward_ad = torch.autograd.forward_ad
_modes = torch._C._len_torch_dispatch_stack
# Of all devices at once, for a tenth of what one costs. Private to torch, hence the getattr.
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
PLAIN = (Tensor, nn.Parameter)


def composite_only(x: Tensor, weight: Tensor) -> bool:
    """Whether a transform looks inside the layer, so that it must run as ordinary torch ops.

    Under functorch transforms torch.compile takes an autograd.Function's kernels for the truth and
    is silently wrong (torch 2.11 and 2.13); forward-mode AD has no rule for them; a wrapper
    subclass such as DTensor brings its own rules for torch ops only. The probe of forward AD is
    private to torch, hence the getattr.
    """
    if transforms_active() or getattr(_forward_ad, "_current_level", -1) >= 0:
        return True
    if type(x) in PLAIN and type(weight) in PLAIN:
        return False
    wrapped = torch.utils._python_dispatch.is_traceable_wrapper_subclass
    return wrapped(x) or wrapped(weight)


def _require_grad(o: tuple[Any, ...]) -> bool:
    for t in o[:7]:  # DIFFERENTIABLE  # noqa: SIM110 (any() takes three times as long)
        if t is not None and t.requires_grad:
            return True
    return False


def run(
    spec: Spec,
    o: Operands,
    momentum: float | None,
    pad: bool,
    backend: str,
    own_parameters: bool,
    tracked: Tensor | None = None,
) -> Tensor:
    """One layer: y (..., N) from `o`, whose x is (..., K) and residual (..., R).

    `own_parameters`: all but x and residual are a module's, which made them fit; should they no
    longer, a fused op says that something is wrong and check_call what. Plain torch ops might
    broadcast instead, so what they get is always checked.

    `momentum`, `tracked`: for update_running_statistics, called when y is there: the call may fail,
    or torch.utils.checkpoint stop it halfway.
    """
    x, weight, residual = o.x, o.weight, o.residual
    compiling, exporting = is_dynamo_compiling(), is_exporting()
    inner = composite_only(x, weight) or (not compiling and graphs.wants_plain_ops(exporting))
    unchecked = own_parameters and not (inner or compiling)
    if unchecked and (not spec.batch_stats or checks.batch_fits(spec, o)):
        size = weight.shape  # once: to ask costs as much as a call
        checks.check_operands(spec, x, size, residual, pad)
    else:
        checks.check_call(spec, o, pad)
        size = weight.shape
    N, K = size
    recipe, dtype, autocast = spec.text, weight.dtype, None
    asks = compiling or _any_autocast()
    if asks and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        autocast = torch.get_autocast_dtype(x.device.type)
    if autocast or x.dtype is not dtype or (residual is not None and residual.dtype is not dtype):
        third = None if residual is None else residual.dtype
        recipe, dtype = typed(recipe, x.dtype, dtype, third, autocast, x.device.type)
    given, flat = o, x.dim() == 2
    if not flat:
        rows = x.reshape(math.prod(x.shape[:-1]), K)
        r = residual if residual is None else residual.reshape(rows.shape[0], residual.shape[-1])
        o = o._replace(x=rows, residual=r, sample_rows=rows_per_sample(x))
    if spec.random:
        o = o._replace(seed=draw_seed(x.device))

    name = "reference"
    batch: tuple[Tensor, Tensor] | None = None
    stats: Tensor | None = None
    if not inner:
        small = x.is_cuda and backends.is_small(x.device, dtype, o.x.shape[0], N, K)
        name = backends.choose(backend, recipe, dtype, x.device, N, K, small)
    if name == "reference":
        checks.check_all_dense(given)
        if unchecked:
            checks.check_call(spec, given, pad)
        call, step = o, momentum or 0.0
        # uncounted under a transform: by batch norm itself, the one op that may write to a capture
        at_once = inner and tracked is None
        if spec.batch_stats and o.running_mean is not None and not at_once:
            mean, var = torch.zeros_like(o.running_mean), torch.zeros_like(o.running_var)  # type: ignore[arg-type]
            call, step, batch = o._replace(running_mean=mean, running_var=var), 1.0, (mean, var)
        y = composite(spec, call, step)
    else:
        call = o._replace(running_mean=None, running_var=None) if spec.batch_stats else o
        if autocast:  # as autocast casts a product's: once a call, in torch ops with gradients
            call = call._replace(weight=cast_for(weight, autocast), bias=cast_for(o.bias, autocast))
        if not compiling and _modes():
            graphs.register_flops()
        try:
            if exporting:
                y, *rest = graphs.residual_layer(*call, recipe, name)
                stats = rest[0] if spec.batch_stats else None
            elif torch.is_grad_enabled() and _require_grad(o):
                apply = FusedResidualFunction.apply if compiling else apply_plainly
                out = apply(*call, recipe, name)
                y, stats, _ = out if isinstance(out, tuple) else (out, None, None)
            else:
                y, *rest = ops.FORWARD[name](*call, recipe, False)
                stats = rest[0] if spec.batch_stats else None
        except RuntimeError as error:
            checks.check_all_dense(given)
            checks.check_call(spec, given, pad)
            checks.check_memory(error)
            raise
    if spec.batch_stats:
        running, M = (o.running_mean, o.running_var), o.x.shape[0]
        if stats is not None:
            update_by_batch(*running, stats, M, momentum, tracked)
        else:
            update_running_statistics(*running, batch, 1.0, M, momentum, tracked)
    return y if flat else y.view(*x.shape[:-1], N)


def cast_for(t: Any, dtype: torch.dtype) -> Any:
    """A weight or bias as autocast gives it to the product."""
    return t if t is None or t.dtype == torch.float64 else t.to(dtype)


def update_by_batch(
    mean: Tensor | None,
    var: Tensor | None,
    batch: Tensor,
    rows: int,
    momentum: float | None,
    tracked: Tensor | None,
) -> None:
    """update_running_statistics by an op's (2, C): mean and biased variance. On a CPU in one op,
    since torch's eight cost a tenth of a small step.
    """
    here = batch.device.type == "cpu" and native.missing is None
    if not here or is_dynamo_compiling() or is_exporting() or _modes():
        unbias = rows / max(rows - 1, 1)
        update_running_statistics(mean, var, (batch[0], batch[1]), unbias, rows, momentum, tracked)
    elif momentum is not None or tracked is not None:
        torch.ops.fusedres.update_running_.default(mean, var, tracked, batch, rows, momentum)
        increment_version([t for t in (mean, var, tracked) if t is not None])


@torch.no_grad()
def update_running_statistics(
    mean: Tensor | None,
    var: Tensor | None,
    batch: tuple[Tensor, Tensor] | None,
    unbias: float,
    rows: int,
    momentum: float | None,
    tracked: Tensor | None,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, as torch does, with the batch's mean
    and `unbias` times its variance; `tracked` counts the batches, momentum=None averages over all.
    Those of several layers, too: a dimension more, first.
    """
    pairs = zip((mean, var), batch or (), (1.0, unbias), strict=False)
    for running, new, scale in pairs:
        if running is None or rows <= 1:
            continue
        # mul and add, not lerp, which makes NaN of infinity
        if momentum is None:
            weight: Any = 0.0
            if tracked is not None:
                weight = (tracked + 1).to(new.dtype).reciprocal()
                weight = weight.view(*weight.shape, *[1] * (running.dim() - weight.dim()))
            running.copy_(running * (1 - weight) + new * (scale * weight))
        elif running.dtype == new.dtype:
            running.mul_(1 - momentum).add_(new, alpha=scale * momentum)
        else:  # rounded once, at the end
            kept = running.to(new.dtype).mul_(1 - momentum)
            running.copy_(kept.add_(new, alpha=scale * momentum))
    if tracked is not None:
        tracked.add_(1)


def fused_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    order: str = "note",
    norm: Norm | None = "layer",
    activation: str | None = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    training: bool = False,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    residual_scale: float = 1.0,
    shortcut: Shortcut | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """act(norm(x @ weight.T + bias)) + residual, or any other order, in one fused call.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight, bias: (N, K) and (N,), of x's dtype unless autocast casts them.
        norm_weight, norm_bias: (C,) with C = K where the norm stands before ``linear``, else N; any
            floating dtype. None: no scale, no shift.
        residual: (..., R), R the width at ``add``: goes into the shortcut; default x.
        order, norm, activation: see ``fusedres.FusedResidual``.
        eps: added to the variance (no unit).
        running_mean, running_var: (C,), for ``norm="batch"``; updated in place in training, by
            `momentum`. None: this batch's statistics serve, in evaluation too.
        training: batch statistics for batch norm; dropout and drop-path on.
        gate: (1,) or one value for each feature where it acts: a factor on the branch.
        dropout, drop_path: probabilities; masks come from one draw of torch's generator.
        residual_scale: factor on the shortcut.
        shortcut: "identity" (as None), "pad" (a residual narrower than the sum counts as 0 beyond
            its features) or "linear" (needs shortcut_weight).
        shortcut_weight, shortcut_bias: (R, K) and (R,): the shortcut is r @ shortcut_weight.T +
            shortcut_bias, where r is x or a residual (..., K).
        backend: "auto", "reference", "cpu", "triton" or "cuda"; "auto" falls back.

    Returns:
        y: (..., N), of the dtype that eager torch gives it; differentiable any number of times.

    Raises:
        ValueError, TypeError: a tensor or setting does not fit; the message says what would.
        NotImplementedError: the named backend cannot run the call; the message says why.

    Source: He et al., "Deep residual learning for image recognition", arxiv.org/abs/1512.03385.
    """
    checks.check_tensor("x", x)
    checks.check_tensor("gate", gate, optional=True)
    gate_kind = None if gate is None else "scalar" if gate.numel() == 1 else "channel"
    spec = spec_of(
        order, norm, activation, gate_kind, eps, dropout, drop_path, residual_scale, training
    )
    if spec.norm == "batch" and not training and running_mean is None:
        spec = spec_of(order, norm, activation, gate_kind, eps, 0.0, 0.0, residual_scale, True)
    if shortcut is not None:
        one_of("shortcut", shortcut, ("identity", "pad", "linear"))
    if (shortcut == "linear") and shortcut_weight is None:
        raise ValueError(f"{checks.OP}: shortcut='linear' needs shortcut_weight (R, K)")
    if shortcut in ("identity", "pad") and shortcut_weight is not None:
        raise ValueError(f"{checks.OP}: shortcut={shortcut!r} uses no shortcut_weight, but got one")
    if shortcut_weight is not None:
        source = x if residual is None else residual
        checks.check_shortcut_weight(source, shortcut_weight, shortcut_bias)
        residual = plain_linear(source, shortcut_weight, shortcut_bias, backend)
    o = Operands(x, weight, bias, norm_weight, norm_bias, gate, residual, running_mean, running_var)
    return run(spec, o, momentum, shortcut == "pad", backend, False)


_PLAIN_LINEAR = make_spec("linear", None, None)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x @ weight.T + bias by the same backends: the linear shortcut."""
    return run(_PLAIN_LINEAR, Operands(x, weight, bias), None, False, backend, False)
