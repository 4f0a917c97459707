"""Whether a fused block is faster than what it replaces, on this machine: measured once a kind.

On a CPU it depends on whose product is the better one, the library's or ours, for this width and
this make of CPU, which no rule foretells. On a GPU fewer launches and passes over memory are taken
for a gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dataflow import written
from .proof import Pair
from .reading import value

ROUNDS, SECONDS = 20, 0.3  # of both in turn; no more than so long
MARGIN = 0.97  # of the time of what is replaced: clocks and neighbours are worth 3 %
_MEASURED: dict[tuple[Any, ...], tuple[float, float]] = {}


def _runs(pair: Pair) -> tuple[Callable[[], None], Callable[[], None]]:
    """Both as calls to time: a step where gradients are recorded, else a forward."""
    numbers, records = pair.numbers(small=False), torch.is_grad_enabled()
    needs = [getattr(value(node), "requires_grad", False) for node in pair.inputs]
    records &= any(needs)
    for t, need in zip(numbers, needs, strict=True):
        if isinstance(t, Tensor) and need and records:
            t.requires_grad_()

    changed = {n for node in pair.run.nodes for n in written(node)}
    copied = [i for i, node in enumerate(pair.inputs) if node in changed]

    def call(module: Callable[..., Tensor]) -> None:
        given = list(numbers)
        for i in copied:  # in both, since a leaf must not be written into
            given[i] = numbers[i].clone()
        with pair.autocast:
            y = module(*given)
        if records:
            learn = [t for t in numbers if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.grad(y, learn, y.detach(), allow_unused=True)

    return lambda: call(pair.original), lambda: call(pair.fused)


def _measure(pair: Pair) -> tuple[float, float]:
    original, fused = _runs(pair)
    best, start = [float("inf"), float("inf")], time.perf_counter()
    for turn in range(ROUNDS):
        for i, run in enumerate((original, fused)):
            begin = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - begin)
        if turn > 1 and time.perf_counter() - start > SECONDS:
            break
    return best[0], best[1]


def loss(pair: Pair) -> str | None:
    """Why the run is better left as it is; None where fused is faster."""
    if value(pair.run.add).device.type != "cpu":
        return None
    grads = [getattr(value(node), "requires_grad", False) for node in pair.inputs]
    key = (*pair.key(), tuple(grads), torch.is_grad_enabled(), torch.get_num_threads())
    if key not in _MEASURED:
        try:
            _MEASURED[key] = _measure(pair)
        except (RuntimeError, TypeError, ValueError) as error:  # as where there is no memory
            return f"to time it beside torch failed: {str(error).splitlines()[0]}"
    plain, fused = _MEASURED[key]
    if fused <= MARGIN * plain:
        return None
    return f"it would be no faster here: {_time(fused)} fused, {_time(plain)} by torch"


def _time(seconds: float) -> str:
    """Three digits of it, in us below 1 ms."""
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{float(f'{scale * seconds:.3g}'):g} {unit}"
