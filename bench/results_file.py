"""A results file: where, when, by which versions and how its rows were measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fusedres

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """CPU and GPU; nothing that names the host."""
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
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def collect(rows: list[Row], device: torch.device, load: float, **more: Any) -> dict[str, Any]:
    """The results file; `more`: protocol, ceilings and what else its caller has beside rows."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedres": fusedres.__version__,
    }
    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "none",
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "device": device.type,
        "machine": machine(device),
        "clocks": {"load_at_start": load},
        "versions": versions,
        "protocol": {},
        "ceilings": {},
        "not_measured": [],
        "rows": rows,
        **more,
    }


def name(results: dict[str, Any]) -> str:
    """Of its file, without an ending: device, date and commit."""
    found = results["machine"]
    device = found.get("gpu") or f"cpu-{found['cpu']}-{found['cores']}c"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{results['date']}-{results['commit']}"


def save(results: dict[str, Any], path: Path | None) -> Path:
    """Default path: bench/results/<device>-<date>-<commit>.json."""
    path = path or RESULTS / f"{name(results)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def newest(folder: Path) -> dict[str, Path]:
    """The newest file of each device: by date, on one day by its commit's place in history."""
    found = [(json.loads(path.read_text()), path) for path in sorted(folder.glob("*.json"))]

    def age(entry: tuple[dict[str, Any], Path]) -> tuple[str, int, float]:
        results, path = entry
        ancestors = _git("rev-list", "--count", results["commit"])
        return results["date"], int(ancestors or 0), path.stat().st_mtime

    return {results["device"]: path for results, path in sorted(found, key=age)}


def load(path: Path | None) -> dict[str, Any]:
    """A results file; default: the newest of all."""
    if path is None:
        files = list(newest(RESULTS).values())
        if not files:
            sys.exit("bench: bench/results holds no file; `python -m bench` writes one")
        return max((load(file) for file in files), key=lambda results: results["date"])
    return json.loads(path.read_text())
