"""Compiles what the Triton backend launches, without a GPU.

A driver that only knows a target stands in for the GPU: the backend launches on meta tensors, and
what it would launch is compiled for that target instead. The process is left with that driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fusedres.backends import launch as launches
from fusedres.backends import plan as planner
from fusedres.spec import Spec

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block, by architecture
PROCESSORS = {80: 108, 90: 132, 100: 148}
SMALL = {86: (99 << 10, 84), 89: (99 << 10, 128), 120: (99 << 10, 170)}  # both, by architecture


class Target:
    """A driver for a GPU that is not here."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0


def device(sm: int) -> planner.Device:
    """What the planner would know of the target."""
    shared, processors = SMALL[sm] if sm in SMALL else (SHARED[sm], PROCESSORS[sm])
    return planner.Device("any", processors, shared, f"sm_{sm}")


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the CUDA toolkit's tools says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def properties(binary: Any) -> dict[str, Any]:
    """What a compiled kernel needs and contains."""
    usage = tool("cuobjdump", binary.asm["cubin"], "-res-usage")
    ptx, ttir = binary.asm["ptx"], binary.asm["ttir"]
    offsets = re.findall(
        r"tt\.addptr [^:]*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(\w+)>", ttir
    )
    return {
        "kernel": binary.metadata.name,
        "stack": sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "warps": binary.metadata.num_warps,
        "stages": binary.metadata.num_stages,
        "shared": binary.metadata.shared,
        "cooperative": binary.metadata.launch_cooperative_grid,
        "wgmma": ptx.count("wgmma.mma_async"),
        "register_a": len(re.findall(r"wgmma\.mma_async[^;]*?\}\s*,\s*\{", ptx)),
        "async_copies": ptx.count("cp.async.c"),
        "stores": stores(ptx),
        "tanh": ptx.count("tanh.approx.f32"),
        "offsets": sorted(set(offsets)),
    }


def stores(ptx: str) -> dict[int, int]:
    """How many stores to global memory move so many bits at once."""
    found: dict[int, int] = {}
    for vector, bits in re.findall(r"st\.global(?:\.v(\d))?\.[bfu](\d+)", ptx):
        width = int(vector or 1) * int(bits)
        found[width] = found.get(width, 0) + 1
    return found


def forget() -> None:
    """What was planned before, perhaps for another target."""
    planner.plan.cache_clear()
    launches._calls.clear()


def compiled(
    sm: int, launch: Callable[..., object], *args: Any, look: Any = properties
) -> list[dict[str, Any]]:
    """What `look` finds in every kernel that `launch(*args)` launches, compiled instead of run; and
    "programs", its grid.
    """
    triton.runtime.driver.set_active(Target(sm))
    planner.device_of = lambda _: device(sm)
    forget()
    found, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **constants)
        found.append({**look(binary), "programs": grid[0]})

    JITFunction.run = compile_only
    try:
        launch(*args)
    finally:
        JITFunction.run = run
    return found


def operands(
    spec: Spec, dtype: torch.dtype, M: int, N: int, K: int, stride: int | None = None
) -> tuple[Tensor | None, ...]:
    """Meta tensors for a call, x and residual with this many elements from row to row."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        whole = torch.empty(*shape[:-1], stride or shape[-1], dtype=dtype, device="meta")
        return whole[..., : shape[-1]]

    def vector(width: int) -> Tensor:
        return torch.empty(width, dtype=torch.float32, device="meta")

    C, width = spec.width("norm", K, N), spec.width("add", K, N)
    norm = (vector(C), vector(C)) if spec.norm else (None, None)
    given = spec.norm == "batch" and not spec.batch_stats
    running = (vector(C), vector(C)) if given else (None, None)
    gates = {None: None, "scalar": 1, "channel": spec.width("gate", K, N)}
    gate = gates[spec.gate] and vector(gates[spec.gate])
    residual = None
    if spec.adds and (width != K or spec.residual_dtype):
        residual = empty(M, width, dtype=getattr(torch, spec.residual_dtype or str(dtype)[6:]))
    seed = torch.empty(1, dtype=torch.int64, device="meta") if spec.random else None
    x = empty(M, K, dtype=getattr(torch, spec.x_dtype or str(dtype)[6:]))
    weight, bias = (torch.empty(s, dtype=dtype, device="meta") for s in ((N, K), (N,)))
    return (x, weight, bias, *norm, gate, residual, *running, seed)


def forward(
    spec: Spec,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    stride: int | None = None,
    save: bool = True,
) -> None:
    """What the layer launches; `save`: for backward."""
    from fusedres.backends import triton as backend

    backend.residual_forward(*operands(spec, dtype, M, N, K, stride), 1, str(spec), save)


def backward(
    spec: Spec, dtype: torch.dtype, M: int, N: int, K: int, stride: int | None = None
) -> None:
    """What its backward launches, every gradient asked for; dy has the same row stride as x."""
    from fusedres.backends import triton as backend

    tensors = operands(spec, dtype, M, N, K, stride)
    dy = torch.empty(M, stride or N, dtype=dtype, device="meta")[:, :N]
    z = torch.empty(M, N, dtype=dtype, device="meta")
    shape = (2, spec.width("norm", K, N)) if spec.norm == "batch" else (2 * M,)
    stats = torch.empty(shape, dtype=torch.float32, device="meta")
    has_stats = spec.norm is not None and (spec.norm != "batch" or spec.batch_stats)
    saved = [*([z] if spec.saves_z else []), *([stats] if has_stats else [])]
    needs = sum(1 << i for i, t in enumerate(tensors[:7]) if t is not None)
    backend.residual_backward(dy, saved, *tensors, 1, str(spec), needs)
