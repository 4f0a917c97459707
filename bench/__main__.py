"""`python -m bench [--quick] [--only TEXT] ...` and `python -m bench report [FILE]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import perf_counter

import torch

from fusedres import ops

from . import report
from .cases import CASES, Job
from .measure import check, measure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times fused layers against eager torch and torch.compile, interleaved.",
        epilog="`report [FILE]` prints a results file, by default the newest, as Markdown.",
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("file", nargs="?", type=Path, help="what to report")
    parser.add_argument("--quick", action="store_true", help="short, no torch.compile, no file")
    parser.add_argument("--only", default="", metavar="TEXT", help="part of 'NAME DTYPE'")
    parser.add_argument("--seconds", type=float, help="for a row; default 1.5, with --quick 0.3")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="1 measures CPU time: for a busy machine")
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    args = parser.parse_args(arguments)
    args.seconds = args.seconds or (0.3 if args.quick else 1.5)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> list[report.Row]:
    chosen = [(c, dtype) for c in CASES for dtype in c.dtypes if args.only in f"{c.name} {dtype}"]
    if not chosen:
        names = ", ".join(case.name for case in CASES)
        sys.exit(f"bench: --only {args.only!r} leaves no case; cases: {names}")
    if args.device.type == "cpu" and ops.native_missing:
        say(f"bench: fused runs on the reference backend: {ops.native_missing}")
    wrong = [
        f"{case.name} {dtype}: {line}"
        for case, dtype in chosen
        for line in check(Job(case, dtype, args.device))
    ]
    if wrong:
        sys.exit("\n".join(["bench: fused is wrong, so nothing is timed:", *wrong]))
    say(f"{len(chosen)} layers agree with float64; timing forward and backward")

    rows, began = [], perf_counter()
    without = {"compile"} if args.quick else set()
    for i, (case, dtype) in enumerate(chosen, 1):
        for row in measure(case, dtype, args.device, without, args.seconds):
            times = "  ".join(f"{n} {t['median']:,.1f}" for n, t in row["times_us"].items())
            clock = f"{i:2}/{len(chosen)} {perf_counter() - began:4.0f} s"
            say(f"{clock}  {case.name} {dtype}, {row['mode']}, us: {times}")
            rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "report":
        print(report.markdown(report.load(args.file)))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    if load > 0.3 and torch.get_num_threads() > 1:
        say(f"bench: the machine is busy (load {load:.1f}); --threads 1 measures CPU time instead")
    results = report.collect(run(args), args.device, load)
    print(report.markdown(results))
    if args.output or not args.quick:
        say(f"\nWritten: {report.save(results, args.output)}")


if __name__ == "__main__":
    main()
