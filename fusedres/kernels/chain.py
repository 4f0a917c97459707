"""Chains: one program takes rows through all links of a net, forward or backward, in one launch.

Links are alike: N features in and out, weights (L, N, N), other parameters (L, N). The loop over
them is a run-time one, so code and compile time do not grow with depth; while a link is computed,
the next one's weight is on its way into shared memory. Only each B-th link adds, and what it adds
is the input of its block of B links.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import moments
from .stages import row_rstd


@triton.jit
def load_rows(ptr, at, rows):
    return tl.load(ptr + at, rows, 0.0)


@triton.jit
def row_of(ptr, link, n, N: tl.constexpr, missing):
    """A link's row of parameters (L, N) in fp32, [1, N]; without parameters: `missing`."""
    if ptr is None:
        return missing
    else:
        return tl.load(ptr + link * N + n).to(tl.float32)[None, :]


@triton.jit
def run_link(
    t, shortcut, adds, gamma, beta, eps, scale,
    STAGES: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr,
):
    """What STAGES make of whole rows t [m, N]: a tuple of their inputs on the way, the result last;
    then the norm's c and rstd. Where not `adds`, an add does nothing.
    """
    values = (t,)
    c = t
    rstd = 1.0
    for i in tl.static_range(len(STAGES)):
        if STAGES[i] == "norm":
            inside = tl.full((1, N), 1, tl.int1)
            mean, rest, m2 = moments(t, inside, N, CENTRED, 1)
            rstd = row_rstd(m2 / N, eps, CENTRED)[:, None]
            c = (t - (mean + rest)[:, None]) * rstd
            t = gamma * c + beta
        elif STAGES[i] == "act":
            t = ACT(t)
        else:
            tl.static_assert(STAGES[i] == "add")
            total = t + scale * shortcut
            t = total if B == 1 else tl.where(adds, total, t)
        values = values + (t,)
    return values, c, rstd


@triton.jit(do_not_specialize=["M", "L"])
def residual_chain_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, inputs_ptr, z_ptr, y_ptr,
    M, L, eps, scale, stride_xm, stride_xn,
    PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr, NORM_BEFORE: tl.constexpr,
    CENTRED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr,
    N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):
    """z_l = PROLOGUE(x_l) @ weight_l.T + bias_l ; x_l+1 = EPILOGUE(z_l) ; y = x_L

    x, y (M, N) ; weight (L, N, N) ; bias, norm_weight, norm_bias (L, N) or None ; inputs, z
    (L, M, N) or None: x_l and z_l, for backward. All contiguous but x; all in weight's type but for
    the norm's parameters. A program owns BLOCK_M rows. What is added from link to link stays in
    fp32; what is multiplied or normalised is rounded to weight's type.

    The operand is reassigned at the end of each round: the left operand of a product lies in shared
    memory only if it is an argument of its loop (see product.py on those in registers).
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, N)
    rows = (first + m < M)[:, None]
    at = m[:, None] * N + n[None, :]  # within BLOCK_M rows
    square = n[:, None] * N + n[None, :]
    plane = tl.cast(M, tl.int64) * N

    x = load_rows(x_ptr, (first + m)[:, None] * stride_xm + n[None, :] * stride_xn, rows)
    if inputs_ptr is not None:
        tl.store(inputs_ptr + first * N + at, x, rows)
    stream = x.to(tl.float32)
    source = stream
    operand = x
    if len(PROLOGUE) > 0:
        gamma = row_of(norm_weight_ptr, 0, n, N, 1.0)
        beta = row_of(norm_bias_ptr, 0, n, N, 0.0)
        values, _, _ = run_link(
            stream, stream, True, gamma, beta, eps, scale, PROLOGUE, CENTRED, ACT, N, B
        )
        operand = values[len(PROLOGUE)].to(dtype)

    for link in tl.range(0, L, num_stages=STAGES):
        weight = tl.load(weight_ptr + tl.cast(link, tl.int64) * (N * N) + square)
        bias = row_of(bias_ptr, link, n, N, 0.0)
        z = (tl.dot(operand, weight.T, input_precision=PRECISION) + bias).to(dtype)
        if z_ptr is not None:
            tl.store(z_ptr + link * plane + first * N + at, z, rows)
        after = tl.minimum(link + 1, L - 1)
        own = after if NORM_BEFORE else link  # whose norm comes up in this round
        gamma = row_of(norm_weight_ptr, own, n, N, 1.0)
        beta = row_of(norm_bias_ptr, own, n, N, 0.0)
        values, _, _ = run_link(
            z.to(tl.float32), source, link % B == B - 1, gamma, beta, eps, scale,
            EPILOGUE, CENTRED, ACT, N, B,
        )
        stream = values[len(EPILOGUE)]
        source = stream if B == 1 else tl.where((link + 1) % B == 0, stream, source)
        operand = stream.to(dtype)
        if inputs_ptr is not None:
            tl.store(inputs_ptr + after * plane + first * N + at, operand, rows & (link + 1 < L))
        if len(PROLOGUE) > 0:
            values, _, _ = run_link(
                operand.to(tl.float32), source, True, gamma, beta, eps, scale,
                PROLOGUE, CENTRED, ACT, N, B,
            )
            operand = values[len(PROLOGUE)].to(dtype)
    tl.store(y_ptr + first * N + at, stream, rows)
