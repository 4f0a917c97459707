"""The stages before `linear` as a launch of their own, for products of many column tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import store_rows
from .moments import row_moments
from .stages import aligned, load_tile, row_rstd, run_stages, store_tile


@triton.jit(do_not_specialize=["M"])
def residual_prologue_kernel(
    x_ptr, p, t_ptr, stats_ptr, M, K, stride_xm, stride_xk,
    BEFORE: tl.constexpr, PROLOGUE: tl.constexpr, OVER: tl.constexpr, CENTRED: tl.constexpr,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """t = PROLOGUE(x), in t's type

    x (M, K) ; t (M, K) contiguous. A program owns BLOCK_M rows, BLOCK_K columns at a time.

    OVER: what a norm in PROLOGUE takes its statistics over.
    "rows of x": whole rows of BEFORE(x). stats (2, M) or None gets them: mean and rstd.
    "stats": nothing; stats has those of rows. "given": nothing; p has them, or there is no norm.
    """
    K, stride_xm = aligned((K, stride_xm), p.ALIGN)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = None
    rstd = None
    if OVER == "rows of x":
        mean, m2 = row_moments(
            x_ptr, p, m, M, K, stride_xm, stride_xk, BEFORE, ACT, CENTRED, BLOCK_M, BLOCK_K
        )
        rstd = row_rstd(m2 / K, p.eps, CENTRED)
        store_rows(stats_ptr, mean, rstd, m, M, 0)
        mean = mean[:, None]
        rstd = rstd[:, None]
    elif OVER == "stats":
        mean = tl.load(stats_ptr + m, m < M, 0.0)[:, None]
        rstd = tl.load(stats_ptr + tl.cast(M, tl.int64) + m, m < M, 0.0)[:, None]
    for first in tl.range(0, K, BLOCK_K, num_stages=2):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk).to(tl.float32)
        t = run_stages(x, p, m, k, M, K, mean, rstd, PROLOGUE, ACT)[len(PROLOGUE)]
        store_tile(t_ptr, t, m, k, M, K)
