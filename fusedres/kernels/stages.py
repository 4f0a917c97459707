"""The stages of a recipe on a tile in registers, forward and backward.

A kernel gets the stages as a constexpr tuple of names, so one kernel runs every order: the loop
over the names unrolls when it compiles. Tiles are fp32; `m` and `n` are the rows and columns of
the tile [m, n] in a matrix of M rows and C columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class StageOperands(NamedTuple):
    """What stages read, as one kernel argument. A tensor that a recipe has no use for is None."""

    norm_weight: Any  # (C,)
    norm_bias: Any  # (C,)
    mean: Any  # (C,), for batch norm: the running statistics or this batch's
    var: Any  # (C,), biased
    gate: Any  # (1,) or (C,)
    residual: Any  # (M, R), counts as 0 beyond its R columns
    seed: Any  # (1,) int64
    R: int
    stride_gate: int  # 0 for a scalar gate, else 1
    stride_rm: int
    stride_rn: int
    sample_rows: int  # rows a sample, for drop-path
    dropout: int  # p * 2**32: an element is kept if its random word is not below
    droppath: int
    dropout_scale: float  # 1 / (1 - p)
    droppath_scale: float
    residual_scale: float
    eps: float
    ALIGN: Any = tl.constexpr(1)  # divides all widths and row strides, if it is not 1


@triton.jit
def aligned(sizes, ALIGN: tl.constexpr):
    """The same sizes, each a multiple of ALIGN, which the compiler then knows.

    Of a kernel's argument it knows whether 16 divides it and no more; what is to be copied ahead,
    or stored by many bytes at once, must begin at multiples of them.
    """
    if ALIGN == 1:
        return sizes
    else:
        found = ()
        for i in tl.static_range(len(sizes)):
            found = found + (sizes[i] // ALIGN * ALIGN,)
        return found


@triton.jit
def load_tile(ptr, row, column, rows, columns, stride_row, stride_column):
    """The tile at (row, column) of a strided matrix; 0 outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride_row + column[None, :] * stride_column, inside, 0.0)


@triton.jit
def store_tile(ptr, t, m, n, M, N):
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(ptr + m[:, None] * N + n[None, :], t, inside)


@triton.jit
def load_vector(ptr, n, N, missing):
    """One fp32 value for each column n, as a row, 0 past N. Without a vector: `missing`."""
    if ptr is None:
        return missing
    else:
        return tl.load(ptr + n, n < N, 0.0).to(tl.float32)[None, :]


@triton.jit
def rstd_of(variance, eps):
    return 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def row_rstd(variance, eps, CENTRED: tl.constexpr):
    """As torch has it: layer norm is NaN where its variance overflows, RMSNorm 0."""
    rstd = rstd_of(variance, eps)
    if CENTRED:
        rstd += variance - variance
    return rstd


@triton.jit
def normalise(t, p, n, C, mean, rstd):
    """(t - mean) * rstd and rstd; without a mean, the statistics of each column are loaded."""
    if mean is None:
        scale = rstd_of(load_vector(p.var, n, C, 1.0), p.eps)
        return (t - load_vector(p.mean, n, C, 0.0)) * scale, scale
    else:
        return (t - mean) * rstd, rstd


@triton.jit
def random_words(seed_ptr, index, STREAM: tl.constexpr):
    """First word of Philox4x32-10 for each 64-bit index; see `reference.philox`."""
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    stream = tl.full(low.shape, STREAM, tl.uint32)
    zero = tl.full(low.shape, 0, tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, stream, zero)
    return word.to(tl.int64)


@triton.jit
def drop(t, p, m, n, C):
    kept = random_words(p.seed, m[:, None] * C + n[None, :], 0) >= p.dropout
    return tl.where(kept, t * p.dropout_scale, 0.0)


@triton.jit
def drop_path(t, p, m):
    kept = random_words(p.seed, m // p.sample_rows, 1) >= p.droppath
    return tl.where(kept[:, None], t * p.droppath_scale, 0.0)


@triton.jit
def load_gate(p, n, C):
    return tl.load(p.gate + n * p.stride_gate, n < C, 0.0).to(tl.float32)[None, :]


@triton.jit
def run_stages(t, p, m, n, M, C, mean, rstd, STAGES: tl.constexpr, ACT: tl.constexpr):
    """What STAGES make of t, which are its inputs on the way: a tuple, t first, the result last.

    mean, rstd: [m, 1] of each row or [1, n] of each column; None: of each column, from p.
    """
    values = (t,)
    for i in tl.static_range(len(STAGES)):
        if STAGES[i] == "norm":
            c, _ = normalise(t, p, n, C, mean, rstd)
            t = load_vector(p.norm_weight, n, C, 1.0) * c + load_vector(p.norm_bias, n, C, 0.0)
        elif STAGES[i] == "act":
            t = ACT(t)
        elif STAGES[i] == "gate":
            t = t * load_gate(p, n, C)
        elif STAGES[i] == "dropout":
            t = drop(t, p, m, n, C)
        elif STAGES[i] == "droppath":
            t = drop_path(t, p, m)
        else:
            tl.static_assert(STAGES[i] == "add")
            R, stride_rm = aligned((p.R, p.stride_rm), p.ALIGN)
            r = load_tile(p.residual, m, n, M, R, stride_rm, p.stride_rn).to(tl.float32)
            t = t + p.residual_scale * r
        values = values + (t,)
    return values


@triton.jit
def walk_back(
    d, dgate, dshortcut, values, p, m, n, C, STAGES: tl.constexpr, ACT_GRAD: tl.constexpr
):
    """The gradient of what STAGES act on, from d, that of their result.

    `values` as `run_stages` gave them. Also returns, where STAGES have a gate or an add, what sums
    up to the gate's gradient and the shortcut's gradient; else `dgate`, `dshortcut` as they came.
    """
    for i in tl.static_range(len(STAGES) - 1, -1, -1):
        if STAGES[i] == "act":
            d = d * ACT_GRAD(values[i])
        elif STAGES[i] == "gate":
            dgate = d * values[i]
            d = d * load_gate(p, n, C)
        elif STAGES[i] == "dropout":
            d = drop(d, p, m, n, C)
        elif STAGES[i] == "droppath":
            d = drop_path(d, p, m)
        else:
            tl.static_assert(STAGES[i] == "add")
            dshortcut = p.residual_scale * d
    return d, dgate, dshortcut
