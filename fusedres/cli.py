"""The command line, `python -m fusedres`: what is here, does it work, what would a layer do."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import ACTIVATIONS, GATES, NORMS, ORDERS, FusedResidual, FusedResidualMLP, tune
from .backends import plan as planner
from .checks import BACKENDS
from .explain import explain
from .mlp import MLP_ORDERS
from .selftest import selftest
from .spec import make_spec
from .system import report, system

ROOT = Path(__file__).resolve().parent.parent  # of the source repository, if this is one
TUNED_DTYPES = ("bf16", "fp16", "fp32")
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
OK, FAILED, USAGE = 0, 1, 2

EPILOG = """\
examples:
  python -m fusedres info              what is installed, what is missing and how to get it
  python -m fusedres selftest          every backend on this machine against the reference
  python -m fusedres explain linear-norm-act-add --shape 4096x1024 --dtype bf16
  python -m fusedres explain prenorm --mlp --shape 256x384 --activation gelu
  python -m fusedres bench --quick     a short benchmark (source repository only)
  python -m fusedres tune              measure tiles on this GPU and keep what beats the planner's
  python -m fusedres tune --order prenorm --dtype fp16 --shape 256x512 --dry-run

exit codes: 0 good, 1 a check failed or something is not here, 2 wrong arguments
"""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m fusedres",
        description="Residual layers, y = act(norm(x @ W.T + b)) + x, in one fused call.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, extension, GPU, what is missing")
    info.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("selftest", help="check every backend that is here, in seconds")
    scripts = {
        "demo": "train plain and residual nets on real digits (minutes)",
        "bench": "time fused against eager; takes the arguments of `python -m bench`",
    }
    for name, what in scripts.items():
        commands.add_parser(name, help=what, add_help=False)
    _add_explain(commands)
    _add_tune(commands)
    return main


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "explain",
        help="which backend, kernel and tiles a layer gets, and why",
        epilog=f"orders: {', '.join(f'{alias} = {order}' for alias, order in ORDERS.items())}; "
        f"with --mlp: {', '.join(MLP_ORDERS)}. Nothing runs: any size will do.",
    )
    one.add_argument("order", help='stages such as "linear-norm-act-add", or an alias')
    one.add_argument("--shape", required=True, metavar="MxK[xN]", help="rows x inputs [x outputs]")
    one.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    one.add_argument("--norm", choices=("none", *NORMS), default="layer", help="default: layer")
    one.add_argument(
        "--activation", choices=("none", *ACTIVATIONS), default="relu", metavar="NAME",
        help=f"default: relu; known: none, {', '.join(ACTIVATIONS)}",
    )  # fmt: skip
    one.add_argument("--gate", choices=GATES)
    one.add_argument("--dropout", type=float, default=0.0, metavar="P")
    one.add_argument("--mlp", action="store_true", help="a block of two matmuls, hidden 4 x K")
    one.add_argument("--eval", action="store_true", help="in evaluation; default: training")
    one.add_argument("--backend", choices=BACKENDS, default="auto")
    one.add_argument("--device", help="as if on it: cpu or cuda; default: cuda if there is one")


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "tune",
        help="measure tiles on this GPU and write down those that beat the planner's",
        epilog="Options with + may be repeated: every combination is measured. A layer's call "
        "never tunes, it only reads the file.",
    )
    for name, known, default in (
        ("--order", None, "note"), ("--norm", ("none", *NORMS), "layer"),
        ("--activation", ("none", *ACTIVATIONS), "relu"), ("--dtype", TUNED_DTYPES, "bf16"),
    ):  # fmt: skip
        one.add_argument(
            name, action="append", choices=known, metavar="NAME", help=f"+ default: {default}"
        )
    one.add_argument(
        "--shape", action="append", type=_sizes, metavar="MxK[xN]",
        help="+ default: M in 256, 4096, 65536 and N = K from 64 to 4096",
    )  # fmt: skip
    one.add_argument("--quick", action="store_true", help="shipped tiles only, no variants of them")
    one.add_argument("--seconds", type=float, default=tune.SECONDS, help="default: %(default)g")
    one.add_argument("--out", type=Path, metavar="FILE", help="default: this device's in fusedres")
    one.add_argument("--dry-run", action="store_true", help="list what would be measured; no GPU")


def _sizes(text: str) -> tuple[int, int, int]:
    """(M, K, N) of MxK or MxKxN."""
    try:
        sizes = [int(size) for size in text.lower().split("x")]
        M, K, N = sizes if len(sizes) == 3 else (*sizes, sizes[-1])
        if min(M, K, N) < 1:
            raise ValueError
    except ValueError:
        told = f"must be MxK or MxKxN, such as 4096x1024, got {text!r}"
        raise argparse.ArgumentTypeError(told) from None
    return M, K, N


def run_info(args: argparse.Namespace) -> int:
    facts = system()
    print(json.dumps(facts, indent=2) if args.json else report(facts))
    return OK


def run_explain(args: argparse.Namespace) -> int:
    try:
        sizes = [int(size) for size in args.shape.lower().split("x")]
        M, K, N = sizes if len(sizes) == 3 else (*sizes, sizes[-1])
        if min(M + 1, K, N) < 1:
            raise ValueError
    except ValueError:
        told = f"--shape must be MxK or MxKxN, such as 4096x1024, got {args.shape!r}"
        print(told, file=sys.stderr)
        return USAGE
    where = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {
        "order": args.order, "norm": None if args.norm == "none" else args.norm, "gate": args.gate,
        "activation": None if args.activation == "none" else args.activation,
        "dropout": args.dropout, "backend": args.backend,
        "device": "meta", "dtype": DTYPES[args.dtype],
    }  # fmt: skip
    try:
        layer = (
            FusedResidualMLP(K, out_features=N, **settings)
            if args.mlp
            else FusedResidual(K, N, **settings)
        )
        x = torch.empty(M, K, dtype=DTYPES[args.dtype], device="meta", requires_grad=True)
        print(explain(layer.train(not args.eval), x, device=where))
    except (ValueError, TypeError, RuntimeError) as error:  # a backend that cannot is the last
        print(error, file=sys.stderr)
        return FAILED if isinstance(error, NotImplementedError) else USAGE
    return OK


def run_tune(args: argparse.Namespace) -> int:
    try:
        jobs = _jobs(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    device = planner.device_of(torch.device("cuda"))
    if args.dry_run:
        for key, calls in jobs.items():
            rule, *others = map(tune.row_of, tune.contenders(calls, device, args.quick))
            print(key)
            for c in calls:
                print(f"  {c.spec}, x ({c.M}, {c.K}), weight ({c.N}, {c.K}), {c.dtype}")
            print(f"    {rule} the rule", *(f"    {row}" for row in others), sep="\n")
        return OK
    path = args.out or planner.config_file(device.name)
    reason = tune.why_not([call for calls in jobs.values() for call in calls])
    try:
        tune.load(path, device)
    except (OSError, ValueError) as error:
        reason = reason or f"cannot write {path}: {error}"
    if reason:
        print(f"fusedres tune: {reason}", file=sys.stderr)
        return FAILED
    wrong = tune.tune(jobs, device, path, args.quick, args.seconds)
    print(path if path.exists() else "nothing beats the planner's rule: no file is written")
    return FAILED if wrong else OK


def _jobs(args: argparse.Namespace) -> dict[str, list[tune.Call]]:
    """What `tune` is to measure, by the planner's keys."""
    recipes = product(
        args.order or ("note",), args.norm or ("layer",), args.activation or ("relu",),
        args.dtype or ("bf16",),
    )  # fmt: skip
    jobs: dict[str, list[tune.Call]] = {}
    for (M, K, N), (order, *names, dtype) in product(args.shape or tune.SHAPES, recipes):
        norm, activation = (None if name == "none" else name for name in names)
        spec = make_spec(order, norm, activation, training=norm == "batch")
        call = tune.Call(spec, DTYPES[dtype], M, N, K)
        calls = jobs.setdefault(call.key(), [])
        calls += [] if call in calls else [call]
    return jobs


def run_script(what: str, path: Path, command: Sequence[str], rest: Sequence[str]) -> int:
    """Runs a part of the source repository that no wheel contains."""
    if not path.exists():
        print(
            f"{what} is not part of the installed package: it is {path.relative_to(ROOT)} in the "
            f"source repository; clone it and run `make {what}` there",
            file=sys.stderr,
        )
        return FAILED
    known = os.environ.get("PYTHONPATH")
    search = os.pathsep.join([str(ROOT), *([known] if known else [])])
    environment = {**os.environ, "PYTHONPATH": search}
    return subprocess.run([sys.executable, *command, *rest], env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    if rest and args.command not in ("bench", "demo"):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "info":
        return run_info(args)
    if args.command == "explain":
        return run_explain(args)
    if args.command == "tune":
        return run_tune(args)
    if args.command == "selftest":
        return selftest()
    if args.command == "demo":
        script = ROOT / "examples" / "degradation.py"
        return run_script("demo", script, [str(script)], rest)
    return run_script("bench", ROOT / "bench" / "__main__.py", ["-m", "bench"], rest)
