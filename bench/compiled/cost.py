"""What compiled kernels predict: seconds by counted instructions, tensor cores, memory and latency.

    issue     instructions of a warp x warps / 4 schedulers, one a clock
    tensor    FLOPs of a tile / the rate that the library reaches; half of it on Hopper by mma.sync
    memory    bytes that must move / a copy's rate
    ahead     bytes copied / what pipelines hold on their way in one latency
    L2        bytes copied / what a multiprocessor gets from L2

A multiprocessor that holds one program at a time does a tile's product, the slower of issue and
tensor, then the rest of its instructions, then waits once for memory; with several, one's waiting
is another's work. The kernel takes the longest of that and of memory, ahead and L2, and a launch.
Sums that meet at the end are not counted. Nothing here is measured: H200 and A100 by NVIDIA's data
sheets.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from fusedres.backends import plan as planner
from fusedres.backends import triton as backend
from fusedres.spec import Spec

from ..scaling.model import Layer, eager
from . import aot
from .sass import Loop, look

LATENCY = 800  # clocks from memory to a register, when it is busy
FROM_L2 = 46  # bytes a clock
WALKERS = ("residual_backward_kernel", "residual_backward_wide_kernel")


@dataclass(frozen=True)
class Gpu:
    name: str
    clock: float  # Hz, under load
    copy: float  # bytes/s
    library: float  # FLOP/s that the library's product reaches
    shared: int  # bytes of a multiprocessor
    launch: float = 2e-6


GPUS = {
    90: Gpu("H200", 1.75e9, 0.9 * 4.8e12, 0.8 * 989e12, 228 << 10),
    80: Gpu("A100", 1.41e9, 0.9 * 2.04e12, 0.8 * 312e12, 164 << 10),
}


@dataclass(frozen=True)
class Work:
    """What one program does: turns of the loop that multiplies and of the one that stores, in the
    mean; FLOPs; and how often all else happens.
    """

    product: float = 0.0
    finish: float = 0.0
    flops: float = 0.0
    straight: float = 1.0


def resident(found: dict[str, Any], gpu: Gpu) -> int:
    """Programs that a multiprocessor holds."""
    of_registers = 65536 // (ceil(found["registers"] / 8) * 8 * 32 * found["warps"])
    of_shared = gpu.shared // (found["shared"] + 1024)
    return max(1, min(of_registers, of_shared, 64 // found["warps"], 32))


def loops(found: dict[str, Any]) -> tuple[Loop | None, Loop | None]:
    """The loop that multiplies, and the one that stores, if not the same."""
    product = next((loop for loop in found["loops"] if loop.multiplies), None)
    finish = next((loop for loop in found["loops"] if loop.stores and loop is not product), None)
    return product, finish


def in_flight(found: dict[str, Any], gpu: Gpu) -> float:
    """Bytes on their way to a multiprocessor: all stages of a pipeline but the one in use."""
    copied = max((loop.copied for loop in found["loops"]), default=0)
    return resident(found, gpu) * copied * found["warps"] * (found["stages"] - 1)


def seconds(found: dict[str, Any], work: Work, moved: float, sm: int) -> float:
    """Of one launch that moves so many bytes of memory."""
    gpu, processors = GPUS[sm], aot.PROCESSORS[sm]
    product, finish = loops(found)
    share = found["programs"] / processors
    each = ceil(share) if share < 8 else share  # programs of the busiest multiprocessor
    per = found["warps"] / 4
    issue = per * (product.instructions * work.product if product else 0)
    rest = per * (found["straight"] * work.straight)
    rest += per * (finish.instructions * work.finish if finish else 0)
    rate = gpu.library / (processors * gpu.clock) / (1 if sm != 90 or found["wgmma"] else 2)
    tensor, held = work.flops / rate, resident(found, gpu)
    if held == 1:
        busy = each * (max(issue, tensor) + rest + LATENCY)
    else:
        turns = ceil(each / held) * (max(issue, tensor) + rest + LATENCY)
        busy = max(each * (issue + rest), each * tensor, turns)
    copied = (product.copied * work.product if product else 0) + (
        finish.copied * work.finish if finish else 0
    )
    flying = max(in_flight(found, gpu), 1.0)
    ahead = each * copied * found["warps"] * max(LATENCY / flying, 1 / FROM_L2)
    return max(max(busy, ahead) / gpu.clock, moved / gpu.copy) + gpu.launch


def forward(spec: Spec, layer: Layer, sm: int, save: bool) -> float:
    """Seconds of one launch, or of two where stages before `linear` are apart; `save`: for
    backward.
    """
    M, N, K = layer.M, layer.N, layer.K
    *first, found = aot.compiled(
        sm, aot.forward, spec, torch.bfloat16, M, N, K, None, save, look=look
    )
    chosen = planner.plan(spec, torch.bfloat16, M, N, K, aot.device(sm))
    steps = ceil(K / planner.pass_tile(K)[1])
    apart = sum(seconds(k, Work(0, steps, 0, 1.0), 2 * layer.x, sm) for k in first)
    tile = chosen.tile
    blocks = ceil(M / tile.BLOCK_M) * ceil(N / tile.BLOCK_N) / chosen.programs
    steps = ceil(K / tile.BLOCK_K) * blocks
    # Of a row block's tiles one is finished by the program that comes last.
    finish = blocks * tile.BLOCK_N * tile.BLOCK_M / 4096 if chosen.family == "wide" else 0.0
    work = Work(steps, finish, 2 * tile.BLOCK_M * tile.BLOCK_N * K * blocks, max(1.0, blocks))
    moved = layer.product.bytes + (layer.y if save and spec.saves_z else 0)
    return apart + seconds(found, work, moved, sm)


def backward(spec: Spec, layer: Layer, sm: int) -> float:
    """Seconds of all launches, the library's products by a roofline."""
    M, N, K, gpu = layer.M, layer.N, layer.K, GPUS[sm]
    kernels = aot.compiled(sm, aot.backward, spec, torch.bfloat16, M, N, K, look=look)
    total = 0.0
    for found in kernels:
        whole = found["kernel"] == "residual_backward_product_kernel"
        over = "columns" if spec.batch_stats else "rows" if spec.norm else None
        plain = backend.spares_registers(spec, "epilogue", N, K, 2)
        rows = planner.plan_backward(M, N, over, aot.device(sm), plain)
        if whole:
            cut = backend.plan_whole(spec, torch.bfloat16, M, N, K, aot.device(sm))
            blocks = ceil(M / cut.tile.BLOCK_M) / cut.walkers
            steps = blocks * ceil(K / cut.tile.BLOCK_K)
            flops = 2 * cut.tile.BLOCK_M * N * K * blocks
            total += seconds(found, Work(steps, 0, flops, blocks), 4 * layer.y + layer.x, sm)
        else:
            blocks = ceil(M / rows.BLOCK_M) / rows.walkers * (rows.tiles if rows.wide else 1)
            again = blocks if found["kernel"] not in WALKERS else 1.0
            total += seconds(found, Work(0, blocks, 0, again), 3 * layer.y, sm)
    products = [layer.product] if len(kernels) and whole else [layer.product, layer.product]
    added = 0 if whole else layer.y  # dx = dz @ weight + dy
    return total + sum(roof(k, gpu) for k in products) + added / gpu.copy


def roof(kernel: Any, gpu: Gpu) -> float:
    return max(kernel.flops / gpu.library, kernel.bytes / gpu.copy) + gpu.launch


def products(layer: Layer, sm: int, backward: bool) -> float:
    """T: the bare product by the library, or the two of backward."""
    return (1 + backward) * roof(layer.product, GPUS[sm])


def of_eager(layer: Layer, sm: int, backward: bool) -> float:
    there = len(eager(layer, False))
    found = eager(layer, True)
    return sum(roof(k, GPUS[sm]) for k in (found[there:] if backward else found[:there]))
