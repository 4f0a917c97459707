"""Everything that is owed on a GPU, in one command of less than nine minutes: `make gpu-check`.

Builds the extension in place, runs the tests that need a GPU, compute-sanitizer over a few of
them, `python -m bench stacks`, and `python -m bench`, the rows of the goals first. Exit code: 0; 1
where something failed; 2 without a GPU. A goal that is missed is no failure.

Five files come of it, written anew after every step, the benchmark's after every row, so that a run
that is cut off leaves what it found: benchmark.json, a results file as of `python -m bench`;
gpu-check.json, the same with steps and goals; stacks.json, whole networks; summary.md; logs.tar.gz
with every log and junit XML.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..measure import results_file
from ..measure.judge import judge, losses
from ..measure.results_file import Results, whole
from ..report.goals import goal_table
from ..report.tables import table
from .steps import RESULTS_FILE, SECONDS, STACKS_FILE, VERDICTS, Check, Found

NO_GPU = 2
TOTAL = sum(SECONDS.values())
PREDICTIONS = results_file.ROOT / "bench" / "gpu-model.json"
REPORT, SUMMARY, LOGS = "gpu-check.json", "summary.md", "logs.tar.gz"


def combine(out: Path, found: Found, commit: str) -> Results:
    """The benchmark's results file, or an empty one if none was written, with steps and goals."""
    path, device = out / RESULTS_FILE, torch.device("cuda")
    results = results_file.load(path) if path.exists() else results_file.collect(device)
    results["commit"] = commit or results["commit"]
    return results | {"steps": found, "goals": judge(results)}


def write(out: Path, work: Path, commit: str, found: Found) -> str:
    """Everything but the benchmark's file; returns the summary."""
    results = combine(out, found, commit)
    summary = text(results)
    results_file.save(results, out / REPORT)
    with whole(out / SUMMARY) as part:
        part.write_text(summary + "\n")
    with whole(out / LOGS) as part, tarfile.open(part, "w:gz") as archive:
        for file in sorted(work.iterdir()):
            archive.add(file, f"logs/{file.name}")
    return summary


def predictions(gpu: str) -> dict[tuple[str, str], float]:
    """Of goals, by what they are of and their row: what `python -m bench gpu-model` wrote down."""
    known = {"H100": "sm_90", "H200": "sm_90", "A100": "sm_80"}
    architecture = next((sm for name, sm in known.items() if name in gpu), "")
    found = json.loads(PREDICTIONS.read_text()).get(architecture, [])
    return {(goal["goal"], goal["row"]): goal["value"] for goal in found}


def text(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    found, steps = results["machine"] | results["clocks"], results["steps"]
    device = ", ".join(f"{name} {value}" for name, value in found.items() if name != "gpu")
    body = [[s["step"], VERDICTS[s["ok"]], f"{s['seconds']:.0f} s", s["told"]] for s in steps]
    parts = [
        f"{found['gpu']} ({device}); {versions}; commit {results['commit']}, {results['date']}",
        table(["step", "result", "time", "found"], body, left=4),
    ]
    failed = [f"* {name}" for s in steps for name in s.get("failed", [])]
    parts += ["\n".join(["Failed tests:", *failed])] if failed else []
    if results["rows"]:
        goals = goal_table(results["goals"], full=True, foretold=predictions(found["gpu"]))
        parts.append(goals.markdown())
        lines = [f"* {line}" for line in losses(results["rows"])] or ["* nowhere"]
        parts.append("\n".join(["Where fused is slower than eager or torch.compile:", *lines]))
    return "\n\n".join(parts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, list(SECONDS)
    add("--out", type=Path, metavar="DIR", help="default: $OUT, or bench/results/gpu-...")
    add("--steps", nargs="+", choices=names, default=names)
    add("--seconds", type=float, default=TOTAL, help=f"for all steps, default {TOTAL}")
    add("--commit", default="", help="what git says, by default")
    args = parser.parse_args(arguments)
    args.steps = [name for name in names if name in args.steps]
    if args.seconds <= 0:
        parser.error(f"--seconds must be positive, got {args.seconds:g}")
    return args


def folder(asked: Path | None, device: str) -> Path:
    own = results_file.RESULTS / f"gpu-{results_file.slug(device)}-{date.today().isoformat()}"
    out = asked or Path(os.environ.get("OUT") or own)
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        told = f"gpu-check: no GPU: torch {torch.__version__} (built with {built}) sees none"
        print(told, file=sys.stderr)
        return NO_GPU
    out = folder(args.out, torch.cuda.get_device_name(0))
    for name in (REPORT, SUMMARY, LOGS, RESULTS_FILE, STACKS_FILE):  # of an earlier run
        (out / name).unlink(missing_ok=True)
    with TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        report = partial(write, out, Path(work), args.commit)
        found = Check(out, Path(work), args.steps, args.seconds, report).run()
        summary = report(found)
    print(f"\n{summary}\n\nWritten: {out}")
    return int(any(step["ok"] is False for step in found))


if __name__ == "__main__":
    sys.exit(main())
