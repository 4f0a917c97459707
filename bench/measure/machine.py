"""What the machine and its clocks say beside the timings; what cannot be read is left out."""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedres

PACKAGES = ("triton", "pytest-benchmark")


def versions() -> dict[str, str]:
    """Of Python, torch and ours; of tools those that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["fusedres"] = fusedres.__version__
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, its caches, and GPU; nothing that names the host."""
    model = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    found: dict[str, Any] = {
        "cpu": model.group(1).strip() if model else platform.machine(),
        "cores": len(affinity(0)),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }
    for index in range(5):
        cache = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        if _read(f"{cache}/level") in ("2", "3"):
            found[f"L{_read(f'{cache}/level')}"] = _read(f"{cache}/size")
    return found | (gpu(device) if device.type == "cuda" else {})


def gpu(device: torch.device) -> dict[str, Any]:
    found, nvml = torch.cuda.get_device_properties(device), _nvml()
    told = {
        "gpu": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda_of_torch": torch.version.cuda,
    }
    if nvml is None:
        return told
    driver = nvml.nvmlSystemGetDriverVersion()
    return told | {"driver": driver.decode() if isinstance(driver, bytes) else driver}


def clocks(device: torch.device, when: str) -> dict[str, Any]:
    """A GPU's clocks and power; `when`: "before" or "after" the rows."""
    if device.type != "cuda":
        return {}
    nvml = _nvml()
    if nvml is None:
        return {"unread": "nvidia-ml-py is not installed, or finds no driver"}
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
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


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
