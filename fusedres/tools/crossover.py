"""Part of `python -m fusedres tune`: up to how many rows the CUDA C++ kernels are the fastest.

"auto" takes them for small layers, since their launch costs the host little, and others for large
ones (`backends.candidates`). For each size of weight this times a training step on both in turns:
forward and backward as eager mode runs them, the host's time included. It begins with 16 rows and
doubles them until the C++ kernels lose. The last number of rows at which they won goes into the
table "rows by size" of kernels/configs/<device>.json, and "auto" decides by it.

    WRONG   results of the two differ by more than rounding: the size is left as it was
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import FusedResidualFunction
from ..backends import plan as planner
from ..backends.plan import Device
from .timing import interleave
from .tune import CUDA, Call, difference, random_operands, update

LEAST_ROWS, MOST_ROWS = 16, 65536
SECONDS = 0.4  # a comparison


def sizes(jobs: dict[str, list[Call]]) -> dict[str, Call]:
    """The first call of each size of weight and dtype."""
    found: dict[str, Call] = {}
    for call in (call for calls in jobs.values() for call in calls):
        found.setdefault(planner.size_key(call.dtype.itemsize, call.N, call.K), call)
    return found


def rivals(call: Call) -> tuple[str, str]:
    """What "auto" takes for a small layer and for a large one."""
    choose = partial(backends.choose, "auto", call.spec.text, call.dtype, CUDA, call.N, call.K)
    return choose(True), choose(False)


def prepare(call: Call, where: torch.device = CUDA) -> Callable[[str], list[Tensor]]:
    """run(backend): y and the gradients of one training step on random operands."""
    operands = random_operands(call, where)
    leaves = [t.requires_grad_() for t in operands if isinstance(t, Tensor)]
    dy = torch.randn(call.M, call.N, device=where, dtype=call.dtype)

    def run(backend: str) -> list[Tensor]:
        out = FusedResidualFunction.apply(*operands, call.spec.text, backend)
        y = out[0] if isinstance(out, tuple) else out
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return run


def most_rows(call: Call, small: str, large: str, end: float) -> int | None:
    """Up to how many rows `small` beats `large`; None if they disagree. TimeoutError past `end`."""
    won, M = 0, LEAST_ROWS
    while M <= MOST_ROWS:
        if perf_counter() > end:
            raise TimeoutError
        try:
            run = prepare(call._replace(M=M))
            pairs = zip(run(small), run(large), strict=True)
            told = [*filter(None, (difference(a, b, max(M, call.K)) for a, b in pairs))]
            if told:
                print(f"  WRONG   {M} rows, {small} against {large}: {told[0]}")
                return None
            both: dict[str, Any] = {name: partial(run, name) for name in (small, large)}
            rounds, _ = interleave(both, CUDA, SECONDS)
        except torch.OutOfMemoryError:
            print(f"  {M} rows do not fit the GPU's memory")
            break
        ratio = median(each[small] / each[large] for each in rounds)
        print(f"  {M:6} rows  {small} / {large} {ratio:.2f}", flush=True)
        if ratio > 1:
            break
        won, M = M, 2 * M
    return won


def measure(found: dict[str, Call], device: Device, path: Path, limit: float) -> int:
    """Measures each size, for `limit` seconds; returns how many were wrong."""
    end, wrong = perf_counter() + limit, 0
    for done, (key, call) in enumerate(found.items()):
        print(f"backends {key}", flush=True)
        small, large = rivals(call)
        if small == large:
            print(f"  only {small} is here")
            continue
        try:
            rows = most_rows(call, small, large, end)
        except TimeoutError:
            print(f"time is up: {len(found) - done} of {len(found)} sizes are left as they were")
            break
        if rows is None:
            wrong += 1
        else:
            update(path, device, partial(_set, key=key, rows=rows))
    return wrong


def _set(found: dict[str, Any], key: str, rows: int) -> None:
    found.setdefault("auto", {}).setdefault("rows by size", {})[key] = rows
