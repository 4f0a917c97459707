"""The forward kernels: each is a whole layer, y = epilogue(prologue(x) @ weight.T + b).

They differ in where a norm gets its statistics: `residual_forward_kernel` from tensors or from
what one program sees, `..._wide_kernel` from the tiles of a row, `..._batch_kernel` and
`..._prebatch_kernel` from all rows, after or before the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import (
    last_to_arrive,
    load_merged,
    merge,
    moments,
    row_moments,
    store_part,
    wait_for_all,
)
from .product import product, product_of_norm
from .stages import aligned, load_tile, row_rstd, rstd_of, run_stages, store_tile


@triton.jit
def rounded(z, weight_ptr):
    """z in its type, weight's: a norm and its gradient must see the same values."""
    return z.to(weight_ptr.dtype.element_ty)


@triton.jit
def finish(
    z_ptr, y_ptr, p, m, n, M, N, mean, rstd,
    BEFORE: tl.constexpr, EPILOGUE: tl.constexpr, ACT: tl.constexpr,
):
    """y = EPILOGUE(BEFORE(z)) of a tile that another program has stored; z may be y itself."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    # Past L1, which may hold an older copy of a line.
    z = tl.load(z_ptr + m[:, None] * N + n[None, :], inside, 0.0, cache_modifier=".cg")
    t = run_stages(z.to(tl.float32), p, m, n, M, N, None, None, BEFORE, ACT)[len(BEFORE)]
    y = run_stages(t, p, m, n, M, N, mean, rstd, EPILOGUE, ACT)
    store_tile(y_ptr, y[len(EPILOGUE)], m, n, M, N)


@triton.jit
def store_columns(
    stats_ptr, partial_ptr, arrived_ptr, mean, rest, m2, item, n, N, walkers, M,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """stats (2, N) = mean and biased variance over all M rows, by the last walker of n to arrive.

    `item` is walker * column tiles + column tile ; mean, rest, m2 are of this walker's row blocks.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    store_part(partial_ptr, mean, rest, m2, item // tiles_n, walkers, n, N)
    if last_to_arrive(arrived_ptr + item % tiles_n, walkers):
        mean, m2 = load_merged(partial_ptr, n, N, walkers, M, BLOCK_M, BLOCK_N)
        tl.store(stats_ptr + n, mean, n < N)
        tl.store(stats_ptr + N + n, m2 / M, n < N)


@triton.jit
def store_rows(stats_ptr, mean, rstd, m, M, tile_n):
    """stats (2, M) = mean, rstd, by the program of column tile 0."""
    if stats_ptr is not None:
        if tile_n == 0:
            tl.store(stats_ptr + m, mean, m < M)
            tl.store(stats_ptr + tl.cast(M, tl.int64) + m, rstd, m < M)


@triton.jit(do_not_specialize=["M"])
def residual_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, p, z_ptr, y_ptr, stats_ptr, operand_ptr,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, BEFORE: tl.constexpr, EPILOGUE: tl.constexpr, OVER: tl.constexpr,
    CENTRED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z = PROLOGUE(x) @ weight.T + bias ; y = EPILOGUE(BEFORE(z))

    x (M, K) ; weight (N, K) ; z, y (M, N) contiguous ; all but x, weight and y may be None. A
    program owns a tile of BLOCK_M rows by BLOCK_N columns. operand: see product.py. x, y and what p
    holds may have other types than weight, which is z's and the product's.

    OVER: what a norm takes its statistics over.
    "given": nothing; p has them, or there is no norm. BEFORE is empty.
    "rows": whole rows of BEFORE(z), N <= BLOCK_N. "columns": whole columns, M <= BLOCK_M.
    "rows of x": whole rows of BEFORE(x), the norm is in PROLOGUE.
    "rows of x, algebraic": the same for PROLOGUE = norm alone, see product.py.
    stats: (2, M), mean and rstd, for rows; (2, N), mean and biased variance, for columns.
    """
    N, K, stride_xm, stride_wn = aligned((N, K, stride_xm, stride_wn), p.ALIGN)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    if OVER == "rows of x, algebraic":
        z, mean, rstd = product_of_norm(
            x_ptr, weight_ptr, bias_ptr, p, m, n, M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk,
            CENTRED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )
        store_rows(stats_ptr, mean, rstd, m, M, tile_n)
    elif OVER == "rows of x":
        mean, m2 = row_moments(
            x_ptr, p, m, M, K, stride_xm, stride_xk, BEFORE, ACT, CENTRED, BLOCK_M, BLOCK_K
        )
        rstd = row_rstd(m2 / K, p.eps, CENTRED)
        store_rows(stats_ptr, mean, rstd, m, M, tile_n)
        z = product(
            x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K,
            mean[:, None], rstd[:, None],
            stride_xm, stride_xk, stride_wn, stride_wk,
            PROLOGUE, ACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )
    else:
        z = product(
            x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K, None, None,
            stride_xm, stride_xk, stride_wn, stride_wk,
            PROLOGUE, ACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )
    if z_ptr is not None:
        store_tile(z_ptr, z, m, n, M, N)

    if OVER == "rows":
        z = rounded(z, weight_ptr).to(tl.float32)
        t = run_stages(z, p, m, n, M, N, None, None, BEFORE, ACT)[len(BEFORE)]
        mean, rest, m2 = moments(t, (n < N)[None, :], N, CENTRED, 1)
        mean += rest
        rstd = row_rstd(m2 / N, p.eps, CENTRED)
        store_rows(stats_ptr, mean, rstd, m, M, tile_n)
        y = run_stages(t, p, m, n, M, N, mean[:, None], rstd[:, None], EPILOGUE, ACT)
    elif OVER == "columns":
        z = rounded(z, weight_ptr).to(tl.float32)
        t = run_stages(z, p, m, n, M, N, None, None, BEFORE, ACT)[len(BEFORE)]
        mean, rest, m2 = moments(t, (m < M)[:, None], M, CENTRED, 0)
        mean += rest
        tl.store(stats_ptr + n, mean, n < N)
        tl.store(stats_ptr + N + n, m2 / M, n < N)
        rstd = rstd_of(m2 / M, p.eps)
        y = run_stages(t, p, m, n, M, N, mean[None, :], rstd[None, :], EPILOGUE, ACT)
    else:
        y = run_stages(z, p, m, n, M, N, None, None, EPILOGUE, ACT)
    store_tile(y_ptr, y[len(EPILOGUE)], m, n, M, N)


@triton.jit(do_not_specialize=["M"])
def residual_forward_wide_kernel(
    x_ptr, weight_ptr, bias_ptr, p, z_ptr, y_ptr, stats_ptr, operand_ptr, partial_ptr, arrived_ptr,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, BEFORE: tl.constexpr, EPILOGUE: tl.constexpr,
    CENTRED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z = PROLOGUE(x) @ weight.T + bias ; y = EPILOGUE(BEFORE(z)), norm over rows of any width

    A program computes one tile of z and its rows' (mean, M2) of BEFORE(z). The last program of a
    row block to arrive merges these in a fixed order, reads the rows of z back and finishes them.
    z may be y itself. partial (3, column tiles, M) ; arrived (row blocks) ; stats (2, M) as above.
    """
    N, K, stride_xm, stride_wn = aligned((N, K, stride_xm, stride_wn), p.ALIGN)
    # As many columns at once as registers hold beside a residual and a mask.
    CHUNK: tl.constexpr = 4096 // BLOCK_M
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    block = tl.program_id(0) // tiles_n
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = product(
        x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K, None, None,
        stride_xm, stride_xk, stride_wn, stride_wk,
        PROLOGUE, ACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    z = rounded(z, weight_ptr)
    store_tile(z_ptr, z, m, n, M, N)
    z = z.to(tl.float32)
    t = run_stages(z, p, m, n, M, N, None, None, BEFORE, ACT)[len(BEFORE)]
    count = tl.minimum(BLOCK_N, N - tile_n * BLOCK_N)
    mean, rest, m2 = moments(t, (n < N)[None, :], count, CENTRED, 1)
    store_part(partial_ptr, mean, rest, m2, tile_n, tiles_n, m, M)

    if last_to_arrive(arrived_ptr + block, tiles_n):
        mean, m2 = load_merged(partial_ptr, m, M, tiles_n, N, BLOCK_N, BLOCK_M)
        rstd = row_rstd(m2 / N, p.eps, CENTRED)
        store_rows(stats_ptr, mean, rstd, m, M, 0)
        for first in tl.range(0, N, CHUNK, num_stages=2):
            at = first + tl.arange(0, CHUNK).to(tl.int64)
            finish(
                z_ptr, y_ptr, p, m, at, M, N, mean[:, None], rstd[:, None], BEFORE, EPILOGUE, ACT
            )


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_forward_batch_kernel(
    x_ptr, weight_ptr, bias_ptr, p, z_ptr, y_ptr, stats_ptr, operand_ptr, partial_ptr, arrived_ptr,
    M, N, K, walkers, stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, BEFORE: tl.constexpr, EPILOGUE: tl.constexpr, PHASE: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z = PROLOGUE(x) @ weight.T + bias ; y = EPILOGUE(BEFORE(z)) with batch norm over all M rows

    Phase 1: each of `walkers` programs of a column tile computes every walkers-th row block of z
    and keeps their (mean, M2); the last to arrive merges them into stats (2, N), mean and biased
    variance, which p has as mean and var. Phase 2, after all programs have met: y from z, which may
    be y itself. partial (3, walkers, N) ; arrived (2 + column tiles). Cooperative launch.
    """
    N, K, stride_xm, stride_wn = aligned((N, K, stride_xm, stride_wn), p.ALIGN)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if PHASE != 2:
        for item in range(tl.program_id(0), walkers * tiles_n, tl.num_programs(0)):
            tile_n = item % tiles_n
            n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            mean = tl.zeros((BLOCK_N,), tl.float32)
            rest = tl.zeros((BLOCK_N,), tl.float32)
            m2 = tl.zeros((BLOCK_N,), tl.float32)
            seen = 0.0
            for block in range(item // tiles_n, tl.cdiv(M, BLOCK_M), walkers):
                m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
                z = product(
                    x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K, None, None,
                    stride_xm, stride_xk, stride_wn, stride_wk,
                    PROLOGUE, ACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )
                z = rounded(z, weight_ptr)
                store_tile(z_ptr, z, m, n, M, N)
                z = z.to(tl.float32)
                t = run_stages(z, p, m, n, M, N, None, None, BEFORE, ACT)[len(BEFORE)]
                count = tl.minimum(BLOCK_M, M - block * BLOCK_M) * 1.0
                part = moments(t, (m < M)[:, None], count, True, 0)
                mean, rest, m2 = merge(mean, rest, m2, seen, part[0], part[1], part[2], count)
                seen += count
            store_columns(
                stats_ptr, partial_ptr, arrived_ptr + 2, mean, rest, m2, item, n, N, walkers, M,
                BLOCK_M, BLOCK_N,
            )
    if PHASE == 0:
        wait_for_all(arrived_ptr, tl.num_programs(0))
    if PHASE != 1:
        for item in range(tl.program_id(0), walkers * tiles_n, tl.num_programs(0)):
            n = (item % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            for block in range(item // tiles_n, tl.cdiv(M, BLOCK_M), walkers):
                m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
                finish(z_ptr, y_ptr, p, m, n, M, N, None, None, BEFORE, EPILOGUE, ACT)


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_forward_prebatch_kernel(
    x_ptr, weight_ptr, bias_ptr, p, z_ptr, y_ptr, stats_ptr, operand_ptr, partial_ptr, arrived_ptr,
    M, N, K, walkers, stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, BEFORE: tl.constexpr, EPILOGUE: tl.constexpr, PHASE: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z = PROLOGUE(x) @ weight.T + bias ; y = EPILOGUE(z) with batch norm of BEFORE(x) in PROLOGUE

    Phase 1: the statistics of the columns of BEFORE(x), BLOCK_K columns a program, as in
    `residual_forward_batch_kernel`: stats (2, K), partial (3, walkers, K), arrived (2 + K tiles).
    Phase 2, after all programs have met: the product and what follows. Cooperative launch.
    """
    N, K, stride_xm, stride_wn = aligned((N, K, stride_xm, stride_wn), p.ALIGN)
    tiles_k = tl.cdiv(K, BLOCK_K)
    if PHASE != 2:
        for item in range(tl.program_id(0), walkers * tiles_k, tl.num_programs(0)):
            k = (item % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            mean = tl.zeros((BLOCK_K,), tl.float32)
            rest = tl.zeros((BLOCK_K,), tl.float32)
            m2 = tl.zeros((BLOCK_K,), tl.float32)
            seen = 0.0
            for block in range(item // tiles_k, tl.cdiv(M, BLOCK_M), walkers):
                m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
                x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk).to(tl.float32)
                t = run_stages(x, p, m, k, M, K, None, None, BEFORE, ACT)[len(BEFORE)]
                count = tl.minimum(BLOCK_M, M - block * BLOCK_M) * 1.0
                part = moments(t, (m < M)[:, None], count, True, 0)
                mean, rest, m2 = merge(mean, rest, m2, seen, part[0], part[1], part[2], count)
                seen += count
            store_columns(
                stats_ptr, partial_ptr, arrived_ptr + 2, mean, rest, m2, item, k, K, walkers, M,
                BLOCK_M, BLOCK_K,
            )
    if PHASE == 0:
        wait_for_all(arrived_ptr, tl.num_programs(0))
    if PHASE != 1:
        tiles_n = tl.cdiv(N, BLOCK_N)
        tiles = tl.cdiv(M, BLOCK_M).to(tl.int64) * tiles_n
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            tile_n = tile % tiles_n
            n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            z = product(
                x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K, None, None,
                stride_xm, stride_xk, stride_wn, stride_wk,
                PROLOGUE, ACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )
            if z_ptr is not None:
                store_tile(z_ptr, z, m, n, M, N)
            y = run_stages(z, p, m, n, M, N, None, None, EPILOGUE, ACT)
            store_tile(y_ptr, y[len(EPILOGUE)], m, n, M, N)
