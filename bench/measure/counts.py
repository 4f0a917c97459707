"""What a layer costs without a clock: arithmetic, traffic, memory, launches, the host's time."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .cases import BACKWARD_GRAPH, STEPS, TENSORS, Call, Task

HOST_ROUNDS, HOST_CALLS = 9, 5
OPS = ("aten::", "fusedres::", "mkldnn::")  # what the profiler calls an op that was dispatched
VIEWS = {f"aten::{name}" for name in ("t", "transpose", "view", "detach", "expand", "as_strided")}
PASSES = {**dict.fromkeys(STEPS, 3), BACKWARD_GRAPH: 2}  # in units of the forward pass


def flops(task: Task) -> int:
    """2 M N K a product, and backward has two more: of dx and of dweight. Products only."""
    return 2 * task.case.rows * task.case.weights * PASSES.get(task.mode, 1)


def traffic(task: Task) -> int:
    """Bytes of forward: x, residual (if it is not x), weight and vectors read once, y written once;
    of two matmuls also h, written and read. Backward twice that: it reads dy, x and what was saved
    and writes dx, reads the parameters again and writes their gradients.
    """
    case, N, H = task.case, task.case.features, task.case.hidden or 0
    activations = case.rows * (2 * N + 2 * H + N * case.residual)
    parameters = case.weights + H + N * (2 if case.norm == "rms" else 3)
    passes = PASSES.get(task.mode, 1)
    return (activations + parameters) * TENSORS[task.dtype].itemsize * passes


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that torch's allocator held at once during a step, beyond what it held before; y and
    gradients included.
    """
    call()  # makes what stays: workspaces, compiled kernels
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    now = peak = 0
    events = found.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def launches(call: Call, device: torch.device) -> int:
    """Of one call, by torch.profiler: kernels on a GPU; on a CPU the ops that no other op called,
    but views. torch.compile's code is no op, so it has no number there.
    """
    call()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        call()
        if gpu:
            torch.cuda.synchronize(device)
    if gpu:
        on_gpu = [event for event in found.events() if event.device_type == DeviceType.CUDA]
        names = [event.name for event in on_gpu if not event.is_user_annotation]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
    ops = [event for event in found.events() if event.name.startswith(OPS)]
    return sum(op.name not in VIEWS and not _within_op(op) for op in ops)


def _within_op(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith(OPS) or _within_op(parent))


def host_us(call: Call, device: torch.device) -> float:
    """Microseconds until a call returns, whatever the GPU does meanwhile. On a CPU all of the time,
    in group host only, where nothing is to be computed.
    """
    times = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize(device)
        began = perf_counter()
        for _ in range(HOST_CALLS):
            call()
        times.append(1e6 * (perf_counter() - began) / HOST_CALLS)
    torch.cuda.synchronize(device)
    return median(times)
