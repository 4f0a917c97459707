"""Results as a file, and as Markdown tables that read well in a terminal too."""

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

from .cases import INFERENCE, MODES, RECORD, STEP
from .measure import PROTOCOL

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
HOST_GOALS = {RECORD: 0.6, STEP: 0.55}  # fused / eager on tiny tensors
SAVED_GOAL = 0.5  # fused / eager, order note with layer norm and GELU

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


def collect(rows: list[Row], device: torch.device, load: float) -> dict[str, Any]:
    """The results file: where, by which versions, how, and the rows of measure.py."""
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
        "load_at_start": load,
        "versions": versions,
        "protocol": PROTOCOL | {"modes": MODES},
        "rows": rows,
    }


def save(results: dict[str, Any], path: Path | None) -> Path:
    """Default path: bench/results/<device>-<date>-<commit>.json."""
    if path is None:
        found = results["machine"]
        device = found.get("gpu") or f"cpu-{found['cpu']}-{found['cores']}c"
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = RESULTS / f"{slug}-{results['date']}-{results['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def load(path: Path | None) -> dict[str, Any]:
    """A results file; default: the one with the newest date."""
    files = [path] if path else list(RESULTS.glob("*.json"))
    if not files:
        sys.exit("bench report: bench/results holds no file; `python -m bench` writes one")
    found = [json.loads(file.read_text()) for file in files]
    return max(found, key=lambda results: results["date"])


def table(head: list[str], body: list[list[str]], left: int) -> str:
    """Markdown with the first `left` columns left-aligned and the others right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [head, rule, *body]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(row: Row, name: str) -> str:
    if name not in row["ratios"]:
        return ""
    return f"{row['ratios'][name]['median']:.2f}{' slower' * (name in row['slower_than'])}"


def layer_table(rows: list[Row]) -> str:
    """One line a layer and dtype: microseconds, and how many times faster fused is."""
    head = ["layer", "recipe", "rows x width", "dtype"]
    for mode in (INFERENCE, STEP):
        head += [f"{mode}, us", "x eager", "x compile"]
    body: dict[tuple[str, str], list[str]] = {}
    for row in rows:  # a layer's modes come in the order of the columns
        recipe = ", ".join(filter(None, (row["order"], row["norm"], row["activation"])))
        start = [row["case"], recipe, f"{row['rows']} x {row['features']}", row["dtype"]]
        line = body.setdefault((row["case"], row["dtype"]), start)
        line += [f"{row['times_us']['fused']['median']:,.0f}", _ratio(row, "eager")]
        line += [_ratio(row, "compile")]
        if "saved_bytes" in row:
            line += [f"{row['saved_bytes']['fused'] / row['saved_bytes']['eager']:.2f}"]
    return table([*head, "saved / eager"], list(body.values()), left=4)


def host_table(rows: list[Row]) -> str:
    """Microseconds a call on tensors too small to compute anything."""
    names = list(rows[0]["times_us"])
    body = []
    for row in rows:
        times = {name: t["median"] for name, t in row["times_us"].items()}
        line = [row["mode"], *(f"{times[name]:.1f}" for name in names)]
        line += [f"{times['fused'] / times[name]:.2f}" for name in ("functional", "eager")]
        body.append([*line, str(HOST_GOALS.get(row["mode"], ""))])
    head = [f"host time, us, {rows[0]['rows']} x {rows[0]['features']}", *names]
    return table([*head, "fused / functional", "fused / eager", "goal"], body, left=1)


def markdown(results: dict[str, Any]) -> str:
    """Everything a results file says, as README shows it."""
    found, rows = results["machine"], results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"{found.get('gpu') or found['cpu']}, {found['cores']} cores, {found['threads']} threads, "
        f"{found['simd']}; {versions}; commit {results['commit']}"
        f"{' with changes' * results['dirty']}, {results['date']}; backend "
        f"{', '.join(sorted({row['backend'] for row in rows}))}.\n"
        f"Times are fused's medians; `x eager` is eager's time over fused's, so above 1 fused is "
        f"faster. Goal for saved bytes: {SAVED_GOAL} (note, layer, gelu)."
    ]
    for render, host in ((layer_table, False), (host_table, True)):
        chosen = [row for row in rows if row["host"] == host]
        parts += [render(chosen)] if chosen else []
    slower = [
        "* {case} {dtype}, {mode}: ".format_map(row)
        + "{0} takes {median:.2f} of fused's time ({q1:.2f} to {q3:.2f})".format(name, **ratio)
        for row in rows
        for name, ratio in row["ratios"].items()
        if name in row["slower_than"]
    ]
    busy = sum(not row["calm"] for row in rows)
    if busy:
        parts.append(f"Other processes disturbed {busy} of {len(rows)} measurements: trust none.")
    parts.append("Where fused is slower by more than noise:" + ("" if slower else " nowhere."))
    return "\n\n".join([*parts, *(["\n".join(slower)] if slower else [])])
