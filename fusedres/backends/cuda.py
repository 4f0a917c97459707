"""The CUDA C++ backend: what it can run, and what `explain` says of it.

Forward and, where rows fit in shared memory, backward are the C++ ops of csrc/cuda_ops.cpp.
Backward of wider layers is the Triton backend's: both save the same tensors. That pair of ops goes
by the name WITH_TRITON.
"""

from __future__ import annotations

from typing import Any

import torch

from ..spec import REGISTERED, Spec
from . import native, plan

WITH_TRITON = "cuda+triton"


def why_not(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str | None:
    """None if these kernels can run a layer of N outputs and K inputs, else the reason."""
    if device.type != "cuda":
        return f"device is {device}"
    if native.missing:
        return native.missing
    if not native.has_cuda:
        return "the C++ extension is built without CUDA kernels (it needs nvcc and a CUDA torch)"
    if spec.activation in REGISTERED:
        return f"the C++ kernels know only the built-in activations, not {spec.activation!r}"
    reason = _refusal(spec, dtype, device, N, K, False)
    if reason is None and _refusal(spec, dtype, device, N, K, True) is not None:
        from . import triton

        reason = triton.why_not(spec, dtype, device, N, K)
        reason = reason and f"its backward would be Triton's, and {reason}"
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        told = ".".join(map(str, capability))
        return f"{device} has compute capability {told}, the kernels need 8.0"
    return None


def pair(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str:
    """WITH_TRITON where rows are too wide for the C++ backward, else "cuda"."""
    return "cuda" if _refusal(spec, dtype, device, N, K, True) is None else WITH_TRITON


def name(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str:
    """The pair of ops that is about to run."""
    if native.hopper_missing and plan.device_of(device).architecture.startswith("sm_90"):
        native.warn(native.hopper_missing)
    found = pair(spec, dtype, device, N, K)
    if found == WITH_TRITON:
        from . import triton

        triton.prepare(device)
    return found


def _refusal(
    spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int, gradients: bool
) -> str | None:
    shared = plan.device_of(device).shared
    return native.extension.cuda_why_not(str(spec), _name_of(dtype), N, K, shared, gradients)


def kernel(
    spec: Spec, dtype: torch.dtype, M: int, N: int, K: int, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """The forward's kernel and tile."""
    found = plan.device_of(device)
    major = int(found.architecture.removeprefix("sm_")[:-1])
    sizes = (M, N, K, found.processors, found.shared, major)
    told = native.extension.cuda_plan(str(spec), _name_of(dtype), *sizes)
    waves = told["programs"] / found.processors
    return told.pop("kernel"), told | {"waves": round(waves, 2)}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
