"""A results file: its form; where, when and by which versions its rows were measured. What cannot
be read of a machine is left out.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import fusedres

from .cases import GRAPHS, HOST, MODEL, MODES, SQUARE, STEPS, TENSORS
from .contenders import RIVALS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("triton", "pytest-benchmark")

Results = dict[str, Any]
Form = dict[Any, tuple[str, ...]]  # fields by type, or by the values they may have
FILE: Form = {
    str: ("date", "commit"),
    ("cpu", "cuda"): ("device",),
    bool: ("dirty",),
    dict: ("machine", "clocks", "versions", "protocol", "ceilings"),
    list: ("not_measured", "rows"),
}
ROW: Form = {
    str: ("case", "order", "norm", "backend"),
    (MODEL, SQUARE, HOST): ("group",),
    tuple(TENSORS): ("dtype",),
    tuple(MODES): ("mode",),
    str | None: ("activation",),
    int: ("rows", "features", "out_features", "rounds", "flops", "bytes"),
    bool: ("calm",),
    float: ("gb_per_s", "tflop_per_s", "copy_share", "matmul_share"),
    dict: ("times_us", "ratios", "failed"),
    list: ("slower_than",),
}
GOAL: Form = {
    str: ("goal", "row", "bound"),
    str | None: ("beyond",),
    int | float | None: ("value",),
    bool | None: ("met", "passed"),
    list: ("quartiles",),
}


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *args]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


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


def machine_of(results: Results) -> str:
    """A CPU's maker and family, as far as it was recorded, or a GPU's name."""
    found = results["machine"]
    family = f" family {found['family']}" if found.get("family") else ""
    return str(found.get("gpu") or f"{found['cpu']}{family}")


def newest(folder: Path, of: Callable[[Results], str] = itemgetter("device")) -> dict[str, Path]:
    """The newest file of each device, or of each else: by date, on one day by its commit's place in
    history.
    """
    found = {path: load(path) for path in sorted(folder.glob("*.json"))}

    def age(path: Path) -> tuple[str, int, float]:
        ancestors = _git("rev-list", "--count", found[path]["commit"])
        return found[path]["date"], int(ancestors or 0), path.stat().st_mtime

    return {of(found[path]): path for path in sorted(found, key=age)}


def newest_of_machines(folder: Path) -> list[Results]:
    """Without old files of CPUs whose family is not told, where others tell it."""
    found = [load(path) for path in newest(folder, machine_of).values()]
    told = {r["machine"].get("cpu") for r in found if r["machine"].get("family")}

    def counts(results: Results) -> bool:
        machine = results["machine"]
        named = bool(machine.get("family")) or machine["cpu"] not in told
        return named or results["device"] != "cpu"

    return list(filter(counts, found))


def versions() -> dict[str, str]:
    """Of Python, torch and ours; of tools those that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["fusedres"] = fusedres.__version__
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, its caches, and GPU; nothing that names the host."""
    told = _read("/proc/cpuinfo")
    model, family = (re.search(rf"{key}\s*:\s*(.*)", told) for key in ("model name", "cpu family"))
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    found: dict[str, Any] = {
        "cpu": model.group(1).strip() if model else platform.machine(),
        "family": family.group(1).strip() if family else None,
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
    with suppress(Exception):  # not installed, no library, no driver
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml
    return None


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def check_results(results: dict[str, Any]) -> list[str]:
    """What is wrong with a results file; nothing in those that `python -m bench` writes."""
    if found := _fields(results, FILE, "file"):
        return found
    named = ["cpu", "cores", "threads", *(["gpu"] if results["device"] == "cuda" else [])]
    found += _fields(results["machine"], {object: tuple(named)}, "machine")
    found += _fields(results["versions"], {object: ("python", "torch", "fusedres")}, "versions")
    ceilings = results["ceilings"]
    numbers = [ceilings.get("copy_gb_per_s"), *ceilings.get("matmul_tflop_per_s", {}).values()]
    found += [f"ceilings: {n!r} is not positive" for n in numbers if not _positive(n)]
    for left_out in results["not_measured"]:
        found += _fields(left_out, {str: ("case", "dtype", "mode", "why")}, "left out")
    for goal in results.get("goals", []):
        found += _fields(goal, GOAL, "goal")
    seen = set()
    for row in results["rows"]:
        where = " ".join(str(row.get(key)) for key in ("case", "dtype", "mode"))
        found += _fields(row, ROW, where) or _row(row, where, results["device"])
        found += [f"{where}: there twice"] if where in seen else []
        seen.add(where)
    return found


def _fields(found: dict[str, Any], form: Form, where: str) -> list[str]:
    wrong = []
    for kind, keys in form.items():
        for key in keys:
            if key not in found:
                wrong.append(f"{where}: {key} is missing")
            elif (
                found[key] not in kind if type(kind) is tuple else not isinstance(found[key], kind)
            ):
                wrong.append(f"{where}: {key} is {found[key]!r}, expected {kind}")
    return wrong


def _row(row: dict[str, Any], where: str, device: str) -> list[str]:
    told = []
    times, ratios, failed = row["times_us"], row["ratios"], row["failed"]
    if set(times) != {*ratios, "fused"} or not {"eager", "fused"} <= {*times, *failed}:
        told.append(f"times of {sorted(times)}, ratios of {sorted(ratios)}")
    for name, spread in [*times.items(), *ratios.items()]:
        ends = [spread.get(key) for key in ("q1", "median", "q3")]
        if not all(map(_positive, ends)) or ends != sorted(ends):
            told.append(f"{name} has quartiles {ends}")
    if not set(row["slower_than"]) <= {*RIVALS} & {*ratios}:
        told.append(f"slower than {row['slower_than']}, which has no ratio or no say")
    wanted = ["saved_bytes", "peak_bytes"] if row["mode"] in STEPS else []
    if row["mode"] not in GRAPHS:
        wanted += ["launches", *(["host_us"] if device == "cuda" or row["group"] == HOST else [])]
    for key in wanted:
        missing = {"fused", "eager"} - {*row.get(key, {}), *failed}
        told += [] if key in row else [f"{key} is missing"]
        told += [f"{key} lacks {', '.join(sorted(missing))}"] if missing else []
    return [f"{where}: {line}" for line in told]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
