"""What follows a product that the vendor's library made: one pass over the rows of z."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import finish, store_rows
from .moments import row_moments
from .stages import aligned, row_rstd


@triton.jit(do_not_specialize=["M"])
def residual_finish_kernel(
    z_ptr, p, y_ptr, stats_ptr, M, N,
    BEFORE: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """y = EPILOGUE(BEFORE(z)) ; a norm over whole rows of BEFORE(z) begins EPILOGUE if ROWS

    z, y (M, N) contiguous, z may be y itself ; stats (2, M), mean and rstd, or None. A program owns
    BLOCK_M rows: once over their columns for the statistics, once more for y.
    """
    (N,) = aligned((N,), p.ALIGN)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = None
    rstd = None
    if ROWS:
        mean, m2 = row_moments(z_ptr, p, m, M, N, N, 1, BEFORE, ACT, CENTRED, BLOCK_M, BLOCK_N)
        rstd = row_rstd(m2 / N, p.eps, CENTRED)
        store_rows(stats_ptr, mean, rstd, m, M, 0)
        mean = mean[:, None]
        rstd = rstd[:, None]
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        finish(z_ptr, y_ptr, p, m, n, M, N, mean, rstd, BEFORE, EPILOGUE, ACT)
