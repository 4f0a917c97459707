"""Gated linear units: h = act(a) * b, and back, one pass each."""

from __future__ import annotations

import triton
import triton.language as tl

from .stages import aligned, load_tile


@triton.jit(do_not_specialize=["M"])
def glu_kernel(
    dh_ptr, a_ptr, b_ptr, h_ptr, db_ptr, M, H, stride_dh, stride_a, stride_b, stride_h,
    ACT: tl.constexpr, ACT_GRAD: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """h = act(a) * b in h; with dh: da = dh * b * act'(a) there, and db = dh * act(a)

    All (M, H) of adjacent columns, db with h's stride from row to row. A program owns a tile.
    """
    H, stride_dh, stride_a, stride_b, stride_h = aligned(
        (H, stride_dh, stride_a, stride_b, stride_h), ALIGN
    )
    tile, across = tl.program_id(0).to(tl.int64), tl.cdiv(H, BLOCK_N)
    m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    a = load_tile(a_ptr, m, n, M, H, stride_a, 1).to(tl.float32)
    b = load_tile(b_ptr, m, n, M, H, stride_b, 1).to(tl.float32)
    at, inside = m[:, None] * stride_h + n[None, :], (m < M)[:, None] & (n < H)[None, :]
    if dh_ptr is None:
        tl.store(h_ptr + at, ACT(a) * b, inside)
    else:
        dh = load_tile(dh_ptr, m, n, M, H, stride_dh, 1).to(tl.float32)
        tl.store(h_ptr + at, dh * b * ACT_GRAD(a), inside)
        tl.store(db_ptr + at, dh * ACT(a), inside)
