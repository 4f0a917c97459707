"""The row-major kernels of the backward pass: everything but the matrix products.

One pair of kernels serves both sides of the product. After `linear`: dy and z give dz. Before it:
the product's gradient and x give dx. They call the one they start from `dy`, the other `z`, and C
is the width, N or K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import grow_sums, meet, store_sums, wait_for_all
from .stages import aligned, load_tile, load_vector, normalise, run_stages, walk_back


@triton.jit
def gradient_to_norm(
    dy, z, p, m, n, M, C, mean, rstd,
    BEFORE: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr,
):
    """dh, the gradient of the norm's result, and what came up on the way to it.

    Without a norm all stages are AFTER. Returns dh, c, rstd, BEFORE's inputs, dgate, dshortcut.
    """
    before = run_stages(z, p, m, n, M, C, None, None, BEFORE, ACT)
    c = before[len(BEFORE)]
    h = c
    if NORM is not None:
        c, rstd = normalise(c, p, n, C, mean, rstd)
        h = load_vector(p.norm_weight, n, C, 1.0) * c + load_vector(p.norm_bias, n, C, 0.0)
    else:
        rstd = 1.0
    after = run_stages(h, p, m, n, M, C, None, None, AFTER, ACT)
    none = tl.zeros_like(dy)
    dh, dgate, dshortcut = walk_back(dy, none, none, after, p, m, n, C, AFTER, ACT_GRAD)
    return dh, c, rstd, before, dgate, dshortcut


@triton.jit
def gradient_of_rows(
    dy_ptr, z_ptr, p, stats_ptr, m, n, M, C, stride_dym, stride_dyn, stride_zm, stride_zn,
    BEFORE: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dz and dshortcut of a tile, whose rows are whole if NORM is over rows, and what sums over m
    to dgate, dz's sum, dnorm_weight and dnorm_bias: 0 where it is outside.
    """
    inside = (m < M)[:, None] & (n < C)[None, :]
    dy = load_tile(dy_ptr, m, n, M, C, stride_dym, stride_dyn).to(tl.float32)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if z_ptr is not None:
        z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)
    if NORM == "layer" or NORM == "rms":
        mean = tl.load(stats_ptr + m, m < M, 0.0)[:, None]
        rstd = tl.load(stats_ptr + tl.cast(M, tl.int64) + m, m < M, 0.0)[:, None]
        dh, c, rstd, before, dgate, dshortcut = gradient_to_norm(
            dy, z, p, m, n, M, C, mean, rstd, BEFORE, NORM, AFTER, ACT, ACT_GRAD
        )
        g = tl.where(inside, load_vector(p.norm_weight, n, C, 1.0) * dh, 0.0)
        d = g - c * (tl.sum(tl.where(inside, g * c, 0.0), 1) / C)[:, None]
        if NORM == "layer":
            d -= (tl.sum(g, 1) / C)[:, None]
        d *= rstd
    else:
        dh, c, rstd, before, dgate, dshortcut = gradient_to_norm(
            dy, z, p, m, n, M, C, None, None, BEFORE, NORM, AFTER, ACT, ACT_GRAD
        )
        d = dh
        if NORM == "given":
            d = rstd * load_vector(p.norm_weight, n, C, 1.0) * dh
    dz, dgate, dshortcut = walk_back(d, dgate, dshortcut, before, p, m, n, C, BEFORE, ACT_GRAD)
    # Rows past M are masked because with eps = 0 their c is NaN.
    sums = (
        tl.where(inside, dgate, 0.0), tl.where(inside, dz, 0.0),
        tl.where(inside, dh * c, 0.0), tl.where(inside, dh, 0.0),
    )
    return dz, dshortcut, sums


@triton.jit
def store_gradients(
    dz, dshortcut, skip, skip_ptr, dz_ptr, dshortcut_ptr, m, n, M, C, R,
    stride_skip_m, stride_skip_n, ADD: tl.constexpr,
):
    """dz + skip * (the tile of skip_ptr) + dshortcut if ADD ; dshortcut (M, R) if asked for."""
    inside = (m < M)[:, None] & (n < C)[None, :]
    if dshortcut_ptr is not None:
        at = dshortcut_ptr + m[:, None] * R + n[None, :]
        tl.store(at, dshortcut, (m < M)[:, None] & (n < R)[None, :])
    if dz_ptr is not None:
        if ADD:
            dz += dshortcut
        if skip_ptr is not None:
            other = load_tile(skip_ptr, m, n, M, C, stride_skip_m, stride_skip_n)
            dz += skip * other.to(tl.float32)
        tl.store(dz_ptr + m[:, None] * C + n[None, :], dz, inside)


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_backward_kernel(
    dy_ptr, z_ptr, p, stats_ptr, skip_ptr,
    dz_ptr, dshortcut_ptr, sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr,
    M, C, walkers, skip, stride_dym, stride_dyn, stride_zm, stride_zn, stride_skip_m, stride_skip_n,
    BEFORE: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr, ADD: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dh = AFTER'(dy) ; g = norm_weight * dh ; dt = rstd * (g - mean_n g - c * mean_n (g * c))
    dz = BEFORE'(dt) + skip * (the tensor of skip_ptr) ; dshortcut = residual_scale * (its gradient)

    NORM "layer" and "rms" take means over n (rms only the second one), "given" takes none, with
    None all stages are AFTER. dy (M, C) ; z (M, C) or None where no stage asks for it ; stats
    (2, M): mean, rstd of rows ; dz (M, C) and dshortcut (M, R) contiguous ; ADD: dshortcut counts
    as part of dz. sums, each (C) or None: dgate, sum_m dz, dnorm_weight = sum_m dh * c,
    dnorm_bias = sum_m dh ; dgate_total = sum_n dgate. Each of `walkers` programs of a column tile
    takes every walkers-th row block, whose loads begin STAGES - 1 blocks ahead; a norm over rows
    needs C <= BLOCK_N.
    """
    C, R, stride_dym, stride_zm, stride_skip_m = aligned(
        (C, p.R, stride_dym, stride_zm, stride_skip_m), p.ALIGN
    )
    tiles = tl.cdiv(C, BLOCK_N)
    tile = tl.program_id(0) % tiles
    walker = tl.program_id(0) // tiles
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dhc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in tl.range(walker, tl.cdiv(M, BLOCK_M), walkers, num_stages=STAGES):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        dz, dshortcut, sums = gradient_of_rows(
            dy_ptr, z_ptr, p, stats_ptr, m, n, M, C, stride_dym, stride_dyn, stride_zm, stride_zn,
            BEFORE, NORM, AFTER, ACT, ACT_GRAD, BLOCK_M, BLOCK_N,
        )
        store_gradients(
            dz, dshortcut, skip, skip_ptr, dz_ptr, dshortcut_ptr, m, n, M, C, R,
            stride_skip_m, stride_skip_n, ADD,
        )
        sum_gate += sums[0]
        sum_dz += sums[1]
        sum_dhc += sums[2]
        sum_dh += sums[3]

    if partial_ptr is not None:
        sums = (sum_gate, sum_dz, sum_dhc, sum_dh)
        store_sums(sums, sums_ptr, partial_ptr, walker, walkers, n, C)
        meet(
            sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr, tile, tiles, walker, walkers, n, C,
            4, BLOCK_M, BLOCK_N,
        )


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_backward_product_kernel(
    dy_ptr, z_ptr, p, stats_ptr, skip_ptr,
    dz_ptr, dshortcut_ptr, sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr,
    M, C, walkers, skip, stride_dym, stride_dyn, stride_zm, stride_zn, stride_skip_m, stride_skip_n,
    weight_ptr, dx_ptr, K, stride_wn, stride_wk,
    BEFORE: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dz as `residual_backward_kernel`, rows whole (C <= BLOCK_N), and its product on the spot:
    dx = dz @ weight + skip * (the tensor of skip_ptr)

    weight (C, K) ; dx (M, K) contiguous ; dz may be None. dshortcut may be what skip_ptr has.
    The product is dx.T = weight.T @ dz.T: see product.py on left operands in registers.
    """
    C, R, stride_dym, stride_zm = aligned((C, p.R, stride_dym, stride_zm), p.ALIGN)
    K, stride_wn, stride_skip_m = aligned((K, stride_wn, stride_skip_m), p.ALIGN)
    GROW: tl.constexpr = BLOCK_N > 256  # sums of wide rows stay in memory: no registers are left
    walker = tl.program_id(0)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    sum_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dhc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in range(walker, tl.cdiv(M, BLOCK_M), walkers):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        dz, dshortcut, sums = gradient_of_rows(
            dy_ptr, z_ptr, p, stats_ptr, m, n, M, C, stride_dym, stride_dyn, stride_zm, stride_zn,
            BEFORE, NORM, AFTER, ACT, ACT_GRAD, BLOCK_M, BLOCK_N,
        )
        store_gradients(
            dz, dshortcut, 0.0, None, dz_ptr, dshortcut_ptr, m, n, M, C, R, 0, 0, False
        )
        if not GROW:
            sum_gate += sums[0]
            sum_dz += sums[1]
            sum_dhc += sums[2]
            sum_dh += sums[3]
        elif partial_ptr is not None:
            grow_sums(sums, sums_ptr, partial_ptr, block == walker, walker, walkers, n, C)
        turned = sums[1].to(weight_ptr.dtype.element_ty).T
        tl.debug_barrier()  # dshortcut is stored: the threads that load it may be others
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K).to(tl.int64)
            weight = load_tile(weight_ptr, n, k, C, K, stride_wn, stride_wk)
            dx = tl.dot(weight.T, turned, input_precision=PRECISION).T
            if skip_ptr is not None:
                other = load_tile(skip_ptr, m, k, M, K, stride_skip_m, stride_skip_n)
                dx += skip * other.to(tl.float32)
            tl.store(dx_ptr + m[:, None] * K + k[None, :], dx, (m < M)[:, None] & (k < K)[None, :])

    if partial_ptr is not None:
        if not GROW:
            sums = (sum_gate, sum_dz, sum_dhc, sum_dh)
            store_sums(sums, sums_ptr, partial_ptr, walker, walkers, n, C)
        meet(
            sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr, 0, 1, walker, walkers, n, C,
            4, BLOCK_M, BLOCK_N,
        )


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_backward_wide_kernel(
    dy_ptr, z_ptr, p, stats_ptr, skip_ptr,
    dz_ptr, dshortcut_ptr, sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr,
    M, C, walkers, skip, stride_dym, stride_dyn, stride_zm, stride_zn, stride_skip_m, stride_skip_n,
    BEFORE: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr, ADD: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """As `residual_backward_kernel` for a norm over rows of any width: BLOCK_N columns at a time.

    Each of `walkers` programs takes every walkers-th row block: once over its columns for the means
    of g and g * c, once more for the gradients. Its sums over rows grow in its own lines of partial
    (4, walkers, C), which must not be None.
    """
    C, R, stride_dym, stride_zm, stride_skip_m = aligned(
        (C, p.R, stride_dym, stride_zm, stride_skip_m), p.ALIGN
    )
    walker = tl.program_id(0)
    tiles = tl.cdiv(C, BLOCK_N)
    for block in range(walker, tl.cdiv(M, BLOCK_M), walkers):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mean = tl.load(stats_ptr + m, m < M, 0.0)[:, None]
        rstd = tl.load(stats_ptr + tl.cast(M, tl.int64) + m, m < M, 0.0)[:, None]
        sum_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_gc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in range(0, tiles):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = (m < M)[:, None] & (n < C)[None, :]
            dy = load_tile(dy_ptr, m, n, M, C, stride_dym, stride_dyn).to(tl.float32)
            z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)
            dh, c, _, _, _, _ = gradient_to_norm(
                dy, z, p, m, n, M, C, mean, rstd, BEFORE, NORM, AFTER, ACT, ACT_GRAD
            )
            g = tl.where(inside, load_vector(p.norm_weight, n, C, 1.0) * dh, 0.0)
            sum_g += g
            sum_gc += tl.where(inside, g * c, 0.0)
        mean_g = (tl.sum(sum_g, 1) / C)[:, None]
        mean_gc = (tl.sum(sum_gc, 1) / C)[:, None]
        if NORM == "rms":
            mean_g = tl.zeros_like(mean_g)
        for tile in range(0, tiles):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = (m < M)[:, None] & (n < C)[None, :]
            dy = load_tile(dy_ptr, m, n, M, C, stride_dym, stride_dyn).to(tl.float32)
            z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)
            dh, c, _, before, dgate, dshortcut = gradient_to_norm(
                dy, z, p, m, n, M, C, mean, rstd, BEFORE, NORM, AFTER, ACT, ACT_GRAD
            )
            d = rstd * (load_vector(p.norm_weight, n, C, 1.0) * dh - mean_g - c * mean_gc)
            dz, dgate, dshortcut = walk_back(
                d, dgate, dshortcut, before, p, m, n, C, BEFORE, ACT_GRAD
            )
            store_gradients(
                dz, dshortcut, skip, skip_ptr, dz_ptr, dshortcut_ptr, m, n, M, C, R,
                stride_skip_m, stride_skip_n, ADD,
            )
            sums = (
                tl.where(inside, dgate, 0.0), tl.where(inside, dz, 0.0),
                tl.where(inside, dh * c, 0.0), tl.where(inside, dh, 0.0),
            )
            grow_sums(sums, sums_ptr, partial_ptr, block == walker, walker, walkers, n, C)
    for tile in range(0, tiles):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        meet(
            sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr, tile, tiles, walker, walkers, n, C,
            4, BLOCK_M, BLOCK_N,
        )


@triton.jit(do_not_specialize=["M", "walkers"])
def residual_backward_batch_kernel(
    dy_ptr, z_ptr, p, totals_ptr, skip_ptr,
    dz_ptr, dshortcut_ptr, sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr,
    M, C, walkers, skip, stride_dym, stride_dyn, stride_zm, stride_zn, stride_skip_m, stride_skip_n,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, ADD: tl.constexpr, PHASE: tl.constexpr,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `residual_backward_kernel`, with batch norm over all M rows: means over m, not n.

    Phase 1 sums up over m: totals (2, C) fp32 = sum_m dh, sum_m dh * c. Phase 2, after all programs
    have met: the rest. p has the statistics as mean and var. partial (4, walkers, C) ; arrived
    (2 + tiles * (GROUP + 1) + 1). Cooperative launch; walkers * column tiles programs.
    """
    C, R, stride_dym, stride_zm, stride_skip_m = aligned(
        (C, p.R, stride_dym, stride_zm, stride_skip_m), p.ALIGN
    )
    tiles = tl.cdiv(C, BLOCK_N)
    tile = tl.program_id(0) % tiles
    walker = tl.program_id(0) // tiles
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PHASE != 2:
        sum_dhc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(walker, tl.cdiv(M, BLOCK_M), walkers, num_stages=STAGES):
            m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = (m < M)[:, None] & (n < C)[None, :]
            dy = load_tile(dy_ptr, m, n, M, C, stride_dym, stride_dyn).to(tl.float32)
            z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)
            dh, c, _, _, _, _ = gradient_to_norm(
                dy, z, p, m, n, M, C, None, None, BEFORE, "batch", AFTER, ACT, ACT_GRAD
            )
            sum_dhc += tl.where(inside, dh * c, 0.0)
            sum_dh += tl.where(inside, dh, 0.0)
        # Once as fp32 for phase 2, once in the parameters' type.
        outs = (totals_ptr, totals_ptr + C, sums_ptr[2], sums_ptr[3])
        store_sums((sum_dh, sum_dhc, sum_dhc, sum_dh), outs, partial_ptr, walker, walkers, n, C)
        meet(
            outs, None, partial_ptr, arrived_ptr + 2, tile, tiles, walker, walkers, n, C,
            4, BLOCK_M, BLOCK_N,
        )
    if PHASE == 0:
        wait_for_all(arrived_ptr, tl.num_programs(0))
    if PHASE != 1:
        mean_dh = tl.load(totals_ptr + n, n < C, 0.0, cache_modifier=".cg")[None, :] / M
        mean_dhc = tl.load(totals_ptr + C + n, n < C, 0.0, cache_modifier=".cg")[None, :] / M
        sum_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(walker, tl.cdiv(M, BLOCK_M), walkers, num_stages=STAGES):
            m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = (m < M)[:, None] & (n < C)[None, :]
            dy = load_tile(dy_ptr, m, n, M, C, stride_dym, stride_dyn).to(tl.float32)
            z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)
            dh, c, rstd, before, dgate, dshortcut = gradient_to_norm(
                dy, z, p, m, n, M, C, None, None, BEFORE, "batch", AFTER, ACT, ACT_GRAD
            )
            d = rstd * load_vector(p.norm_weight, n, C, 1.0) * (dh - mean_dh - c * mean_dhc)
            dz, dgate, dshortcut = walk_back(
                d, dgate, dshortcut, before, p, m, n, C, BEFORE, ACT_GRAD
            )
            store_gradients(
                dz, dshortcut, skip, skip_ptr, dz_ptr, dshortcut_ptr, m, n, M, C, R,
                stride_skip_m, stride_skip_n, ADD,
            )
            sum_gate += tl.where(inside, dgate, 0.0)
            sum_dz += tl.where(inside, dz, 0.0)
        store_sums((sum_gate, sum_dz), sums_ptr, partial_ptr, walker, walkers, n, C)
        meet(
            sums_ptr, dgate_total_ptr, partial_ptr, arrived_ptr + 2, tile, tiles, walker, walkers,
            n, C, 2, BLOCK_M, BLOCK_N,
        )
