"""The forward kernel of every order linear[-norm][-act][-add] whose norm, if any, is over rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, row, column, rows, columns, stride_row, stride_column):
    """The tile at (row, column) of a strided matrix; 0 outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride_row + column[None, :] * stride_column, inside, 0.0)


@triton.jit
def load_vector(ptr, n, N, missing):
    """One fp32 value for each column n, as a row, 0 past N. Without a vector: `missing`."""
    if ptr is None:
        return missing
    else:
        return tl.load(ptr + n, n < N, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def residual_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, z_ptr, y_ptr,
    M, N, K, R, eps, residual_scale,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_rm, stride_rn,
    NORM: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = x @ weight.T + bias
    y = ACT(norm_weight * NORM(z) + norm_bias) + residual_scale * residual

    x (M, K) ; weight (N, K) ; bias, norm_weight, norm_bias (N) ; residual (M, R), R <= N, the rest
    counts as 0 ; z, y (M, N) contiguous. All but x, weight and y may be None. A program owns a tile
    of BLOCK_M rows by BLOCK_N columns; a NORM over rows needs whole rows: N <= BLOCK_N.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk)
        weight = load_tile(weight_ptr, n, k, N, K, stride_wn, stride_wk)
        z = tl.dot(x, weight.T, z, input_precision=PRECISION)
    z += load_vector(bias_ptr, n, N, 0.0)

    inside = (m < M)[:, None] & (n < N)[None, :]
    out = m[:, None] * N + n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + out, z, inside)

    c, _ = NORM(z, (n < N)[None, :], N, eps)
    h = load_vector(norm_weight_ptr, n, N, 1.0) * c + load_vector(norm_bias_ptr, n, N, 0.0)
    y = ACT(h)
    if residual_ptr is not None:
        r = load_tile(residual_ptr, m, n, M, R, stride_rm, stride_rn)
        y += residual_scale * r.to(tl.float32)
    tl.store(y_ptr + out, y, inside)
