"""The product z = prologue(x) @ weight.T + bias of a tile, in three forms."""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import merge, moments
from .stages import load_tile, load_vector, row_rstd, run_stages, store_tile


@triton.jit
def product(
    x_ptr, weight_ptr, bias_ptr, operand_ptr, p, m, n, tile_n, M, N, K, mean, rstd,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PROLOGUE: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_N] = PROLOGUE(x) @ weight.T + bias, in fp32.

    x (M, K) ; weight (N, K) ; bias (N) or None ; mean, rstd [BLOCK_M, 1] for a norm in PROLOGUE,
    or None for one over columns. With a prologue, or x of another type than weight, the product is
    z.T = weight @ PROLOGUE(x).T: tensor cores may take their left operand from registers, which
    ptxas compiles wrongly; the right one always lies in shared memory. operand (M, K) or None: what
    is multiplied, stored by the programs of column tile 0.
    """
    if len(PROLOGUE) == 0 and x_ptr.dtype == weight_ptr.dtype:
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K).to(tl.int64)
            x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk)
            weight = load_tile(weight_ptr, n, k, N, K, stride_wn, stride_wk)
            z = tl.dot(x, weight.T, z, input_precision=PRECISION)
    else:
        turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K).to(tl.int64)
            x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk).to(tl.float32)
            t = run_stages(x, p, m, k, M, K, mean, rstd, PROLOGUE, ACT)[len(PROLOGUE)]
            weight = load_tile(weight_ptr, n, k, N, K, stride_wn, stride_wk)
            t = t.to(weight.dtype)
            if operand_ptr is not None:
                store_tile(operand_ptr, t, m, k, tl.where(tile_n == 0, M, 0), K)
            turned = tl.dot(weight, t.T, turned, input_precision=PRECISION)
        z = turned.T
    return z + load_vector(bias_ptr, n, N, 0.0)


@triton.jit
def product_of_norm(
    x_ptr, weight_ptr, bias_ptr, p, m, n, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk,
    CENTRED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """z = norm(x) @ weight.T + bias, and each row's mean and rstd, without rewriting x:

    z = rstd * (x @ g.T - mean * sum_k g) + weight @ norm_bias + bias ; g = norm_weight * weight

    The tile of x that feeds the product is also summed up, so x is read once and its copies into
    shared memory run ahead. sum_k g is taken of g as rounded for the product.
    """
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk)
        weight = load_tile(weight_ptr, n, k, N, K, stride_wn, stride_wk)
        g = weight
        if p.norm_weight is not None:
            g = (weight.to(tl.float32) * load_vector(p.norm_weight, k, K, 1.0)).to(weight.dtype)
        z = tl.dot(x, g.T, z, input_precision=PRECISION)
        if CENTRED:
            sum_g += tl.sum(g.to(tl.float32), 1)
        if p.norm_bias is not None:
            shift += tl.sum(weight.to(tl.float32) * load_vector(p.norm_bias, k, K, 0.0), 1)
        count = tl.minimum(BLOCK_K, K - first) * 1.0
        part = moments(x.to(tl.float32), (k < K)[None, :], count, CENTRED, 1)
        mean, rest, m2 = merge(mean, rest, m2, first * 1.0, part[0], part[1], part[2], count)
    mean += rest
    rstd = row_rstd(m2 / K, p.eps, CENTRED)
    z = rstd[:, None] * (z - mean[:, None] * sum_g[None, :])
    return z + shift[None, :] + load_vector(bias_ptr, n, N, 0.0), mean, rstd
