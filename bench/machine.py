"""What the machine and its clocks say beside the timings; what cannot be read is left out."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("triton", "liger-kernel", "quack-kernels", "pytest-benchmark")


def versions() -> dict[str, str]:
    """Of contenders and tools that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU and its driver; nothing that names the host."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    told = {
        "gpu": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda_of_torch": torch.version.cuda,
    }
    nvml = _nvml()
    return told | ({"driver": _text(nvml.nvmlSystemGetDriverVersion())} if nvml else {})


def clocks(device: torch.device, when: str) -> dict[str, Any]:
    """A GPU's clocks and power; `when`: "before" or "after" the rows."""
    if device.type != "cuda":
        return {}
    nvml = _nvml()
    if nvml is None:
        return {"unread": "nvidia-ml-py is not installed, or finds no driver"}
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(_uuid(device))
        told = {f"sm_mhz_{when}": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)}
        if when == "after":
            told["max_sm_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            told["power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            told["power_limit_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
    except nvml.NVMLError as error:
        return {"unread": str(error)}
    return told


def _nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no library, no driver
        return None
    return nvml


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
