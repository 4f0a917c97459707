"""The vendor's product, then one pass: two launches, for what one launch would make slower. Where
stages stand before `linear`, one more, which makes what is multiplied.

That is true fp32: tensor cores have no such form, and on plain cores the library's product is the
better one. And 16-bit types of odd width, whose rows begin anywhere: what is copied ahead takes
four bytes at least, so Triton's product would wait for every load. Backward is the Triton
backend's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_fits
from ..operands import Operands, Outputs
from ..spec import Spec
from . import plan, triton
from .launch import Call

try:
    from ..kernels.finish import residual_finish_kernel
except ImportError:  # without Triton, which `why_not` says
    residual_finish_kernel = None


def why_not(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str | None:
    """None if a layer of N outputs and K inputs runs this way, and should; else the reason."""
    odd = dtype.itemsize == 2 and bool(N % 2 or K % 2)
    if not odd and (dtype != torch.float32 or triton._precision() != "ieee"):
        return "tensor cores multiply within the one launch"
    if spec.casts:
        return "the library's product takes x in its own dtype"
    if spec.prologue and N <= plan.APART_FROM:
        return "stages before linear are part of the product of so few features"
    if spec.batch_stats:
        return "batch statistics are gathered in the one launch"
    return triton.why_not(spec, dtype, device, N, K)


def residual_forward(*call: Any) -> list[Tensor]:
    """The Triton backend's `residual_forward` in two launches or three, with the same arguments."""
    *operands, recipe, save = call
    return forward_of(Operands(*operands), recipe, save).list()


def forward_of(o: Operands, recipe: str, save: bool, out: Outputs | None = None) -> Outputs:
    """The Triton backend's `forward_of`, likewise."""
    spec = Spec.parse(recipe)
    check_fits(spec, o)
    out = o.empty_outputs(spec, save, True) if out is None else out
    if not out.y.numel():
        return out
    with torch.cuda.device_of(o.x):
        x, to = o.x, out.z
        if spec.prologue and x.numel():
            x = _made(spec, o, out.stats if "norm" in spec.prologue else None)
        if to is None:
            to = out.y if out.y.dtype == o.weight.dtype else o.weight.new_empty(out.y.shape)
        if o.bias is None:
            torch.mm(x, o.weight.t(), out=to)
        else:
            torch.addmm(o.bias, x, o.weight.t(), out=to)
        if spec.epilogue or to is not out.y:
            _finish(spec, o, to, out.y, out.stats)
    return out


def _made(spec: Spec, o: Operands, stats: Tensor | None) -> Tensor:
    """What the stages before `linear` make of x."""
    (M, K), dtype = o.x.shape, o.weight.dtype
    t = o.weight.new_empty((M, K))
    p = triton.stage_operands(spec, o, None, triton.alignment(K, o.residual, o.x))
    constants = triton.prologue_constants(spec, dtype, K)
    triton.launch_prologue(Call(), o.x, p, t, stats, constants)
    return t


def _finish(spec: Spec, o: Operands, z: Tensor, y: Tensor, stats: Any) -> None:
    M, N = y.shape
    rows = "norm" in spec.epilogue and spec.norm != "batch"
    side = triton.Side.of(spec.epilogue)
    height, width = plan.pass_tile(N)
    residual_finish_kernel[(plan.ceil_div(M, height),)](
        z,
        triton.stage_operands(spec, o, None, triton.alignment(N, o.residual, o.x)),
        y,
        stats if rows else None,
        M,
        N,
        BEFORE=side.before if rows else (),
        EPILOGUE=("norm", *side.after) if rows else spec.epilogue,
        ROWS=rows,
        CENTRED=spec.norm != "rms",
        ACT=triton._functions(spec, z.dtype)[0],
        BLOCK_M=height,
        BLOCK_N=width,
        num_warps=8,
    )


residual_backward = triton.residual_backward
