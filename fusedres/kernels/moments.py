"""Row and column statistics of tiles and of parts, sums over rows, programs that wait for others.

M2 is the sum of squared deviations from the mean; without centring (RMSNorm) the mean is 0. Two
passes within a tile, Chan's formula between tiles: never E[z^2] - E[z]^2. Source: Chan, Golub,
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stages import load_tile, run_stages

GROUP = tl.constexpr(16)  # column sums meet in groups of 16 programs, then of 16 groups


@triton.jit
def moments(t, live, count, CENTRED: tl.constexpr, AXIS: tl.constexpr):
    """(mean, rest, M2) along AXIS of the `count` elements of each line of t that are live.

    mean + rest is the mean: what rounding took from it, which matters where |mean| >> sigma.
    """
    if CENTRED:
        mean = tl.sum(tl.where(live, t, 0.0), AXIS) / count
        t = tl.where(live, t - tl.expand_dims(mean, AXIS), 0.0)
        rest = tl.sum(t, AXIS) / count
    else:
        t = tl.where(live, t, 0.0)
        mean = tl.sum(tl.zeros_like(t), AXIS)
        rest = mean
    return mean, rest, tl.sum(t * t, AXIS) - count * rest * rest


@triton.jit
def merge(mean, rest, m2, count, other_mean, other_rest, other_m2, other_count):
    """(mean, rest, M2) of two sets of `count` and `other_count` elements; `count` may be 0.

    The mean stays that of the first set, so that the difference of two means, which lie close
    together, keeps its digits.
    """
    share = other_count / (count + other_count)
    delta = (other_mean - mean) + (other_rest - rest)
    m2 += other_m2 + delta * (delta * (count * share))  # 0 where count is, however large delta
    rest = tl.where(count > 0, rest + delta * share, other_rest)
    return tl.where(count > 0, mean, other_mean), rest, m2


@triton.jit
def count_of(walker, walkers, total, BLOCK: tl.constexpr):
    """How many of `total` lines are in blocks walker, walker + walkers, ... of BLOCK lines each."""
    blocks = tl.cdiv(total, BLOCK)
    own = (blocks - walker + walkers - 1) // walkers
    missing = tl.where((blocks - 1) % walkers == walker, blocks * BLOCK - total, 0)
    return own * BLOCK - missing


@triton.jit
def store_part(ptr, mean, rest, m2, part, parts, at, width):
    """One part's statistics, for `load_merged`."""
    plane = tl.cast(parts, tl.int64) * width
    cell = ptr + tl.cast(part, tl.int64) * width + at
    tl.store(cell, mean, at < width)
    tl.store(cell + plane, rest, at < width)
    tl.store(cell + 2 * plane, m2, at < width)


@triton.jit
def load_merged(ptr, at, width, walkers, total, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """(mean, M2) [SIZE] over all `total` lines from ptr (3, walkers, width), in a fixed order."""
    mean = tl.zeros((SIZE,), tl.float32)
    rest = tl.zeros((SIZE,), tl.float32)
    m2 = tl.zeros((SIZE,), tl.float32)
    plane = tl.cast(walkers, tl.int64) * width
    seen = 0.0
    for first in range(0, walkers, GROUP):
        walker = first + tl.arange(0, GROUP)
        here = (walker < walkers)[:, None] & (at < width)[None, :]
        count = count_of(walker, walkers, total, BLOCK).to(tl.float32)
        count = tl.where(walker < walkers, count, 0.0)[:, None]
        # Past L1, which may hold an older copy of a line.
        cell = ptr + walker.to(tl.int64)[:, None] * width + at[None, :]
        means = tl.load(cell, here, 0.0, cache_modifier=".cg")
        rests = tl.load(cell + plane, here, 0.0, cache_modifier=".cg")
        m2s = tl.load(cell + 2 * plane, here, 0.0, cache_modifier=".cg")
        base = tl.sum(tl.where((walker == first)[:, None], means, 0.0), 0)
        delta = tl.where(here, (means - base[None, :]) + rests, 0.0)
        members = tl.sum(tl.sum(count, 1), 0)
        shift = tl.sum(delta * count, 0) / members
        delta -= shift[None, :]
        group_m2 = tl.sum(m2s + delta * delta * count, 0)
        mean, rest, m2 = merge(mean, rest, m2, seen, base, shift, group_m2, members)
        seen += members
    return mean + rest, m2


@triton.jit
def row_moments(
    x_ptr, p, m, M, K, stride_xm, stride_xk,
    BEFORE: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(mean, M2) [BLOCK_M] of whole rows of what the stages BEFORE the norm make of x (M, K)."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(x_ptr, m, k, M, K, stride_xm, stride_xk).to(tl.float32)
        t = run_stages(x, p, m, k, M, K, None, None, BEFORE, ACT)[len(BEFORE)]
        count = tl.minimum(BLOCK_K, K - first) * 1.0
        part = moments(t, (k < K)[None, :], count, CENTRED, 1)
        mean, rest, m2 = merge(mean, rest, m2, first * 1.0, part[0], part[1], part[2], count)
    return mean + rest, m2


@triton.jit
def last_to_arrive(counter_ptr, count):
    """True in the last of `count` programs. It sees what all have stored and resets the counter."""
    tl.debug_barrier()  # the stores of all threads come before the atomic, which is one thread's
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def wait_for_all(counter_ptr, count):
    """Returns in each of `count` programs once all have come; counters (2,) are 0 again after it.

    All must be resident at once: a cooperative launch sees to that.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    while seen < count:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == count - 1:  # nobody reads it any more
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


@triton.jit
def add_rows(ptr, first, step, count, n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N]: the sum of rows first, first + step, ... (`count` of them) of ptr (., N)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, count, BLOCK_M):
        i = begin + tl.arange(0, BLOCK_M)
        row = first + i.to(tl.int64) * step
        inside = (i < count)[:, None] & (n < N)[None, :]
        at = ptr + row[:, None] * N + n[None, :]
        total += tl.load(at, inside, 0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def store_sums(sums, outs, partial_ptr, walker, walkers, n, N):
    """partial[i][walker] = sums[i] [BLOCK_M, BLOCK_N] added up over its rows, where outs[i] is."""
    for i in tl.static_range(len(sums)):
        if outs[i] is not None:
            row = tl.cast(walkers, tl.int64) * i + walker
            tl.store(partial_ptr + row * N + n, tl.sum(sums[i], 0), n < N)


@triton.jit
def grow_sums(sums, outs, partial_ptr, fresh, walker, walkers, n, N):
    """As `store_sums`, added to what this walker has stored before, unless it is the first time."""
    tl.debug_barrier()  # the threads that load may not be those that stored
    for i in tl.static_range(len(sums)):
        if outs[i] is not None:
            row = tl.cast(walkers, tl.int64) * i + walker
            at = partial_ptr + row * N + n
            old = tl.load(at, (n < N) & (not fresh), 0.0)
            tl.store(at, old + tl.sum(sums[i], 0), n < N)


@triton.jit
def meet(
    outs, total_ptr, partial_ptr, arrived_ptr, tile, tiles, walker, walkers, n, N,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """outs[i][n] = the sum of partial[i] over all walkers, for COUNT of them, those not None.

    Always in the same order: the last of a group of programs to arrive adds the group's rows, the
    last group the groups' rows, and the last column tile adds up outs[0] (N) to total, if there is
    one. partial (COUNT, walkers, N) ; arrived (tiles * (GROUP + 1) + 1).
    """
    plane = tl.cast(walkers, tl.int64) * N
    group = walker // GROUP
    first = group * GROUP
    members = tl.minimum(GROUP, walkers - first)
    counters = arrived_ptr + tile * (GROUP + 1)
    if last_to_arrive(counters + group, members):
        for i in tl.static_range(COUNT):
            if outs[i] is not None:
                part = partial_ptr + i * plane
                total = add_rows(part, first, 1, members, n, N, BLOCK_M, BLOCK_N)
                tl.store(part + tl.cast(first, tl.int64) * N + n, total, n < N)
        groups = tl.cdiv(walkers, GROUP)
        if last_to_arrive(counters + GROUP, groups):
            for i in tl.static_range(COUNT):
                if outs[i] is not None:
                    part = partial_ptr + i * plane
                    total = add_rows(part, 0, GROUP, groups, n, N, BLOCK_M, BLOCK_N)
                    tl.store(outs[i] + n, total, n < N)
            if total_ptr is not None:
                if last_to_arrive(arrived_ptr + tiles * (GROUP + 1), tiles):
                    line = tl.zeros((BLOCK_N,), tl.float32)
                    for begin in range(0, N, BLOCK_N):
                        at = begin + tl.arange(0, BLOCK_N)
                        line += tl.load(outs[0] + at, at < N, 0.0, cache_modifier=".cg")
                    tl.store(total_ptr, tl.sum(line, 0))
