"""Timing calls against each other: rounds in one process that take turns.

A single time means little on a machine whose clock and load change; a ratio within a round means
much more. So every round times each contender once, in rotating order.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from statistics import quantiles
from time import perf_counter, thread_time

import torch

WARM_UP_CALLS = 3
SAMPLE_SECONDS = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 7, 300
NOISE = 0.02
PREEMPTIONS_A_SECOND = 50  # the kernel's own threads cause a few, another busy process hundreds


def seconds_per_call(call: Callable[[], None], calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls: by events on a GPU, the thread's CPU time with one thread."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
    clock = thread_time if torch.get_num_threads() == 1 else perf_counter
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls


def interleave(
    contenders: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> tuple[list[dict[str, float]], bool]:
    """Rounds of seconds a call by contender, for about `seconds`; True if undisturbed."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(WARM_UP_CALLS):
            call()
        once = min(seconds_per_call(call, 1, device) for _ in range(3))
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
    every: list[dict[str, float]] = []
    calm: list[dict[str, float]] = []
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        while len(calm) < MAX_ROUNDS:
            late = perf_counter() - end
            if len(every) >= MIN_ROUNDS and late > (0 if len(calm) >= MIN_ROUNDS else seconds):
                break
            before, began = preemptions(), perf_counter()
            times = {n: seconds_per_call(contenders[n], calls[n], device) for n in order}
            every.append(times)
            rare = preemptions() - before <= (perf_counter() - began) * PREEMPTIONS_A_SECOND
            calm += [times] if rare else []
            order.append(order.pop(0))
    finally:
        gc.enable()
    enough = len(calm) >= MIN_ROUNDS
    return (calm if enough else every), enough


def preemptions() -> int:
    """How often another process took one of our threads' core away, so far; 0 where not counted.

    On a busy machine a thread that waits at a barrier then waits for a time slice, about 8 ms.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    one_thread = torch.get_num_threads() == 1  # whose CPU time is measured
    return 0 if one_thread else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of one value, that value."""
    q1, middle, q3 = quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "q1": q1, "q3": q3}
