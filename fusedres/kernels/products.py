"""Products of backward: both in one launch for layers with stages before `linear`, and dx alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import last_to_arrive
from .stages import aligned, load_tile, run_stages, store_tile

PARTS = tl.constexpr(8)  # of the rows meet first, then their sums: all by one program take long


@triton.jit
def add_parts(ptr, step, count, n, k, N, K, BLOCK: tl.constexpr):
    """The sum of a tile of `count` matrices (N, K), `step` elements apart, in order."""
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = ptr + n[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, count):
        total += tl.load(at + i * step, inside, 0.0, cache_modifier=".cg")
    return total


@triton.jit
def dweight_tile(
    dz_ptr, x_ptr, p, stats_ptr, dweight_ptr, partial_ptr, arrived_ptr, tile, split,
    M, N, K, splits, rows, stride_dzm, stride_dzn, stride_xm, stride_xk,
    PROLOGUE: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One part of the rows of one tile of dweight = dz.T @ PROLOGUE(x).

    PROLOGUE(x) is the right operand, which tensor cores read from shared memory.
    """
    tiles_k = tl.cdiv(K, BLOCK)
    n = (tile // tiles_k).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = (tile % tiles_k).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK, BLOCK), tl.float32)
    begin = split.to(tl.int64) * rows
    end = tl.minimum(begin + rows, M)
    for first in range(begin, end, BLOCK_R):
        m = first + tl.arange(0, BLOCK_R).to(tl.int64)
        dz = load_tile(dz_ptr, m, n, end, N, stride_dzm, stride_dzn)
        x = load_tile(x_ptr, m, k, end, K, stride_xm, stride_xk).to(tl.float32)
        if stats_ptr is not None:
            mean = tl.load(stats_ptr + m, m < end, 0.0)[:, None]
            rstd = tl.load(stats_ptr + tl.cast(M, tl.int64) + m, m < end, 0.0)[:, None]
            t = run_stages(x, p, m, k, M, K, mean, rstd, PROLOGUE, ACT)
        else:
            t = run_stages(x, p, m, k, M, K, None, None, PROLOGUE, ACT)
        t = t[len(PROLOGUE)].to(dz.dtype)
        dweight = tl.dot(dz.T, t, dweight, input_precision=PRECISION)
    if partial_ptr is None:
        store_tile(dweight_ptr, dweight, n, k, N, K)
    else:
        plane = tl.cast(N, tl.int64) * K
        store_tile(partial_ptr + split * plane, dweight, n, k, N, K)
        groups = tl.cdiv(splits, PARTS)
        counters = arrived_ptr + tile * (groups + 1)
        first = split // PARTS * PARTS
        members = tl.minimum(PARTS, splits - first)
        if last_to_arrive(counters + split // PARTS, members):
            own = partial_ptr + first * plane
            total = add_parts(own, plane, members, n, k, N, K, BLOCK)
            if splits <= PARTS:
                store_tile(dweight_ptr, total, n, k, N, K)
            else:
                store_tile(own, total, n, k, N, K)
                if last_to_arrive(counters + groups, groups):
                    total = add_parts(partial_ptr, PARTS * plane, groups, n, k, N, K, BLOCK)
                    store_tile(dweight_ptr, total, n, k, N, K)


@triton.jit
def dt_tile(
    dz_ptr, weight_ptr, dt_ptr, skip_ptr, tile, M, N, K, skip,
    stride_dzm, stride_dzn, stride_wn, stride_wk, stride_skip_m, stride_skip_n,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One tile of dt = dz @ weight + skip * (the tensor of skip_ptr)."""
    tiles_k = tl.cdiv(K, BLOCK)
    m = (tile // tiles_k).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = (tile % tiles_k).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dt = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, N, BLOCK_R):
        n = first + tl.arange(0, BLOCK_R).to(tl.int64)
        dz = load_tile(dz_ptr, m, n, M, N, stride_dzm, stride_dzn)
        weight = load_tile(weight_ptr, n, k, N, K, stride_wn, stride_wk)
        dt = tl.dot(dz, weight, dt, input_precision=PRECISION)
    if skip_ptr is not None:
        other = load_tile(skip_ptr, m, k, M, K, stride_skip_m, stride_skip_n)
        dt += skip * other.to(tl.float32)
    store_tile(dt_ptr, dt, m, k, M, K)


@triton.jit(do_not_specialize=["M", "splits"])
def residual_products_kernel(
    dz_ptr, x_ptr, weight_ptr, p, stats_ptr, dt_ptr, dweight_ptr, partial_ptr, arrived_ptr,
    M, N, K, splits, rows, stride_dzm, stride_dzn, stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """dt = dz @ weight ; dweight = dz.T @ PROLOGUE(x)

    dz (M, N) ; x (M, K) ; weight, dweight (N, K) ; dt (M, K) or None. stats (2, M): mean and rstd
    where PROLOGUE has a norm over rows, else None. A program owns a tile of BLOCK x BLOCK;
    dweight's M rows are cut into `splits` parts of `rows` rows, which meet in partial
    (splits, N, K), fp32, and are added in order: those of a group of PARTS by its last to arrive,
    the groups' sums by the last group. arrived (dweight's tiles * (groups + 1)).
    """
    N, K, stride_dzm, stride_xm, stride_wn = aligned(
        (N, K, stride_dzm, stride_xm, stride_wn), p.ALIGN
    )
    tiles = tl.cdiv(N, BLOCK) * tl.cdiv(K, BLOCK)
    program = tl.program_id(0)
    if program < tiles * splits:
        dweight_tile(
            dz_ptr, x_ptr, p, stats_ptr, dweight_ptr, partial_ptr, arrived_ptr,
            program % tiles, program // tiles, M, N, K, splits, rows,
            stride_dzm, stride_dzn, stride_xm, stride_xk, PROLOGUE, ACT, PRECISION, BLOCK, BLOCK_R,
        )
    elif dt_ptr is not None:
        dt_tile(
            dz_ptr, weight_ptr, dt_ptr, None, program - tiles * splits, M, N, K, 0.0,
            stride_dzm, stride_dzn, stride_wn, stride_wk, 0, 0, PRECISION, BLOCK, BLOCK_R,
        )


@triton.jit(do_not_specialize=["M"])
def residual_dx_kernel(
    dz_ptr, weight_ptr, dx_ptr, skip_ptr, M, N, K, skip,
    stride_dzm, stride_dzn, stride_wn, stride_wk, stride_skip_m, stride_skip_n,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """dx = dz @ weight + skip * (the tensor of skip_ptr), where dx has another type than weight

    dz (M, N) ; weight (N, K) ; dx (M, K) contiguous. skip_ptr may be dx_ptr, or None.
    ALIGN: as in StageOperands.
    """
    N, K = aligned((N, K), ALIGN)
    stride_dzm, stride_wn, stride_skip_m = aligned((stride_dzm, stride_wn, stride_skip_m), ALIGN)
    dt_tile(
        dz_ptr, weight_ptr, dx_ptr, skip_ptr, tl.program_id(0), M, N, K, skip,
        stride_dzm, stride_dzn, stride_wn, stride_wk, stride_skip_m, stride_skip_n,
        PRECISION, BLOCK, BLOCK_R,
    )
