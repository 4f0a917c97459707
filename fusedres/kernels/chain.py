"""Chains: one program takes rows through all links of a net, forward or backward, in one launch.

Links are alike: N features in and out, weights (L, N, N), other parameters (L, N). The loop over
them is a run-time one, so code and compile time do not grow with depth; while a link is computed,
the next one's weight is on its way into shared memory. Only each B-th link adds, and what it adds
is the input of its block of B links; it alone may have a gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import add_rows, moments
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
def gate_of(ptr, link, n, N: tl.constexpr, B: tl.constexpr, CHANNEL: tl.constexpr):
    """The gate (L / B, N), CHANNEL, or (L / B,) of a link's block in fp32: [1, N] or a number."""
    if ptr is None:
        return 1.0
    elif CHANNEL:
        return tl.load(ptr + link // B * N + n).to(tl.float32)[None, :]
    else:
        return tl.load(ptr + link // B).to(tl.float32)


@triton.jit
def run_link(
    t, shortcut, adds, gamma, beta, gate, eps, scale,
    STAGES: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr,
):
    """What STAGES make of whole rows t [m, N]: a tuple of their inputs on the way, the result last;
    then the norm's c and rstd. Where not `adds`, an add and a gate do nothing.
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
        elif STAGES[i] == "gate":
            t = gate * t if B == 1 else tl.where(adds, gate * t, t)
        else:
            tl.static_assert(STAGES[i] == "add")
            total = t + scale * shortcut
            t = total if B == 1 else tl.where(adds, total, t)
        values = values + (t,)
    return values, c, rstd


@triton.jit(do_not_specialize=["M", "L"])
def residual_chain_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr, inputs_ptr, z_ptr, y_ptr,
    M, L, eps, scale, stride_xm, stride_xn,
    PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr, NORM_BEFORE: tl.constexpr,
    CHANNEL: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):
    """z_l = PROLOGUE(x_l) @ weight_l.T + bias_l ; x_l+1 = EPILOGUE(z_l) ; y = x_L

    x, y (M, N) ; weight (L, N, N) ; bias, norm_weight, norm_bias (L, N) or None ; gate: `gate_of` ;
    inputs, z (L, M, N) or None: x_l and z_l, for backward. All contiguous but x; all in weight's
    type but for the norm's parameters and gate, and for x, y and inputs, which may be fp32. A
    program owns BLOCK_M rows. What is added from link to link stays in fp32; what a norm before
    linear acts on is rounded to x's type, what is multiplied to weight's.

    The operand is reassigned at the end of each round: the left operand of a product lies in shared
    memory only if it is an argument of its loop (see product.py on those in registers).
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    x_dtype: tl.constexpr = x_ptr.dtype.element_ty
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
    operand = x.to(dtype)
    if len(PROLOGUE) > 0:
        gamma = row_of(norm_weight_ptr, 0, n, N, 1.0)
        beta = row_of(norm_bias_ptr, 0, n, N, 0.0)
        values, _, _ = run_link(
            stream, stream, True, gamma, beta, 1.0, eps, scale, PROLOGUE, CENTRED, ACT, N, B
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
            z.to(tl.float32), source, link % B == B - 1, gamma, beta,
            gate_of(gate_ptr, link, n, N, B, CHANNEL), eps, scale, EPILOGUE, CENTRED, ACT, N, B,
        )
        stream = values[len(EPILOGUE)]
        source = stream if B == 1 else tl.where((link + 1) % B == 0, stream, source)
        rounded = stream.to(x_dtype)
        operand = rounded.to(dtype)
        if inputs_ptr is not None:
            tl.store(inputs_ptr + after * plane + first * N + at, rounded, rows & (link + 1 < L))
        if len(PROLOGUE) > 0:
            values, _, _ = run_link(
                rounded.to(tl.float32), source, True, gamma, beta, 1.0, eps, scale,
                PROLOGUE, CENTRED, ACT, N, B,
            )
            operand = values[len(PROLOGUE)].to(dtype)
    tl.store(y_ptr + first * N + at, stream, rows)


@triton.jit
def walk_link_back(
    d, values, c, rstd, adds, gamma, gate, scale,
    STAGES: tl.constexpr, CENTRED: tl.constexpr, ACT_GRAD: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr,
):
    """The gradient of what STAGES act on, from d, that of their result; the shortcut's; and what
    sums up over rows to the norm's parameters', dh * c and dh, and the gate's. `values`, c, rstd:
    `run_link`'s.
    """
    dshortcut = tl.zeros_like(d)
    dh = dshortcut
    dhc = dshortcut
    dgate = dshortcut
    for i in tl.static_range(len(STAGES) - 1, -1, -1):
        if STAGES[i] == "norm":
            dh = d
            dhc = d * c
            g = gamma * d
            d = g - c * (tl.sum(g * c, 1) / N)[:, None]
            if CENTRED:
                d -= (tl.sum(g, 1) / N)[:, None]
            d *= rstd
        elif STAGES[i] == "act":
            d = d * ACT_GRAD(values[i])
        elif STAGES[i] == "gate":
            dgate = d * values[i]
            d = gate * d if B == 1 else tl.where(adds, gate * d, d)
        else:
            tl.static_assert(STAGES[i] == "add")
            dshortcut = scale * d
    return d, dshortcut, dhc, dh, dgate


@triton.jit
def store_column_sums(ptr, t, rows, line, n, N: tl.constexpr):
    """ptr[line] = sum_m t, if there is a ptr (lines, N). Rows past M may be NaN, with eps = 0."""
    if ptr is not None:
        tl.store(ptr + line * N + n, tl.sum(tl.where(rows, t, 0.0), 0))


@triton.jit(do_not_specialize=["M", "L"])
def residual_chain_backward_kernel(
    dy_ptr, inputs_ptr, z_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr,
    dx_ptr, dz_ptr, operand_ptr, dbias_ptr, dnorm_weight_ptr, dnorm_bias_ptr, dgate_ptr,
    M, L, eps, scale, stride_dym, stride_dyn,
    PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr, AGAIN: tl.constexpr, SHORTCUT: tl.constexpr,
    CHANNEL: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr, ACT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, B: tl.constexpr,
    N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):
    """dz_l = EPILOGUE'(dx_l+1) ; dx_l = PROLOGUE'(dz_l @ weight_l) + what adds send back

    dx_L = dy (M, N) of any strides ; inputs, z, weight, ... as forward had and kept them. z may be
    None: where no stage asks for it, or, AGAIN, to be computed again. dx (M, N) ; dz, operand
    (L, M, N), operand = PROLOGUE(x) ; dbias, dnorm_weight, dnorm_bias, dgate (L, programs, N),
    fp32: each program's sums over its rows, of dgate those of links that add count. All of these
    may be None.

    SHORTCUT: a stage after `add` needs what was added. dx stays in fp32 from link to link.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    programs = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, N)
    rows = (first + m < M)[:, None]
    at = m[:, None] * N + n[None, :]
    square = n[:, None] * N + n[None, :]
    plane = tl.cast(M, tl.int64) * N

    d = load_rows(dy_ptr, (first + m)[:, None] * stride_dym + n[None, :] * stride_dyn, rows)
    d = d.to(tl.float32)
    skip = tl.zeros_like(d)
    for done in tl.range(0, L, num_stages=STAGES):
        link = L - 1 - done
        here = link * plane + first * N
        weight_at = weight_ptr + tl.cast(link, tl.int64) * (N * N) + square
        if STAGES > 1:
            weight = tl.load(weight_at)
        gamma = row_of(norm_weight_ptr, link, n, N, 1.0)
        beta = row_of(norm_bias_ptr, link, n, N, 0.0)

        x = d
        if AGAIN or len(PROLOGUE) > 0:
            x = load_rows(inputs_ptr + here, at, rows).to(tl.float32)
        before, c, rstd = run_link(
            x, x, True, gamma, beta, 1.0, eps, scale, PROLOGUE, CENTRED, ACT, N, B
        )
        operand = before[len(PROLOGUE)].to(dtype)
        if operand_ptr is not None:
            tl.store(operand_ptr + here + at, operand, rows)
        z = tl.zeros_like(d)
        if z_ptr is not None:
            z = load_rows(z_ptr + here, at, rows).to(tl.float32)
        elif AGAIN:
            if STAGES == 1:
                weight = tl.load(weight_at)
            z = tl.dot(operand, weight.T, input_precision=PRECISION)
            z = (z + row_of(bias_ptr, link, n, N, 0.0)).to(dtype).to(tl.float32)
        shortcut = z
        if SHORTCUT:
            source = link // B * B
            shortcut = load_rows(inputs_ptr + source * plane + first * N, at, rows).to(tl.float32)
        adds = link % B == B - 1
        gate = gate_of(gate_ptr, link, n, N, B, CHANNEL)
        after, c_after, rstd_after = run_link(
            z, shortcut, adds, gamma, beta, gate, eps, scale, EPILOGUE, CENTRED, ACT, N, B
        )

        d, dshortcut, dhc, dh, dgate = walk_link_back(
            d, after, c_after, rstd_after, adds, gamma, gate, scale,
            EPILOGUE, CENTRED, ACT_GRAD, N, B,
        )
        skip = dshortcut if B == 1 else tl.where(adds, dshortcut, skip)
        dz = d.to(dtype)
        if dz_ptr is not None:
            tl.store(dz_ptr + here + at, dz, rows)
        line = tl.cast(link, tl.int64) * programs + tl.program_id(0)
        store_column_sums(dbias_ptr, d, rows, line, n, N)
        store_column_sums(dgate_ptr, dgate, rows, line, n, N)
        if STAGES == 1:  # again if need be: registers that hold it all the time would be spilled
            weight = tl.load(weight_at)
        d = tl.dot(dz, weight, input_precision=PRECISION)
        d, _, dhc_before, dh_before, _ = walk_link_back(
            d, before, c, rstd, True, gamma, 1.0, scale, PROLOGUE, CENTRED, ACT_GRAD, N, B
        )
        store_column_sums(dnorm_weight_ptr, dhc + dhc_before, rows, line, n, N)
        store_column_sums(dnorm_bias_ptr, dh + dh_before, rows, line, n, N)
        d = d + skip if B == 1 else tl.where(link % B == 0, d + skip, d)
    if dx_ptr is not None:
        tl.store(dx_ptr + first * N + at, d, rows)


@triton.jit(do_not_specialize=["programs"])
def residual_chain_sums_kernel(
    partial_ptrs, out_ptrs, programs, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """out[l] = the sum of partial[l] over all programs, in fixed order, for each pair of tensors
    partial (L, programs, N), out (L, N): none is None, which has no place in a tuple. A program
    owns COLUMNS of a link.
    """
    tiles: tl.constexpr = N // COLUMNS
    link = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.cast(link, tl.int64) * programs
    for i in tl.static_range(len(out_ptrs)):
        total = add_rows(partial_ptrs[i], first, 1, programs, n, N, ROWS, COLUMNS)
        tl.store(out_ptrs[i] + link * N + n, total)
