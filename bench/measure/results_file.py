"""A results file: where, when, by which versions and how its rows were measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .machine import machine, versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

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


def save(results: Results, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
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
