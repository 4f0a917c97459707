"""How it is measured: a check first, then rounds that interleave the contenders; saved bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres.timing import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    NOISE,
    PREEMPTIONS_A_SECOND,
    SAMPLE_SECONDS,
    WARM_UP_CALLS,
    interleave,
    summary,
)

from .cases import CONTENDERS, STEP, Case, Job

PROTOCOL = {
    "rounds": f"{MIN_ROUNDS} to {MAX_ROUNDS}, in one process; a round times every contender once, "
    "in rotating order; a round in which other processes took a core more often than "
    f"{PREEMPTIONS_A_SECOND} times a second is dropped",
    "calm": f"false: fewer than {MIN_ROUNDS} rounds were left, so all were kept",
    "sample": f"{WARM_UP_CALLS} warm-up calls, then as many calls a sample as last "
    f"{SAMPLE_SECONDS * 1e3:g} ms; garbage collection off",
    "times_us": "microseconds a call, over rounds",
    "ratios": "contender / fused within a round, over rounds; above 1 fused is faster",
    "slower_than": f"if calm, contenders with median ratio < {1 - NOISE:g} and upper quartile < 1",
    "saved_bytes": "storages that autograd saves in a forward, each once and whole, except what "
    "lives anyway: inputs, parameters, buffers and the output (the next layer's input)",
    "clock": "CPU: wall time, with --threads 1 the thread's CPU time, which a busy machine hardly "
    "disturbs; CUDA: events around the sample, warm caches, no graph",
}


def saved_bytes(layer: Callable[..., Tensor], job: Job) -> int:
    """What autograd keeps for backward beyond what lives anyway; see PROTOCOL."""
    saved: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return t

    job.fused.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(*job.inputs)
    for t in (*job.leaves, *job.fused.buffers(), y):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def check(job: Job) -> list[str]:
    """Where fused is wrong: y and every gradient against the hand-written layer in float64.

    The RMS error may be twice eager's (sums in another order) plus one rounding step. With ReLU, an
    element that rounds across the kink has its gradient right or wrong as a whole, in every
    implementation: about 16 eps of them lie that near, which is sqrt(16 eps) of a gradient's RMS.
    """
    eps = torch.finfo(job.dy.dtype).eps
    kink = math.sqrt(16 * eps) if job.case.activation == "relu" else 0.0

    def results(layer: Any, inputs: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
        parameters = dict(layer.train().named_parameters())
        y = layer(*inputs)
        grads = torch.autograd.grad(y, [*inputs, *parameters.values()], dy)
        names = [*("x", "residual")[: len(inputs)], *parameters]
        return {"y": y, **{f"d {name}": g for name, g in zip(names, grads, strict=True)}}

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    doubles = [t.detach().double().requires_grad_() for t in job.inputs]
    exact = results(copy.deepcopy(job.eager).double(), doubles, job.dy.double())
    eager = results(job.eager, list(job.inputs), job.dy)
    fused = results(job.fused, list(job.inputs), job.dy)
    wrong = []
    for name, truth in exact.items():
        error = rms(fused[name] - truth)
        bound = 2 * rms(eager[name] - truth) + (eps + (name != "y") * kink) * rms(truth)
        if not error <= bound:
            wrong.append(f"{name} has RMS error {error:.3g}, expected at most {bound:.3g}")
    return wrong


def measure(case: Case, dtype: str, device: torch.device, without: set[str], seconds: float) -> Any:
    """One row for each mode of the case, as the results file holds it."""
    torch.compiler.reset()  # else the 9th case meets dynamo's limit of graphs for one function
    job = Job(case, dtype, device)
    layers = {name: CONTENDERS[name](job) for name in case.contenders if name not in without}
    kept = {name: saved_bytes(layers[name], job) for name in ("eager", "fused")}
    recipe = {
        key: getattr(case, key) for key in ("rows", "features", "order", "norm", "activation")
    }
    rows = []
    for mode in case.modes:
        calls = {name: job.call(layer, mode) for name, layer in layers.items()}
        rounds, calm = interleave(calls, device, seconds)
        times = {name: summary([1e6 * r[name] for r in rounds]) for name in calls}
        ratios = {n: summary([r[n] / r["fused"] for r in rounds]) for n in calls if n != "fused"}
        row = {"case": case.name, "dtype": dtype, "mode": mode, **recipe, "host": case.host}
        row |= {"backend": job.backend, "rounds": len(rounds), "calm": calm}
        row |= {"times_us": times, "ratios": ratios}
        row["slower_than"] = [
            n for n, r in ratios.items() if calm and r["median"] < 1 - NOISE and r["q3"] < 1
        ]
        rows.append(row | ({"saved_bytes": kept} if mode == STEP else {}))
    return rows
