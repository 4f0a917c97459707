"""A results file: where, when and by which versions its rows were measured. What cannot be read of
a machine is left out.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedres

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("triton", "pytest-benchmark")

Results = dict[str, Any]


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def collect(device: torch.device, load: float | None = None) -> Results:
    """A results file without rows; whoever has protocol, ceilings and rows puts them in."""
    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "none",
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "device": device.type,
        "machine": machine(device),
        "clocks": {"load_at_start": os.getloadavg()[0] if load is None else load},
        "versions": versions(),
        "protocol": {},
        "ceilings": {},
        "not_measured": [],
        "rows": [],
    }


def name(results: Results) -> str:
    """Of its file, without an ending: device, date and commit."""
    found = results["machine"]
    device = found.get("gpu") or f"cpu-{found['cpu']}-{found['cores']}c"
    return f"{slug(device)}-{results['date']}-{results['commit']}"


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write what becomes `path` when it is complete: never half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield (part := path.with_name(f".{path.name}.part"))
    part.replace(path)


def save(results: Results, path: Path) -> Path:
    with whole(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> Results:
    return json.loads(path.read_text(encoding="utf-8"))


def newest(folder: Path) -> dict[str, Path]:
    """The newest file of each device: by date, on one day by its commit's place in history."""
    found = [(load(path), path) for path in sorted(folder.glob("*.json"))]

    def age(entry: tuple[Results, Path]) -> tuple[str, int, float]:
        results, path = entry
        ancestors = _git("rev-list", "--count", results["commit"])
        return results["date"], int(ancestors or 0), path.stat().st_mtime

    return {results["device"]: path for results, path in sorted(found, key=age)}


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
