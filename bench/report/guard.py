"""`python -m bench check`: has fused become slower against eager since bench/baseline.json?

Two kinds of cost, both of fused, greater is slower:

* times, fused / eager within rounds of one run, one thread, CPU time. A row fails whose lower
  quartile is past 10 % in three measurements in a row;
* instructions a call, counted by callgrind. More than 3 % fail. Where they were counted for
  another Python, torch, compiler or valgrind, fused / eager is compared, and 25 % fail.

What cannot be compared here is said, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedres.backends import native
from fusedres.tools.timing import interleave, summary

from ..measure import callgrind
from ..measure.cases import CASES, INFERENCE, RECORD, STEP, TINY, Job, Task
from ..measure.results_file import ROOT, collect, machine
from ..measure.row import one_thread
from .tables import table

BASELINE = ROOT / "bench" / "baseline.json"
SECONDS, ATTEMPTS, UPDATES = 0.3, 3, 5
# Measured on 2 cores of an AMD EPYC, the 27 rows ten times. Beside one busy process medians were
# within 5 % in most rows, and up to 16 % off in those bound by memory; a lower quartile was past
# 10 % once in 270. Beside twelve medians were up to 28 % off, a lower quartile never past 10 %, and
# 10 us more a call of the tiny layer still failed.
LIMIT = 0.10
COUNT_LIMIT = 0.03  # more than twice callgrind.REPEATABILITY
OTHER_LIMIT = 0.25  # other versions have other paths for eager and for fused; unmeasured
TIMES, INSTRUCTIONS = "times", "instructions"
WATCHED = ("digits", "rtdl-466", "simba-128", "deep-rl-256", "gnn-128", "bert-768")
DTYPES = ("fp32", "bf16")

Found = Mapping[str, Mapping[str, float]]


class Finding(NamedTuple):
    """One comparison; `judged` is what must be within the limit."""

    row: str
    cost: str
    baseline: float
    found: float
    limit: float
    judged: float

    @property
    def failed(self) -> bool:
        return not self.judged <= self.limit

    def cells(self) -> list[str]:
        form = ",.0f" if self.baseline > 100 else ".3f"
        numbers = [format(n, form) for n in (self.baseline, self.found, self.limit)]
        change = f"{100 * (self.found / self.baseline - 1):+.1f} %"
        return [self.row, self.cost, *numbers, change, "SLOWER" * self.failed]


def watched() -> list[Task]:
    tasks = [Task(TINY, "fp32", mode) for mode in (INFERENCE, RECORD, STEP)]
    cases = [case for case in CASES if case.name in WATCHED]
    return tasks + [Task(c, dtype, m) for c in cases for dtype in DTYPES for m in (INFERENCE, STEP)]


def measure(tasks: Iterable[Task], seconds: float = SECONDS) -> Found:
    """Median and quartiles of fused / eager by row."""
    device, found = torch.device("cpu"), {}
    with one_thread():  # its CPU time: what other processes do hardly counts
        for task in tasks:
            job = Job(task.case, task.dtype, device)
            calls: Any = {n: job.call(getattr(job, n), task.mode) for n in ("eager", "fused")}
            rounds, _ = interleave(calls, device, seconds)
            found[str(task)] = summary([r["fused"] / r["eager"] for r in rounds])
    return found


def times_key() -> dict[str, str]:
    """Ratios of times are comparable on the same kind of CPU with the same torch only."""
    here = machine(torch.device("cpu"))
    return {"cpu": here["cpu"], "simd": here["simd"], "torch": torch.__version__}


def compare_times(old: Found, measure: Callable[..., Found] = measure) -> list[Finding]:
    """Rows past the limit are measured again, longer; the best of the attempts counts."""
    tasks = {str(task): task for task in watched() if str(task) in old}
    limits = {row: old[row]["median"] * (1 + LIMIT) for row in tasks}
    best = dict(measure(tasks.values()))
    for _ in range(ATTEMPTS - 1):
        suspects = [tasks[row] for row, found in best.items() if found["q1"] > limits[row]]
        again = measure(suspects, 3 * SECONDS) if suspects else {}
        best |= {row: min(best[row], found, key=lambda s: s["q1"]) for row, found in again.items()}
    return [
        Finding(row, "time, fused / eager", old[row]["median"], s["median"], limits[row], s["q1"])
        for row, s in best.items()
    ]


def compare_counts(old: Found, new: Found, same_key: bool) -> list[Finding]:
    """Of another key only the ratios to eager mean something."""
    allowed = 1 + (COUNT_LIMIT if same_key else OTHER_LIMIT)
    costs: dict[str, Any] = {"instructions, fused / eager": lambda c: c["fused"] / c["eager"]}
    if same_key:
        names = {"instructions": "fused", "instructions in the extension": "kernels"}
        costs = {cost: itemgetter(name) for cost, name in names.items()}
    findings = []
    for row, (cost, of) in product(sorted(old.keys() & new.keys()), costs.items()):
        before, after = of(old[row]), of(new[row])
        findings.append(Finding(row, cost, before, after, before * allowed, after))
    return findings


def check(kinds: Iterable[str], baseline: dict[str, Any]) -> tuple[list[Finding], list[str]]:
    findings: list[Finding] = []
    notes: list[str] = []
    for kind in kinds:
        unknown = "" if kind in baseline else "not in the baseline, see --update"
        if reason := missing(kind) or unknown:
            notes.append(f"{kind} not compared: {reason}")
            continue
        old, key, here = baseline[kind]["rows"], baseline[kind]["key"], KEYS[kind]()
        names = sorted(n for n in key.keys() | here.keys() if key.get(n) != here.get(n))
        differs = ", ".join(f"{n} {key.get(n)} (here {here.get(n)})" for n in names)
        if differs:
            how = "compared as ratios only" if kind == INSTRUCTIONS else "not compared"
            notes.append(f"{kind} {how}: the baseline has {differs}")
        if kind == INSTRUCTIONS:
            rows = callgrind.count()
            findings += compare_counts(old, rows, not differs)
        else:
            rows = old if differs else dict.fromkeys(map(str, watched()))
            findings += [] if differs else compare_times(old)
        notes += [f"{kind} of {row}: only in the baseline" for row in old.keys() - rows.keys()]
        notes += [f"{kind} of {row}: not in the baseline" for row in rows.keys() - old.keys()]
    return findings, notes


def missing(kind: str) -> str | None:
    return callgrind.missing() if kind == INSTRUCTIONS else native.missing


def update(kinds: Iterable[str], baseline: dict[str, Any]) -> dict[str, Any]:
    for kind in kinds:
        if missing(kind):
            raise SystemExit(f"bench check: cannot update {kind}: {missing(kind)}")
        rows: Found = callgrind.count() if kind == INSTRUCTIONS else {}
        if kind == TIMES:  # of each row the median of several measurements, and their quartiles
            found = [measure(watched()) for _ in range(UPDATES)]
            rows = {row: summary([each[row]["median"] for each in found]) for row in found[0]}
        here = collect(torch.device("cpu"))
        baseline[kind] = {name: here[name] for name in ("date", "commit", "dirty", "machine")}
        baseline[kind] |= {"key": KEYS[kind](), "rows": dict(sorted(rows.items()))}
    return baseline


KEYS: dict[str, Callable[[], dict[str, str]]] = {TIMES: times_key, INSTRUCTIONS: callgrind.key}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 no slower, or nothing to compare; 1 slower; 2 no baseline",
    )
    parser.add_argument("--only", choices=(TIMES, INSTRUCTIONS), help="default: both")
    parser.add_argument("--update", action="store_true", help="measure and write the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    args = parser.parse_args(arguments)
    kinds = (args.only,) if args.only else (INSTRUCTIONS, TIMES)
    say = partial(print, file=sys.stderr)
    baseline = json.loads(args.baseline.read_text()) if args.baseline.exists() else {}
    if args.update:
        args.baseline.write_text(json.dumps(update(kinds, baseline), indent=1) + "\n")
        say(f"Written: {args.baseline}")
        return 0
    if not baseline:
        say(f"bench check: no {args.baseline}; `python -m bench check --update` writes it")
        return 2
    findings, notes = check(kinds, baseline)
    if findings:
        head = ["row", "cost", "baseline", "found", "limit", "change", ""]
        print(table(head, [finding.cells() for finding in findings], left=2))
    for note in notes:
        say(f"bench check: {note}")
    failed = [finding.cells() for finding in findings if finding.failed]
    for row, cost, old, new, limit, change, _ in failed:
        say(f"bench check: {row}: {cost} {new} ({change}); baseline {old}, limit {limit}")
    say(f"bench check: {len(findings)} compared, {len(failed)} slower than the limit allows")
    return 1 if failed else 0
