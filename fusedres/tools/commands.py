"""The commands of `python -m fusedres`: each prints, and returns an exit code."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .. import FusedResidual, FusedResidualMLP
from ..backends import native
from ..spec import make_spec
from . import console

ROOT = Path(__file__).resolve().parents[2]  # of the source repository, if this is one
OK, FAILED, USAGE = 0, 1, 2  # interrupted: 130
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def _setting(name: str | None) -> str | None:
    return None if name == "none" else name


def _print_json(found: Any) -> None:
    print(json.dumps(found, indent=2, default=str))


def info(args: argparse.Namespace) -> int:
    """Answers: what is installed, which backends run here, what is missing, how to get it. It never
    fails: a fact that cannot be found out is replaced by the reason. Put it into bug reports.
    """
    from .system import report, system

    facts = system()
    if args.json:
        _print_json(facts)
    else:
        for line, style in report(facts):
            console.out(line, style)
    return OK


def selftest(args: argparse.Namespace) -> int:
    """Answers: does what is installed compute the right thing here? Runs layers of every order and
    norm, forward and backward, on every backend that is here, against torch operations in float64.
    """
    from .selftest import Found, selftest

    def about(one: Found) -> tuple[str, str]:
        if not one.here:
            return f"{one.backend:8}not here: {'; '.join(one.refused)}", "dim"
        line = f"{one.backend:8}{one.good} layers agree with the reference, forward and backward"
        line += f"; {len(one.wrong)} are WRONG" if one.wrong else ""
        line += f"; {sum(one.refused.values())} it does not take" if one.refused else ""
        line += f"; no time for {one.left}, give more by --seconds" if one.left else ""
        return line, "bad" if one.wrong else "good"

    found = []
    for one in selftest(args.seconds):
        found.append(one)
        if not args.json:
            console.out(*about(one))
            for line in one.wrong:
                console.out(f"  WRONG {line}", "bad")
    wrong = sum(len(one.wrong) for one in found)
    lacks = native.missing and not native.skipped
    if args.json:
        _print_json([asdict(one) for one in found])
    elif wrong:
        console.out(f"{wrong} layers are wrong: please report it, with `info`", "bad")
    elif lacks:
        console.out(f"{native.missing}: `info` says how to get it", "bad")
    elif any(one.here for one in found):
        console.out("all is well", "good")
    else:
        console.out("nothing to check: layers run as torch operations; see `info`", "note")
    return FAILED if wrong or lacks else OK


def explain(args: argparse.Namespace) -> int:
    """Answers: which backend and kernel would a layer use, which tiles, how many launches, what
    does it save for backward, what is not fused and why. Nothing runs: any size and device will do.
    """
    from .. import explain

    M, K, N = args.shape
    settings: dict[str, Any] = {
        "order": args.order,
        "norm": _setting(args.norm),
        "activation": _setting(args.activation),
        "gate": args.gate,
        "dropout": args.dropout,
        "backend": args.backend,
        "device": "meta",
        "dtype": DTYPES[args.dtype],
    }
    try:
        where = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        layer = (
            FusedResidualMLP(K, out_features=N, **settings)
            if args.mlp
            else FusedResidual(K, N, **settings)
        )
        x = torch.empty(M, K, dtype=DTYPES[args.dtype], device="meta", requires_grad=True)
        found = explain(layer.train(not args.eval), x, device=where)
    except NotImplementedError as error:  # a named backend that cannot
        console.error(str(error))
        return FAILED
    except (ValueError, TypeError, RuntimeError) as error:
        console.error(str(error))
        return USAGE
    if args.json:
        _print_json(asdict(found) | {"backend": found.backend, "saved_bytes": found.saved_bytes})
    else:
        for line in str(found).splitlines():
            console.out(line, "" if line.startswith((" ", "note")) else "head")
    return OK


def bench(args: argparse.Namespace) -> int:
    """Answers: what does the fused layer gain on this machine, in time and in memory kept for
    backward? Each layer is first checked, then timed in turns with eager: torch's own layers called
    one after another, on the same parameters. Without --shape, --order, --norm and --activation: a
    few layers from real models.
    """
    from . import bench, bench_report

    if args.full is not None:
        return _full_bench(args.full)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        console.error("--device cuda: torch sees no GPU here; `info` says what is missing")
        return FAILED
    cases = bench.default_cases(device)
    if args.shape or args.order or args.norm or args.activation:
        shapes = args.shape or [case[:3] for case in cases]
        order, norm = args.order or "note", _setting(args.norm or "layer")
        activation = _setting(args.activation or "gelu")
        try:
            make_spec(order, norm, activation)
        except ValueError as error:
            console.error(str(error))
            return USAGE
        sizes = dict.fromkeys(shapes)
        cases = [bench.Case(M, K, N, order, norm, activation) for M, K, N in sizes]
    dtype = args.dtype or ("fp32" if device == "cpu" else "bf16")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        with console.progress(len(cases), "bench") as show:
            found = bench.bench(cases, dtype, torch.device(device), args.seconds, show)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        _print_json(found)
    else:
        bench_report.show(found)
    return FAILED if found["wrong"] or found["failed"] else OK


def _full_bench(rest: list[str]) -> int:
    """Runs the benchmark of the source repository, which no wheel contains."""
    if not (ROOT / "bench" / "__main__.py").exists():
        console.error(
            "bench --full is not part of the installed package: clone the source repository and "
            "run `make bench` there; without --full it is short and runs here"
        )
        return FAILED
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    return subprocess.run([sys.executable, "-m", "bench", *rest], env=environment).returncode


def demo(args: argparse.Namespace) -> int:
    """Answers: why residual layers? Trains plain and residual nets of 4 to 200 layers on real
    digits: the deep plain nets fail, the residual ones train. Prints a table and draws a picture.
    Needs scikit-learn, and matplotlib for the picture.
    """
    from . import demo

    if reason := demo.lacks("sklearn"):
        console.error(f"the demo needs scikit-learn ({reason}); get it: pip install scikit-learn")
        return FAILED
    if args.out.is_dir() or not os.access(args.out.resolve().parent, os.W_OK):
        why = "it is a folder"
        if not args.out.is_dir():
            why = "its folder does not exist or cannot be written to"
        console.error(f"--out {args.out}: {why}")
        return USAGE
    depths = demo.QUICK if args.quick else demo.DEPTHS
    return FAILED if demo.run(args.out, depths, args.seeds) else OK


def tune(args: argparse.Namespace) -> int:
    """Answers: are there better tiles for this GPU than the planner's, and up to how many rows are
    the CUDA C++ kernels the best backend? Measures them and writes down what wins. A layer's call
    never tunes, it only reads the file.
    """
    from ..backends import plan as planner
    from . import crossover, tune

    try:
        jobs = _jobs(args)
    except ValueError as error:
        console.error(str(error))
        return USAGE
    device = planner.device_of(torch.device("cuda"))
    sizes = {} if args.only == "tiles" else crossover.sizes(jobs)
    jobs = {} if args.only == "backends" else jobs
    if args.dry_run:
        for key, calls in jobs.items():
            rule, *others = map(tune.row_of, tune.contenders(calls, device, args.quick))
            print(key)
            for c in calls:
                print(f"  {c.spec}, x ({c.M}, {c.K}), weight ({c.N}, {c.K}), {c.dtype}")
            print(f"    {rule} the rule", *(f"    {row}" for row in others), sep="\n")
        rows = f"from {crossover.LEAST_ROWS} to {crossover.MOST_ROWS} rows"
        for key, c in sizes.items():
            print(f"backends {key}\n  {c.spec}, weight ({c.N}, {c.K}), {c.dtype}, {rows}")
        return OK
    path = args.out or planner.config_file(device.name)
    calls = [*(call for calls in jobs.values() for call in calls), *sizes.values()]
    reason = tune.why_not(calls)
    try:
        tune.load(path, device)
    except (OSError, ValueError) as error:
        reason = reason or f"cannot write {path}: {error}"
    if reason:
        console.error(f"fusedres tune: {reason}")
        return FAILED
    end = perf_counter() + args.seconds
    wrong = tune.tune(jobs, device, path, args.quick, args.seconds)
    wrong += crossover.measure(sizes, device, path, end - perf_counter())
    print(path if path.exists() else "nothing beats the planner's rule: no file is written")
    return FAILED if wrong else OK


def _jobs(args: argparse.Namespace) -> dict[str, list[Any]]:
    """What `tune` is to measure, by the planner's keys."""
    from . import tune

    recipes = product(
        args.order or ("note",),
        args.norm or ("layer",),
        args.activation or ("relu",),
        args.dtype or ("bf16",),
    )
    jobs: dict[str, list[Any]] = {}
    for (M, K, N), (order, norm, activation, dtype) in product(args.shape or tune.SHAPES, recipes):
        spec = make_spec(order, _setting(norm), _setting(activation), training=norm == "batch")
        call = tune.Call(spec, DTYPES[dtype], M, N, K)
        calls = jobs.setdefault(call.key(), [])
        calls += [] if call in calls else [call]
    return jobs
