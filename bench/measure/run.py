"""One run: its options, its rows, its file. conftest.py drives it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fusedres.backends import native

from . import agenda, ceilings, results_file
from .cases import MODES, Task
from .judge import judge
from .row import PROTOCOL, Options, Rounds, Row, measure

LIMIT = 900.0  # seconds on a CPU, so that with a report `make bench` ends within 16 minutes
SECONDS = {False: 0.4, True: 0.1}  # for the rounds of a row, by --quick
CEILINGS = {False: ceilings.SECONDS, True: 0.05}
BUSY = 0.3  # load
A_ROW = f"for a row; default {SECONDS[False]:g}, with --quick {SECONDS[True]:g}"
OPTIONS: dict[str, dict[str, Any]] = {
    "--quick": {"action": "store_true", "help": "short, no torch.compile, no file"},
    "--full": {"action": "store_true", "help": "every row and contender; hours on a CPU"},
    "--only": {"default": "", "metavar": "TEXT", "help": "part of 'NAME DTYPE'; writes no file"},
    "--seconds": {"type": float, "help": A_ROW},
    "--limit": {"type": float, "help": f"seconds in all; default {LIMIT:g} on a CPU, else none"},
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda if there is one"},
    "--threads": {"type": int, "help": "1 measures CPU time: for a busy machine"},
    "--output": {"type": Path, "metavar": "FILE", "help": "default: a new file in bench/results"},
}


class Run:
    """`get` tells the value of an option; ValueError if it has none that makes sense."""

    def __init__(self, get: Callable[[str], Any], say: Callable[[str], object]) -> None:
        self.began, self.load, self.say = perf_counter(), os.getloadavg()[0], say
        for option in ("--seconds", "--limit", "--threads"):
            if get(option) is not None and get(option) <= 0:
                raise ValueError(f"{option} must be positive, got {get(option):g}")
        name = get("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.quick, self.full = bool(get("--quick")), bool(get("--full"))
        self.tasks = agenda.chosen(agenda.agenda(name), get("--only"))
        if get("--threads"):
            torch.set_num_threads(get("--threads"))
        self.seconds = get("--seconds") or SECONDS[self.quick]
        bounded = name == "cpu" and not self.full
        self.end = self.began + (get("--limit") or (LIMIT if bounded else float("inf")))
        self.output: Path | None = get("--output")
        self.writes = bool(self.output) or not (self.quick or get("--only"))
        self.has_compiled = False
        self.results: dict[str, Any] = {"rows": []}

    def start(self) -> None:
        """Measures the ceilings; before the first row."""
        cpu = self.device.type == "cpu"
        if cpu and native.missing:
            self.say(f"fused runs on the reference backend: {native.missing}")
        if cpu and self.load > BUSY and torch.get_num_threads() > 1:
            self.say(f"the machine is busy (load {self.load:.1f}); --threads 1 measures CPU time")
        self.results = results_file.collect(self.device, self.load)
        self.results["clocks"] |= results_file.clocks(self.device, "before")
        self.results["protocol"] = PROTOCOL | {"modes": MODES}
        found = self.results["ceilings"] = ceilings.ceilings(self.device, CEILINGS[self.quick])
        rates = ", ".join(f"{d} {rate:,.3f}" for d, rate in found["matmul_tflop_per_s"].items())
        self.say(f"ceilings: copy {found['copy_gb_per_s']:,.1f} GB/s, matmul {rates} TFLOP/s")

    def why_not(self, task: Task) -> str | None:
        """Why `task` is not measured in this run: by the agenda's rules, or for lack of time."""
        device, compiled = self.device.type, self.compiled(task)
        seconds = agenda.estimate(task, compiled, self.results["ceilings"], self.seconds, device)
        reason = None if self.full else agenda.why_not(task, device, seconds)
        seconds += agenda.FIRST_COMPILE * (bool(compiled) and not self.has_compiled)
        left = self.end - perf_counter()
        if reason is None and seconds > left:
            reason = f"out of time: it takes about {seconds:.0f} s, {max(left, 0):.0f} s are left"
        return reason

    def compiled(self, task: Task) -> tuple[str, ...]:
        return () if self.quick else agenda.compiled(task, self.device.type, self.full)

    def measure(self, task: Task) -> tuple[Row, Rounds]:
        compiled = self.compiled(task)
        left_out = "--quick" if self.quick else agenda.SLOW_COMPILER
        options = Options(self.device, self.seconds, self.results["ceilings"], compiled, left_out)
        self.has_compiled |= bool(compiled)
        row, rounds = measure(task, options)
        self.results["rows"].append(row)
        self.save()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row, rounds

    def leave_out(self, task: Task, why: str) -> None:
        told = {"case": task.case.name, "dtype": task.dtype, "mode": task.mode, "why": why}
        self.results["not_measured"].append(told)

    def save(self) -> Path | None:
        """After each row: a run that is killed loses only one."""
        if not self.writes:
            return None
        path = self.output or results_file.RESULTS / f"{results_file.name(self.results)}.json"
        return results_file.save(self.results, path)

    def finish(self) -> Path | None:
        self.results["clocks"] |= results_file.clocks(self.device, "after")
        self.results["goals"] = judge(self.results)
        return self.save()


def line(task: Task, row: Row) -> str:
    ratios = ", ".join(f"{name} {r['median']:.2f}" for name, r in row["ratios"].items())
    disturbed = "" if row["calm"] else ", disturbed"
    return f"{task}: {row['times_us']['fused']['median']:,.1f} us; x {ratios}{disturbed}"
