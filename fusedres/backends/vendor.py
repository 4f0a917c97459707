"""The vendor's product, then one pass: two launches, for what one launch would make slower.

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

try:
    from ..kernels.finish import residual_finish_kernel
except ImportError:  # without Triton, which `why_not` says
    residual_finish_kernel = None

TILE = 4096  # elements of a tile of the pass


def why_not(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str | None:
    """None if a layer of N outputs and K inputs runs this way, and should; else the reason."""
    odd = dtype.itemsize == 2 and bool(N % 2 or K % 2)
    if not odd and (dtype != torch.float32 or triton._precision() != "ieee"):
        return "tensor cores multiply within the one launch"
    if spec.x_dtype:
        return "the library's product takes x in its own dtype"
    if spec.prologue:
        return "stages before linear are part of the product"
    if spec.batch_stats:
        return "batch statistics are gathered in the one launch"
    return triton.why_not(spec, dtype, device, N, K)


def residual_forward(*call: Any) -> list[Tensor]:
    """The Triton backend's `residual_forward` in two launches, with the same arguments."""
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
        to = out.z
        if to is None:
            to = out.y if out.y.dtype == o.weight.dtype else o.weight.new_empty(out.y.shape)
        if o.bias is None:
            torch.mm(o.x, o.weight.t(), out=to)
        else:
            torch.addmm(o.bias, o.x, o.weight.t(), out=to)
        if spec.epilogue or to is not out.y:
            _finish(spec, o, to, out.y, out.stats)
    return out


def _finish(spec: Spec, o: Operands, z: Tensor, y: Tensor, stats: Any) -> None:
    M, N = y.shape
    rows = spec.norm in ("layer", "rms")
    side = triton.Side.of(spec.epilogue)
    width = min(plan.power_of_two(N), 1024)
    height = max(1, TILE // width)
    residual_finish_kernel[(plan.ceil_div(M, height),)](
        z,
        triton.stage_operands(spec, o, None, triton.alignment(N, o.residual, o.x)),
        y,
        stats,
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
