"""The row-major part of the backward pass: all of it but the two matrix products."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import load_tile, load_vector


@triton.jit
def last_to_arrive(counter_ptr, count):
    """True in the last of `count` programs. It sees what all have stored and resets the counter."""
    tl.debug_barrier()  # the stores of all threads come before the atomic, which is one thread's
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def store_sum(out_ptr, partial_ptr, n, N, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = sum of the `count` rows of partial (count, N), always in the same order."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, count, BLOCK_M):
        p = first + tl.arange(0, BLOCK_M)
        inside = (p < count)[:, None] & (n < N)[None, :]
        # Past L1, which may hold an older copy of a line.
        at = partial_ptr + p[:, None] * N + n[None, :]
        total += tl.load(at, inside, 0.0, cache_modifier=".cg")
    tl.store(out_ptr + n, tl.sum(total, 0), n < N)


@triton.jit(do_not_specialize=["M"])
def residual_backward_kernel(
    dy_ptr, z_ptr, norm_weight_ptr, norm_bias_ptr,
    dz_ptr, dresidual_ptr, dbias_ptr, dnorm_weight_ptr, dnorm_bias_ptr, partial_ptr, arrived_ptr,
    M, N, R, eps, residual_scale, stride_dym, stride_dyn,
    NORM: tl.constexpr, NORM_GRAD: tl.constexpr, ACT_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c, rstd = NORM(z) ; dh = dy * ACT_GRAD(norm_weight * c + norm_bias)
    dz = NORM_GRAD(norm_weight * dh, c, rstd) ; dresidual = residual_scale * dy[:, :R]
    dbias = sum_m dz ; dnorm_weight = sum_m dh * c ; dnorm_bias = sum_m dh

    dy (M, N) ; z, dz (M, N) contiguous ; dresidual (M, R) contiguous ; vectors (N). Each result may
    be None. Grid (programs, column tiles): a program walks over row blocks, its column sums stay in
    registers and then meet in partial (3, programs, N), which the last program to arrive adds up.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gamma = load_vector(norm_weight_ptr, n, N, 1.0)
    beta = load_vector(norm_bias_ptr, n, N, 0.0)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dhc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in range(program, tl.cdiv(M, BLOCK_M), programs):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        dy = load_tile(dy_ptr, m, n, M, N, stride_dym, stride_dyn).to(tl.float32)
        z = load_tile(z_ptr, m, n, M, N, N, 1).to(tl.float32)
        c, rstd = NORM(z, (n < N)[None, :], N, eps)
        dh = dy * ACT_GRAD(gamma * c + beta)
        dz = NORM_GRAD(gamma * dh, c, rstd, N)

        inside = (m < M)[:, None] & (n < N)[None, :]
        if dz_ptr is not None:
            tl.store(dz_ptr + m[:, None] * N + n[None, :], dz, inside)
        if dresidual_ptr is not None:
            shortcut = (m < M)[:, None] & (n < R)[None, :]
            tl.store(dresidual_ptr + m[:, None] * R + n[None, :], residual_scale * dy, shortcut)
        # Rows past M are masked because with eps = 0 their c is NaN.
        sum_dz += tl.where(inside, dz, 0.0)
        sum_dhc += tl.where(inside, dh * c, 0.0)
        sum_dh += tl.where(inside, dh, 0.0)

    if partial_ptr is not None:
        row = partial_ptr + program * N + n
        plane = programs * N
        if dbias_ptr is not None:
            tl.store(row, tl.sum(sum_dz, 0), n < N)
        if dnorm_weight_ptr is not None:
            tl.store(row + plane, tl.sum(sum_dhc, 0), n < N)
        if dnorm_bias_ptr is not None:
            tl.store(row + 2 * plane, tl.sum(sum_dh, 0), n < N)
        if last_to_arrive(arrived_ptr + tl.program_id(1), programs):
            if dbias_ptr is not None:
                store_sum(dbias_ptr, partial_ptr, n, N, programs, BLOCK_M, BLOCK_N)
            if dnorm_weight_ptr is not None:
                store_sum(dnorm_weight_ptr, partial_ptr + plane, n, N, programs, BLOCK_M, BLOCK_N)
            if dnorm_bias_ptr is not None:
                store_sum(dnorm_bias_ptr, partial_ptr + 2 * plane, n, N, programs, BLOCK_M, BLOCK_N)
