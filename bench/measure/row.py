"""One row: a check first, then rounds in which the contenders take turns; then what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from fusedres.tools import timing
from fusedres.tools.bench import check, compare, saved_bytes
from fusedres.tools.timing import interleave, summary

from . import ceilings, graphs
from .cases import (
    GRAPHS,
    HOST,
    ONE_THREAD,
    STEP_ONE_THREAD,
    STEPS,
    Call,
    Case,
    Job,
    Task,
    product_dtype,
)
from .contenders import ABOUT, RIVALS, makers
from .counts import flops, host_us, launches, peak_bytes, traffic

Row = dict[str, Any]
Rounds = list[dict[str, float]]  # of seconds a call, by contender

CHECKED_ROWS = {"cpu": 2048, "cuda": 16384}

COUNTED = (check, flops, saved_bytes, peak_bytes, launches, host_us)
COUNTS = {"bytes": traffic, **{function.__name__: function for function in COUNTED}}
PROTOCOL: dict[str, Any] = {
    "rounds": f"{timing.MIN_ROUNDS} to {timing.MAX_ROUNDS}, in one process; a round times every "
    "contender once, in rotating order; a round in which other processes took a core more often "
    f"than {timing.PREEMPTIONS_A_SECOND} times a second is dropped",
    "calm": f"false: fewer than {timing.MIN_ROUNDS} rounds were left, so all were kept",
    "sample": f"{timing.WARM_UP_CALLS} warm-up calls, then as many calls a sample as last "
    f"{timing.SAMPLE_SECONDS * 1e3:g} ms; garbage collection off",
    "times_us": "us a call, over rounds",
    "ratios": "contender / fused within a round, over rounds; above 1 fused is faster",
    "slower_than": f"if calm, of {', '.join(RIVALS)} those with median ratio < "
    f"{1 - timing.NOISE:g} and upper quartile < 1",
    "clock": "CPU: wall time, caches warm, with one thread its CPU time, which a busy "
    "machine hardly disturbs; CUDA: events around the sample",
    "cold": f"on a GPU inputs rotate through `copies` sets, {graphs.COLD} times L2 in all, at most "
    f"{graphs.MOST_CALLS}; weights stay. Rows of group host do not",
    "graph": "`calls` calls in one CUDA graph, about 1 ms by the roofline; times are a replay's "
    f"over `calls`; {graphs.WARM_SECONDS:g} s of large products before each row warm the clocks",
    "checked rows": CHECKED_ROWS,
    "ceilings": ceilings.PROTOCOL,
    "contenders": ABOUT,
    **{name: " ".join(str(function.__doc__).split()) for name, function in COUNTS.items()},
}


class Options(NamedTuple):
    device: torch.device
    seconds: float  # for its rounds
    ceilings: Row
    compiled: tuple[str, ...] = ()  # which of torch.compile's contenders run
    left_out: str = ""  # why the others do not


@cache
def wrong(case: Case, dtype: str, device: torch.device) -> str | None:
    """`check` of the case on fewer rows, where it has too many for float64."""
    rows = min(case.rows, CHECKED_ROWS[device.type])
    job = Job(replace(case, rows=rows), dtype, device)
    with job.autocast():
        return check(job)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(task: Task, options: Options, clock: Any = interleave) -> tuple[Row, Rounds]:
    with one_thread() if task.mode in (ONE_THREAD, STEP_ONE_THREAD) else nullcontext():
        return _measure(task, options, clock)


def _measure(task: Task, options: Options, clock: Any) -> tuple[Row, Rounds]:
    """The row of `task` as the results file holds it, and its rounds.

    Raises ArithmeticError where fused is wrong, and what fused itself raises.
    """
    device, mode = options.device, task.mode
    if told := wrong(task.case, task.dtype, device):
        raise ArithmeticError(f"fused is wrong, so nothing is timed: {told}")
    torch.compiler.reset()  # else the 9th case meets dynamo's limit of graphs for one function
    copies = graphs.copies(task, device)
    job = Job(task.case, task.dtype, device, copies)
    calls = graphs.calls(task, copies) if mode in GRAPHS else 1
    ready, failed = prepare(job, task, options, calls)
    graphs.warm_clocks(device)
    rounds, calm = clock(ready, device, options.seconds)
    rounds = [{name: seconds / calls for name, seconds in each.items()} for each in rounds]
    case, N = task.case, task.case.features
    row: Row = {"case": case.name, "group": case.group, "dtype": task.dtype, "mode": mode}
    row |= {"rows": case.rows, "features": N, "out_features": N, "order": case.order}
    row |= {"norm": case.norm, "activation": case.activation, "backend": job.backend}
    row |= {"hidden": case.hidden} if case.hidden else {}
    row |= {"rounds": len(rounds), "calm": calm, "copies": copies, "calls": calls}
    row |= compare(rounds, calm, RIVALS) | rates(task, rounds, options.ceilings)
    return row | counted(task, job, ready, row) | {"failed": failed}, rounds


def prepare(
    job: Job, task: Task, options: Options, calls: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """What is timed, warmed up; and why contenders cannot be. Without fused there is no row."""
    graph = task.mode in GRAPHS
    stream = torch.cuda.Stream() if graph and job.device.type == "cuda" else None
    ready: dict[str, Call] = {}
    names = ("compile", "compile-max")
    failed = {name: options.left_out for name in names if name not in options.compiled}
    for name, make in makers(job, task, options.compiled).items():
        try:
            call = graphs.repeated(make, calls, stream) if graph else make()
            call()
            ready[name] = call
        except Exception as error:  # the others go on
            if name == "fused":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return ready, failed


def rates(task: Task, rounds: Rounds, ceilings: Row) -> Row:
    """Fused's GB/s and TFLOP/s, and what part of the machine's they are."""
    seconds = summary([r["fused"] for r in rounds])["median"]
    work, moved = flops(task), traffic(task)
    gb, tflop = moved / seconds / 1e9, work / seconds / 1e12
    row = {"flops": work, "bytes": moved, "gb_per_s": gb, "tflop_per_s": tflop}
    row["copy_share"] = gb / ceilings["copy_gb_per_s"]
    return row | {"matmul_share": tflop / ceilings["matmul_tflop_per_s"][product_dtype(task.dtype)]}


def counted(task: Task, job: Job, ready: dict[str, Call], row: Row) -> Row:
    found: Row = {}
    gpu, layers = job.device.type == "cuda", {"eager": job.eager, "fused": job.fused}
    if task.mode in STEPS:
        with job.autocast():
            found["saved_bytes"] = {n: saved_bytes(each, *job.inputs) for n, each in layers.items()}
        steps = {name: job.call(layer, task.mode) for name, layer in layers.items()}
        found["peak_bytes"] = {n: peak_bytes(call, job.device) for n, call in steps.items()}
    if task.mode not in GRAPHS:  # a replay is one launch, and tells nothing of its kernels
        names = [name for name in ready if gpu or not name.startswith("compile")]
        found["launches"] = {name: launches(ready[name], job.device) for name in names}
        if gpu:
            found["host_us"] = {name: host_us(call, job.device) for name, call in ready.items()}
        elif task.case.group == HOST:
            found["host_us"] = {name: time["median"] for name, time in row["times_us"].items()}
    return found
