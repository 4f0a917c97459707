"""The command line, `python -m fusedres`: what is here, does it work, what would a layer do."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..checks import BACKENDS
from ..mlp import MLP_ORDERS
from ..spec import ACTIVATIONS, GATES, NORMS, ORDERS, REGISTERED, meant
from . import bench, commands, selftest, tune

Commands = argparse._SubParsersAction

EPILOG = """\
examples:
  python -m fusedres info              what is installed, what is missing and how to get it
  python -m fusedres selftest          every backend on this machine against the reference
  python -m fusedres bench             what it gains on this machine, in half a minute
  python -m fusedres explain linear-norm-act-add --shape 4096x1024 --dtype bf16
  python -m fusedres explain prenorm --mlp --shape 256x384 --activation gelu
  python -m fusedres COMMAND --help    more about each

Tables, colours and bars need rich (pip install rich) and a terminal; NO_COLOR=1: no colours.

exit codes: 0 good, 1 a check failed or something is not here, 2 wrong arguments, 130 interrupted
"""
SELFTEST_EPILOG = (
    "exit codes: 0 all agree (or no backend is here to be checked), 1 a layer is wrong"
)
EXPLAIN_EPILOG = """\
orders are stages joined by "-" (norm act linear gate dropout droppath add), or an alias:
{orders}
  with --mlp: {mlp}

examples:
  python -m fusedres explain linear-norm-act-add --shape 4096x1024 --dtype bf16
  python -m fusedres explain bert-output --activation none --shape 512x768 --dropout 0.1
  python -m fusedres explain note --shape 4096x1024 --device cuda      as on a machine with a GPU

exit codes: 0 explained, 1 the --backend named cannot run it, 2 wrong arguments
"""
BENCH_EPILOG = """\
examples:
  python -m fusedres bench
  python -m fusedres bench --shape 512x339 --shape 4096x1024 --norm rms --activation silu
  python -m fusedres bench --dtype bf16 --json > mine.json
  python -m fusedres bench --full --quick     in the source repository: python -m bench --quick

exit codes: 0 measured (slower or not), 1 a layer is wrong or did not run, or there is no such
device, 2 wrong arguments
"""
DEMO_EPILOG = (
    "exit codes: 0 it came out so, 1 it did not or scikit-learn is missing, 2 wrong arguments"
)
TUNE_EPILOG = """\
Options with + may be repeated: every combination is measured.

examples:
  python -m fusedres tune
  python -m fusedres tune --order prenorm --dtype fp16 --shape 256x512 --dry-run
  python -m fusedres tune --only backends --dtype fp32 --dtype bf16

exit codes: 0 done, 1 a tile or backend is wrong or there is no GPU, 2 wrong arguments
"""


class Parser(argparse.ArgumentParser):
    """One that asks, at a name it does not know, whether another was meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = tuple(map(str, action.choices))
        own = "; one of your own: fusedres.explain, in Python" * (action.dest == "activation")
        told = f"unknown {value!r}; {meant(value, names)}known: {', '.join(names)}{own}"
        raise argparse.ArgumentError(action, told)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Arguments that are none of this command's."""
        near = [get_close_matches(word, self._option_string_actions, 1, 0.75) for word in unknown]
        asked = "".join(f"; did you mean {name}?" for names in near[:1] for name in names)
        self.error(f"unrecognized arguments: {' '.join(unknown)}{asked}")


def activations() -> tuple[str, ...]:
    return ("none", *ACTIVATIONS, *REGISTERED)


def parser() -> Parser:
    main = Parser(
        prog="python -m fusedres",
        description="Residual layers, y = act(norm(x @ W.T + b)) + x, in one fused call.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="version", version=f"fusedres {__version__}")
    every = main.add_subparsers(dest="command", metavar="COMMAND")
    info = _add(every, "info", "versions, extension, GPU, what is missing", "")
    info.add_argument("--json", action="store_true", help="for machines")
    check = _add(every, "selftest", "check every backend that is here", SELFTEST_EPILOG)
    check.add_argument(
        "--seconds",
        type=_seconds,
        default=selftest.SECONDS,
        metavar="S",
        help="start no further layer after that; default: %(default)g",
    )
    check.add_argument("--json", action="store_true", help="for machines")
    _add_explain(every)
    _add_bench(every)
    demo = _add(every, "demo", "plain against residual nets, a minute", DEMO_EPILOG)
    demo.add_argument("--quick", action="store_true", help="4 and 56 layers only, a minute")
    demo.add_argument(
        "--seeds",
        type=_count,
        default=1,
        metavar="N",
        help="train each net N times; lines are medians then, bands worst to best; default: 1",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("degradation.png"),
        metavar="FILE",
        help="the picture; default: %(default)s",
    )
    _add_tune(every)
    return main


def _add(every: Commands, name: str, short: str, epilog: str) -> Parser:
    one: Parser = every.add_parser(
        name,
        help=short,
        description=getdoc(getattr(commands, name)),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(refuse=one.refuse)
    return one


def _add_explain(every: Commands) -> None:
    orders = "\n".join(f"  {alias:12} {order}" for alias, order in ORDERS.items())
    epilog = EXPLAIN_EPILOG.format(orders=orders, mlp=", ".join(MLP_ORDERS))
    one = _add(every, "explain", "which backend and kernel a layer gets, and why", epilog)
    one.add_argument("order", help='stages such as "linear-norm-act-add", or an alias')
    one.add_argument(
        "--shape", required=True, type=_sizes, metavar="MxK[xN]", help="rows x inputs [x outputs]"
    )
    one.add_argument(
        "--dtype", choices=tuple(commands.DTYPES), default="fp32", help="default: fp32"
    )
    one.add_argument("--norm", choices=("none", *NORMS), default="layer", help="default: layer")
    one.add_argument(
        "--activation",
        choices=activations(),
        default="relu",
        metavar="NAME",
        help=f"default: relu; known: none, {', '.join(ACTIVATIONS)}",
    )
    one.add_argument("--gate", choices=GATES)
    one.add_argument("--dropout", type=float, default=0.0, metavar="P")
    one.add_argument("--mlp", action="store_true", help="a block of two matmuls, hidden 4 x K")
    one.add_argument("--eval", action="store_true", help="in evaluation; default: training")
    one.add_argument("--backend", choices=BACKENDS, default="auto")
    one.add_argument(
        "--device", choices=("cpu", "cuda"), help="as if on it; default: cuda if there is one"
    )
    one.add_argument("--json", action="store_true", help="for machines")


def _add_bench(every: Commands) -> None:
    one = _add(every, "bench", "fused against eager on this machine", BENCH_EPILOG)
    one.add_argument(
        "--shape",
        action="append",
        type=_sizes,
        metavar="MxK[xN]",
        help="rows x inputs [x outputs]; may be repeated",
    )
    one.add_argument("--order", metavar="ORDER", help="default: note; see `explain --help`")
    one.add_argument("--norm", choices=("none", *NORMS), help="default: layer")
    one.add_argument(
        "--activation",
        choices=activations(),
        metavar="NAME",
        help=f"default: gelu; known: none, {', '.join(ACTIVATIONS)}",
    )
    one.add_argument(
        "--dtype", choices=tuple(bench.DTYPES), help="default: fp32 on a CPU, bf16 on a GPU"
    )
    one.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    one.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="1 measures CPU time, which a busy machine hardly disturbs",
    )
    one.add_argument(
        "--seconds",
        type=_seconds,
        default=bench.SECONDS,
        metavar="S",
        help="in all, twice that on a busy machine; default: %(default)g",
    )
    one.add_argument("--json", action="store_true", help="for machines")
    one.add_argument(
        "--full",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="the source repository's benchmark; the rest is for it",
    )


def _add_tune(every: Commands) -> None:
    one = _add(every, "tune", "measure tiles and backends on this GPU, keep what wins", TUNE_EPILOG)
    for name, known, default in (
        ("--order", None, "note"),
        ("--norm", ("none", *NORMS), "layer"),
        ("--activation", activations(), "relu"),
        ("--dtype", ("bf16", "fp16", "fp32"), "bf16"),
    ):
        one.add_argument(
            name, action="append", choices=known, metavar="NAME", help=f"+ default: {default}"
        )
    one.add_argument(
        "--shape",
        action="append",
        type=_sizes,
        metavar="MxK[xN]",
        help="+ default: M in 256, 4096, 65536 and N = K from 64 to 4096",
    )
    one.add_argument("--only", choices=("tiles", "backends"), help="default: tiles, then backends")
    one.add_argument("--quick", action="store_true", help="shipped tiles only, no variants of them")
    one.add_argument(
        "--seconds",
        type=float,
        default=tune.SECONDS,
        metavar="S",
        help="in all; default: %(default)g",
    )
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


def _positive(text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError:
        told = f"must be a positive {kind.__name__}, got {text!r}"
        raise argparse.ArgumentTypeError(told) from None
    return value


_count, _seconds = partial(_positive, kind=int), partial(_positive, kind=float)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may not fit the terminal's encoding
            stream.reconfigure(errors="replace")
    top = parser()
    args, unknown = top.parse_known_args(arguments)
    if unknown:  # said with the command's own usage
        getattr(args, "refuse", top.refuse)(unknown)
    if args.command is None:
        top.print_help(sys.stderr)
        return commands.USAGE
    return int(getattr(commands, args.command)(args))
