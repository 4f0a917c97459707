"""Measures the rows of gpu_goals.py: `python -m bench.gpu_measure --out FILE`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from . import measure, report
from .cases import ACTIVATIONS, CASES, FORMULAS, INFERENCE, RECORD, STEP, Job
from .gpu_goals import MOST_CALLS, NARROW, Row, Work, judge, slower, works

CHECKED_ROWS = 16384
WARM_SECONDS = 0.1

FORMULAS.setdefault("preact", lambda f, n, a, x, r: f(a(n(x))) + r)
ACTIVATIONS.setdefault("gelu_tanh", lambda h: F.gelu(h, approximate="tanh"))

PROTOCOL = {
    "product": "T: torch.mm on the same tensors; forward x @ weight.T, backward dy @ weight and "
    "dy.T @ x",
    "fused": "inference: no_grad, eval. training: with all that backward needs saved",
    "backward": "gradients of x and every parameter, for one recorded forward pass",
    "graph": "each contender is a CUDA graph of `calls` equal calls, about 1 ms by the roofline, "
    f"at most {MOST_CALLS}; times are a replay's over `calls`; caches warm, data randn, bf16",
    "rounds": "contenders take turns within a round, in rotating order; a sample lasts at least "
    f"{measure.SAMPLE_SECONDS * 1e3:g} ms, by CUDA events; {WARM_SECONDS:g} s of large products "
    "before each row warm the clocks",
    "ratios": "of two contenders within a round; median and quartiles over rounds",
    "check": "before timing, fused's y and gradients against float64, on at most "
    f"{CHECKED_ROWS} rows; see measure.check",
    "host": "bench's tiny layer in fp32, without a graph: the host's own time",
    "memory": "ratios of bytes: saved, see measure.saved_bytes; held after a forward pass in "
    "training, output included; peak of forward and backward. Both by torch's allocator, beyond "
    "what it held before",
}
PAIRS = (
    ("fused", "product"), ("eager", "fused"), ("copy", "fused"), ("training", "fused"),
    ("erf", "tanh"), ("compile", "fused"),
)  # fmt: skip

Call = Callable[[], Any]
Contenders = dict[str, Callable[[], Call]]  # name -> what makes its call
Clock = Callable[[dict[str, Callable[[], None]], torch.device, float], Any]


def job_of(work: Work, device: torch.device) -> Job:
    return Job(work.case, "bf16", device)


def forward(work: Work, job: Job) -> Contenders:
    x, weight = job.inputs[0].detach(), job.fused.linear.weight.detach()
    copied = torch.empty_like(x)
    copy = {"copy": lambda: lambda: copied.copy_(x)} if work.features in NARROW else {}
    return {
        "product": lambda: lambda: torch.mm(x, weight.t()),
        "fused": lambda: job.call(job.fused, INFERENCE),
        "eager": lambda: job.call(job.eager, INFERENCE),
        "training": lambda: job.call(job.fused, RECORD),
        **copy,
    }


def gradients(layer: Callable[..., Any], job: Job) -> Call:
    job.call(layer, RECORD)  # for its train()
    with functorch_config.patch(donated_buffer=False):  # else a compiled one runs only once
        y = layer(*job.inputs)
    return lambda: torch.autograd.grad(y, job.leaves, job.dy, retain_graph=True)


def backward(work: Work, job: Job) -> Contenders:
    x, weight, dy = job.inputs[0].detach(), job.fused.linear.weight.detach(), job.dy
    return {
        "product": lambda: lambda: (torch.mm(dy, weight), torch.mm(dy.t(), x)),
        "fused": lambda: gradients(job.fused, job),
        "eager": lambda: gradients(job.eager, job),
    }


def training(work: Work, job: Job) -> Contenders:
    return {
        "fused": lambda: job.call(job.fused, RECORD),
        "eager": lambda: job.call(job.eager, RECORD),
    }


def gelu(work: Work, job: Job) -> Contenders:
    other = job_of(replace(work, activation="gelu_tanh"), job.device)
    return {
        "erf": lambda: job.call(job.fused, INFERENCE),
        "tanh": lambda: other.call(other.fused, INFERENCE),
    }


def compiled(work: Work, job: Job) -> Contenders:
    torch.compiler.reset()
    layer = torch.compile(job.eager, dynamic=False, fullgraph=True)
    if "backward" in work.what:
        return {
            "fused": lambda: gradients(job.fused, job),
            "compile": lambda: gradients(layer, job),
        }
    return {
        "fused": lambda: job.call(job.fused, INFERENCE),
        "compile": lambda: job.call(layer, INFERENCE),
    }


CONTENDERS = {
    "forward": forward, "backward": backward, "training": training, "gelu": gelu,
    "compiled forward": compiled, "compiled backward": compiled,
}  # fmt: skip


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Autograd runs a backward pass on the stream of its forward pass: that must be the captured
    one, so both run on it.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def repeated(make: Callable[[], Call], calls: int, stream: Any) -> Callable[[], None]:
    """`calls` calls as one CUDA graph; without a stream, on a CPU, as a loop."""
    with on_stream(stream):
        call = make()
        for _ in range(measure.WARM_UP_CALLS):
            call()

    def loop() -> None:
        for _ in range(calls):
            call()

    if stream is None:
        return loop
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loop()
    return lambda: graph.replay() if call else None  # `call` holds what the graph reads


def warm_clocks(device: torch.device) -> None:
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        end = perf_counter() + WARM_SECONDS
        while perf_counter() < end:
            torch.mm(a, a)
            torch.cuda.synchronize()


@cache
def wrong(work: Work, device: torch.device) -> list[str]:
    return measure.check(job_of(work, device))


def measure_work(
    work: Work, device: torch.device, seconds: float, clock: Clock = measure.interleave
) -> Row:
    """The row of `work` as the results file holds it."""
    row: Row = {"name": work.name, **vars(work), "ratios": {}, "failed": {}}
    if work.what == "host":
        return row | {"ratios": host(device, seconds)}
    lines = wrong(replace(work, what="check", rows=min(work.rows, CHECKED_ROWS)), device)
    if lines:
        return row | {"failed": {"fused": f"wrong, so nothing is timed: {'; '.join(lines)}"}}
    job = job_of(work, device)
    if work.what == "memory":
        return row | memory(job)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    ready = {}
    for name, make in CONTENDERS[work.what](work, job).items():
        try:
            ready[name] = repeated(make, work.calls, stream)
        except Exception as error:  # the others go on
            row["failed"][name] = f"{type(error).__name__}: {error}"
    warm_clocks(device)
    rounds, calm = clock(ready, device, seconds)
    times = {n: measure.summary([1e6 * r[n] / work.calls for r in rounds]) for n in ready}
    ratios = {
        f"{a} / {b}": measure.summary([r[a] / r[b] for r in rounds])
        for a, b in PAIRS
        if a in ready and b in ready
    }
    row |= {"calls": work.calls, "rounds": len(rounds), "calm": calm, "backend": job.backend}
    return row | {"times_us": times, "ratios": ratios}


def host(device: torch.device, seconds: float) -> dict[str, Any]:
    tiny = next(case for case in CASES if case.host)
    rows = measure.measure(tiny, "fp32", device, {"compile", "functional"}, seconds)
    inverse = {"median": "median", "q1": "q3", "q3": "q1"}
    ratios = {row["mode"]: row["ratios"]["eager"] for row in rows}
    return {
        f"fused / eager, {mode}": {k: 1 / ratio[v] for k, v in inverse.items()}
        for mode, ratio in ratios.items()
    }


def memory(job: Job) -> Row:
    """Bytes that one layer saves, and on a GPU what its allocator holds and peaks at."""
    found: dict[str, dict[str, int]] = {}
    for name, layer in (("fused", job.fused), ("eager", job.eager)):
        found[name] = {"saved": measure.saved_bytes(layer, job)}
        if job.device.type == "cuda":
            step = job.call(layer, STEP)
            step()  # compiles, and makes the workspaces that stay
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            y = layer(*job.inputs)
            found[name]["held"] = torch.cuda.memory_allocated() - before
            del y
            torch.cuda.reset_peak_memory_stats()
            step()
            found[name]["peak"] = torch.cuda.max_memory_allocated() - before
    ratios = {
        f"{kind}, fused / eager": {"median": found["fused"][kind] / of_eager}
        for kind, of_eager in found["eager"].items()
    }
    return {"bytes": found, "ratios": ratios}


def collect(rows: list[Row], device: torch.device) -> Row:
    found = report.collect(rows, device, os.getloadavg()[0])
    return found | {"protocol": PROTOCOL, "goals": judge(rows), "slower": slower(rows)}


def run(
    chosen: list[Work], device: torch.device, seconds: float, end: float, path: Path
) -> list[Row]:
    """Rows until the clock says `end`. The file is written after each: a kill loses only one."""
    rows: list[Row] = []
    for i, work in enumerate(chosen, 1):
        if perf_counter() > end:
            print(f"out of time: {len(chosen) - i + 1} rows are left out", flush=True)
            break
        try:
            rows.append(measure_work(work, device, seconds))
        except Exception as error:
            told = {"row": f"{type(error).__name__}: {error}"}
            rows.append({"name": work.name, **vars(work), "ratios": {}, "failed": told})
        told = [f"{pair} {ratio['median']:.2f}" for pair, ratio in rows[-1]["ratios"].items()]
        told += [f"{name} FAILED: {why}" for name, why in rows[-1]["failed"].items()]
        print(f"{i:2}/{len(chosen)} {work.name}: {', '.join(told)}", flush=True)
        path.write_text(json.dumps(collect(rows, device), indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_measure", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for all rows")
    parser.add_argument("--seconds", type=float, default=0.4, help="for the rounds of one row")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds TEXT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    end = perf_counter() + args.limit
    torch.set_num_threads(1)  # what is timed runs on the GPU
    chosen = [work for work in works() if args.only in work.name]
    rows = run(chosen, torch.device(args.device), args.seconds, end, args.out)
    if not any(row["ratios"] for row in rows):
        parser.exit(1, "gpu_measure: no row was measured\n")


if __name__ == "__main__":
    main()
