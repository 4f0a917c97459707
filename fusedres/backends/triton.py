"""The Triton backend: orders linear[-norm][-act][-add], norms over rows; 1 launch forward, 3 back.

Importing this module imports Triton; without Triton it still imports, and `why_not` says so.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..spec import Spec

try:
    import triton

    from ..kernels.backward import residual_backward_kernel
    from ..kernels.epilogue import ACTIVATIONS, NORMS
    from ..kernels.forward import residual_forward_kernel
except ImportError:
    triton = None

INPUTS = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")  # bit i of `needs`
STAGES = ("linear", "norm", "act", "add")
ELEMENT_SIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}

# The largest tiles that do not spill registers, see tests/test_triton_aot.py.
# BLOCK_N: (BLOCK_M of 16-bit types, BLOCK_M of fp32, bytes of BLOCK_K, num_warps)
TILES = {
    16: (128, 128, 128, 4),
    32: (128, 128, 128, 4),
    64: (128, 128, 128, 8),
    128: (128, 128, 128, 8),
    256: (64, 32, 128, 8),
    512: (32, 16, 128, 8),
    1024: (16, 8, 64, 8),
}
NUM_STAGES = 3
SHARED_MEMORY = 160 * 1024  # bytes a block that every tile fits in
SMALL_BLOCK_M = 16
WAVE = 128  # fewer programs than this leave a large GPU idle, so BLOCK_M becomes SMALL_BLOCK_M
WIDEST_ROW = max(TILES)
WIDEST_TILE = 128  # columns of a tile where nothing needs whole rows

BACKWARD_TILE = 4096  # elements of a tile of the backward kernel
BACKWARD_WARPS = 8
BACKWARD_PROGRAMS = 256  # at most, a column tile; a constant, so that sums do not depend on the GPU
COLUMN_TILES = 4096  # arrival counters in a workspace


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def plan(spec: Spec, dtype: torch.dtype, M: int, N: int, K: int) -> Tile:
    """The forward kernel's tile for x (M, K) and weight (N, K); with a norm N <= BLOCK_N."""
    block_n = max(min(TILES), triton.next_power_of_2(N))
    if spec.norm is None:
        block_n = min(block_n, WIDEST_TILE)
    block_m_16, block_m_32, bytes_k, warps = TILES[block_n]
    size = ELEMENT_SIZE[dtype]
    block_m = block_m_32 if size == 4 else block_m_16
    if triton.cdiv(M, block_m) * triton.cdiv(N, block_n) < WAVE:
        block_m = min(block_m, SMALL_BLOCK_M)
    return Tile(block_m, block_n, bytes_k // size, warps, NUM_STAGES)


def why_not(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str | None:
    """None if these kernels can run a layer of N outputs and K inputs, else the reason."""
    if triton is None:
        return "Triton is not installed"
    for stage in spec.stages:
        if stage not in STAGES:
            return f"stage {stage!r} is not in the Triton kernels yet"
    if spec.stages != tuple(stage for stage in STAGES if stage in spec.stages):
        return f"the Triton kernels run stages in the order {'-'.join(STAGES)}"
    if spec.norm not in NORMS:
        return f"norm {spec.norm!r} is not in the Triton kernels yet"
    if dtype not in ELEMENT_SIZE:
        return f"the Triton kernels do not take {dtype}"
    if spec.norm is not None and N > WIDEST_ROW:
        return f"rows of {N} features do not fit in one program (limit {WIDEST_ROW})"
    if spec.norm is None and N > COLUMN_TILES * WIDEST_TILE:
        return f"{N} outputs are too many for one launch (limit {COLUMN_TILES * WIDEST_TILE})"
    return _why_not_on(device)


def _why_not_on(device: torch.device) -> str | None:
    if triton.knobs.runtime.interpret:
        return None if device.type in ("cpu", "cuda") else f"device is {device}"
    if device.type != "cuda":
        return f"device is {device} and TRITON_INTERPRET is not set"
    gpu: Any = torch.cuda.get_device_properties(device)
    shared, needed = gpu.shared_memory_per_block_optin >> 10, SHARED_MEMORY >> 10
    if shared < needed:
        return f"{device} has {shared} KiB of shared memory a block, the tiles need {needed}"
    return None


def residual_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    sample_rows: int,
    recipe: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, N), z (M, N) if backward needs it else (0,), and no statistics: z has them.

    x (M, K) and residual (M, R), R <= N, of any strides; weight (N, K); vectors (N,). Without
    `residual` x is what goes into the shortcut.
    """
    spec = Spec.parse(recipe)
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty((M, N))
    saves = save and spec.saves_z
    z = x.new_empty((M, N) if saves else (0,))
    if y.numel():
        shortcut = (x if residual is None else residual) if spec.adds else None
        R, strides = (0, (0, 0)) if shortcut is None else (shortcut.shape[1], shortcut.stride())
        tile = plan(spec, x.dtype, M, N, K)
        grid = (triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N),)
        with torch.cuda.device_of(x):
            residual_forward_kernel[grid](
                x, weight, bias, norm_weight, norm_bias, shortcut, z if saves else None, y,
                M, N, K, R, spec.eps, spec.residual_scale,
                *x.stride(), *weight.stride(), *strides,
                NORM=NORMS[spec.norm][0], ACT=ACTIVATIONS[spec.activation][0],
                PRECISION=_precision(), **tile._asdict(),
            )  # fmt: skip
    return y, z, x.new_empty(0, dtype=torch.float32)


def residual_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    z: Tensor,
    stats: Tensor,
    sample_rows: int,
    recipe: str,
    needs: int,
) -> list[Tensor]:
    """The gradients of those of INPUTS whose bit is set in `needs`, shaped and typed like them.

    dy (M, N) of any strides, z as `residual_forward` saved it. One launch makes dz, the shortcut's
    gradient and the column sums; dx and dweight are matrix products.
    """
    spec = Spec.parse(recipe)
    inputs: Any = (x, weight, bias, norm_weight, norm_bias, gate, residual)
    wanted = [i for i in range(len(INPUTS)) if needs >> i & 1]
    grads = {INPUTS[i]: inputs[i].new_empty(inputs[i].shape) for i in wanted}
    if not dy.numel():
        return [grad.zero_() for grad in grads.values()]

    dshortcut = grads.get("x" if residual is None else "residual") if spec.adds else None
    if spec.saves_z:
        dz: Any = dy.new_empty(dy.shape) if "x" in grads or "weight" in grads else None
        _launch_backward(spec, dy, z, norm_weight, norm_bias, dz, dshortcut, grads)
    else:  # only a sum follows z
        dz = dy
        if "bias" in grads:
            torch.sum(dy, 0, out=grads["bias"])
        if dshortcut is not None:
            torch.mul(dy[:, : dshortcut.shape[1]], spec.residual_scale, out=dshortcut)
    if "x" in grads:
        beta = 1 if grads["x"] is dshortcut else 0
        torch.addmm(grads["x"], dz, weight, beta=beta, out=grads["x"])
    if "weight" in grads:
        torch.mm(dz.t(), x, out=grads["weight"])
    return list(grads.values())


def _launch_backward(
    spec: Spec,
    dy: Tensor,
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dz: Tensor | None,
    dshortcut: Tensor | None,
    grads: dict[str, Tensor],
) -> None:
    """Fills dz, dshortcut and what `grads` has of the vectors' gradients."""
    M, N = dy.shape
    block_n = plan(spec, dy.dtype, M, N, 0).BLOCK_N
    block_m = BACKWARD_TILE // block_n
    R = 0 if dshortcut is None else dshortcut.shape[1]
    programs = min(triton.cdiv(M, block_m), BACKWARD_PROGRAMS)
    sums = [grads.get(name) for name in ("bias", "norm_weight", "norm_bias")]
    partial = arrived = None
    if any(t is not None for t in sums):
        partial = dy.new_empty((3, programs, N), dtype=torch.float32)
        arrived = _workspace(dy)
    norm, norm_grad = NORMS[spec.norm]
    with torch.cuda.device_of(dy):
        residual_backward_kernel[programs, triton.cdiv(N, block_n)](
            dy, z, norm_weight, norm_bias, dz, dshortcut, *sums, partial, arrived,
            M, N, R, spec.eps, spec.residual_scale, *dy.stride(),
            NORM=norm, NORM_GRAD=norm_grad, ACT_GRAD=ACTIVATIONS[spec.activation][1],
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=BACKWARD_WARPS,
        )  # fmt: skip


def _workspace(t: Tensor) -> Tensor:
    """Arrival counters, one for each column tile. A launch leaves them at 0: they are cleared once.

    Each stream has its own. A CUDA graph being captured gets its own too, cleared within the graph.
    """
    if not t.is_cuda:
        return _counters(t.device, 0)
    stream = torch.cuda.current_stream(t.device).cuda_stream
    fresh = torch.cuda.is_current_stream_capturing()
    return (_counters.__wrapped__ if fresh else _counters)(t.device, stream)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(COLUMN_TILES, dtype=torch.int32, device=device)


def _precision() -> str:
    """What fp32 products may use; torch's older switches (allow_tf32, ...) show here too."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def register() -> None:
    """Registers this backend's ops."""
    ops.register_python("triton", residual_forward, residual_backward)
