"""Calls on a GPU: captured in CUDA graphs, on cold caches, at a warm clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from fusedres.tools.timing import WARM_UP_CALLS

from .cases import HOST, Call, Task
from .counts import flops, traffic

GRAPH_SECONDS = 1e-3
ROOFLINE = 6e14, 3e12  # FLOP/s and bytes/s, about those of an H100 in bf16
MOST_CALLS = 128
COLD = 2  # times the size of L2 that inputs take in all
WARM_SECONDS = 0.1


def copies(task: Task, device: torch.device) -> int:
    """Sets of inputs that keep L2 cold; 1 where nothing is to be moved, and on a CPU."""
    if device.type != "cuda" or task.case.group == HOST:
        return 1
    L2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_CALLS, math.ceil(COLD * L2 / traffic(task))))


def calls(task: Task, copies: int) -> int:
    """In one graph: about GRAPH_SECONDS by the roofline, and each set of inputs once."""
    once = max(flops(task) / ROOFLINE[0], traffic(task) / ROOFLINE[1])
    return max(copies, min(MOST_CALLS, math.ceil(GRAPH_SECONDS / (once + 3e-6))))


def repeated(make: Callable[[], Call], calls: int, stream: Any) -> Call:
    """`calls` calls as one CUDA graph; without a stream, on a CPU, as a loop. Autograd runs a
    backward pass on the stream of its forward pass, so both run on the one that is captured.
    """
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(WARM_UP_CALLS):
            call()

    def loop() -> None:
        for _ in range(calls):
            call()

    if stream is None:
        return loop
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loop()
    held = graph, call  # `call` owns the tensors that the graph reads
    return lambda: held[0].replay()


def warm_clocks(device: torch.device) -> None:
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        end = perf_counter() + WARM_SECONDS
        while perf_counter() < end:
            torch.mm(a, a)
            torch.cuda.synchronize()
