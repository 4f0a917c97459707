"""`python -m bench stacks`: whole residual networks, one call against layers one by one.

Each stack is first held to eager; then contenders take turns, as for layers (measure/row.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import FusedResidualStack, FusedSequential
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.tools.bench import INFERENCE, STEP, compare, saved_bytes
from fusedres.tools.timing import interleave

from .measure import results_file
from .report.section import replace_part, source
from .report.tables import Table, short

RESULTS = results_file.RESULTS / "stacks"
PAGE, README = results_file.ROOT / "docs/deep.md", results_file.ROOT / "README.md"
MARKERS = "<!-- stacks:begin -->", "<!-- stacks:end -->"
ADAM = "step with Adam"
MODES = {
    INFERENCE: "under no_grad",
    STEP: "gradients of x and every parameter",
    ADAM: "forward, backward and torch.optim.Adam over all parameters",
}
ABOUT = {
    "fused": "FusedResidualStack; with Adam(fused=True)",
    "recompute": "the same with recompute=True",
    "sequential": "FusedSequential of FusedResidual layers: parameters of each layer's own",
    "eager": "the layers of torch's own, one after another; with Adam(foreach=True)",
    "eager, fused Adam": "eager with Adam(fused=True)",
    "compile": "torch.compile(eager, fullgraph=True)",
}
SECONDS, QUICK = 4.0, 0.3  # for the rounds of a row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


class Net(NamedTuple):
    name: str
    rows: int
    features: int
    depth: int
    block: int = 1
    activation: str = "relu"
    compiled: bool = False  # torch.compile takes part: it needs a second a layer
    modes: tuple[str, ...] = tuple(MODES)
    dtype: str = "fp32"


NETS = (
    Net("host", 4, 8, 100, modes=(INFERENCE, STEP)),
    Net("digits", 128, 64, 200),
    Net("digits, 20 layers", 128, 64, 20, compiled=True),
    Net("deep-rl, 64 layers", 512, 256, 64, 4, "silu"),
    Net("deep-rl, 1000 layers", 512, 256, 1000, 4, "silu", modes=(STEP,)),
    Net("256 x 128", 256, 128, 100, 1, "silu"),
    Net("4096 x 128", 4096, 128, 16, 1, "gelu"),
)
NETS_ON_GPU = (
    Net("narrow, 1000 layers", 256, 64, 1000, 1, "silu", modes=(STEP,), dtype="bf16"),
    Net("deep-rl, 1000 layers", 512, 256, 1000, 4, "silu", modes=(STEP,), dtype="bf16"),
    Net("4096 x 128, 100 layers", 4096, 128, 100, 1, "silu", modes=(INFERENCE, STEP), dtype="bf16"),
    Net("4096 x 512, 50 layers", 4096, 512, 50, 1, "silu", modes=(INFERENCE, STEP), dtype="bf16"),
)


class Goal(NamedTuple):
    """What `found` tells of the rows is at least `bound`, or with `most` at most."""

    what: str
    found: Callable[[dict[tuple[str, str], Row]], float]
    bound: float
    beyond: float
    most: bool = False


def _faster(name: str, mode: str, rival: str = "eager") -> Callable[..., float]:
    return lambda rows: rows[name, mode]["ratios"][rival]["median"]


def _a_layer(rows: dict[tuple[str, str], Row], backward: bool) -> float:
    """Microseconds."""
    forward, step = (rows["host", m]["times_us"]["fused"]["median"] for m in (INFERENCE, STEP))
    return (step - forward if backward else forward) / 100


def _kept(name: str) -> Callable[..., float]:
    return lambda rows: (
        rows["digits", STEP]["saved_bytes"][name] / (rows["digits", STEP]["saved_bytes"]["eager"])
    )


def _milliseconds(name: str) -> Callable[..., float]:
    return lambda rows: rows[name, STEP]["times_us"]["fused"]["median"] / 1e3


GOALS = (
    Goal("digits, forward", _faster("digits", INFERENCE), 4, 6),
    Goal("digits, step", _faster("digits", STEP), 4, 6),
    Goal("digits, Adam, against foreach", _faster("digits", ADAM), 4, 6),
    Goal("digits, Adam, against fused", _faster("digits", ADAM, "eager, fused Adam"), 4, 6),
    Goal("deep-rl, 64 layers, step", _faster("deep-rl, 64 layers", STEP), 1.3, 1.5),
    Goal("deep-rl, 1000 layers, step", _faster("deep-rl, 1000 layers", STEP), 1.3, 1.5),
    Goal("host, us a layer forward", partial(_a_layer, backward=False), 1, 0.3, True),
    Goal("host, us a layer backward", partial(_a_layer, backward=True), 2, 0.9, True),
    Goal("kept for backward, of eager's", _kept("fused"), 0.67, 0.67, True),
    Goal("kept with recompute, of eager's", _kept("recompute"), 0.34, 0.34, True),
)


GOALS_ON_GPU = (
    Goal("narrow, 1000 layers, ms a step", _milliseconds("narrow, 1000 layers"), 3, 1.6, True),
    Goal("deep-rl, 1000 layers, ms a step", _milliseconds("deep-rl, 1000 layers"), 8, 5.5, True),
)


class Eager(nn.Module):
    """The layers as users write them."""

    def __init__(self, stack: FusedResidualStack, activation: str) -> None:
        super().__init__()
        self.block, self.activation = stack.layers_per_block, ACTIVATION_FUNCTIONS[activation]
        layers: list[Any] = stack.to_layers()
        self.linears = nn.ModuleList(layer.linear for layer in layers)
        self.norms = nn.ModuleList(layer.norm for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            h = self.activation(norm(linear(h)))
            if i % self.block == self.block - 1:
                x = h = h + x
        return x


def contenders(net: Net, device: torch.device | str = "cpu") -> dict[str, nn.Module]:
    torch.manual_seed(0)
    where: Any = {"device": device, "dtype": DTYPES[net.dtype]}
    stack = FusedResidualStack(
        net.features, net.depth, layers_per_block=net.block, activation=net.activation, **where
    )
    eager = Eager(stack, net.activation)
    found: dict[str, nn.Module] = {"eager": eager}
    if net.compiled:
        found["compile"] = torch.compile(eager, dynamic=False, fullgraph=True)  # type: ignore[assignment]
    if net.block == 1:
        found["sequential"] = FusedSequential(*stack.to_layers())
    twin = FusedResidualStack(
        net.features, net.depth, layers_per_block=net.block, activation=net.activation,
        recompute=True, **where,
    )  # fmt: skip
    twin.load_state_dict(stack.state_dict())
    return found | {"recompute": twin, "fused": stack}


def calls_of(net: Net, mode: str, found: dict[str, nn.Module], x: Tensor) -> dict[str, Any]:
    calls: dict[str, Any] = {}
    dy = torch.randn_like(x)

    def step(module: nn.Module, optimiser: torch.optim.Optimizer | None) -> None:
        module(x).backward(dy)
        if optimiser is not None:
            optimiser.step()
        module.zero_grad()
        x.grad = None

    for name, module in found.items():
        if mode == INFERENCE:
            if name != "recompute":
                calls[name] = torch.no_grad()(partial(module, x))
        elif mode == STEP:
            calls[name] = partial(step, module, None)
        elif name == "eager":
            for way, told in (("foreach", name), ("fused", "eager, fused Adam")):
                adam = torch.optim.Adam(module.parameters(), 1e-6, **{way: True})
                calls[told] = partial(step, module, adam)
        else:
            adam = torch.optim.Adam(module.parameters(), 1e-6, fused=True)
            calls[name] = partial(step, module, adam)
    return calls


def _check(found: dict[str, nn.Module], x: Tensor) -> None:
    """Whether fused's y and dx are eager's: rounding grows with depth, so by their RMS. In 16 bits
    both are held to eager in fp32, and fused may err by a tenth more.
    """
    dy, results = torch.randn_like(x), {}
    for name in ("eager", "fused", "recompute"):
        y = found[name](x)
        results[name] = y.detach(), *torch.autograd.grad(y, x, dy)
    true, allowed = results["eager"], [1e-3, 1e-3]
    if x.dtype != torch.float32:
        leaf = x.detach().float().requires_grad_()
        y = copy.deepcopy(found["eager"]).float()(leaf)
        true = y.detach(), *torch.autograd.grad(y, leaf, dy.float())
        allowed = [1.1 * _error(a, b) for a, b in zip(results["eager"], true, strict=True)]
    for name in ("fused", "recompute"):
        for a, b, most in zip(results[name], true, allowed, strict=True):
            if not _error(a, b) < most:
                told = f"{_error(a, b):.1e} of its size"
                raise ArithmeticError(f"{name} differs from eager by {told}, at most {most:.1e}")


def _error(t: Tensor, true: Tensor) -> float:
    return ((t - true).norm() / true.norm()).item()


def measure(nets: tuple[Net, ...], seconds: float, device: torch.device) -> Iterator[Row]:
    for net in nets:
        found = contenders(net, device)
        where: Any = {"device": device, "dtype": DTYPES[net.dtype]}
        x = torch.randn(net.rows, net.features, **where, requires_grad=True)
        _check(found, x)
        for mode in net.modes:
            rounds, calm = interleave(calls_of(net, mode, found, x), device, seconds)
            row: Row = {"net": net.name, "mode": mode, "rounds": len(rounds), "calm": calm}
            row |= {"rows": net.rows, "features": net.features, "depth": net.depth}
            row |= {"layers_per_block": net.block, "activation": net.activation}
            row |= {"dtype": net.dtype}
            row |= compare(rounds, calm, ("eager", "compile"))
            if mode == STEP:
                names = ("eager", "fused", "recompute")
                row["saved_bytes"] = {name: saved_bytes(found[name], x) for name in names}
            yield row


def judge(rows: list[Row], goals: tuple[Goal, ...] = GOALS) -> list[Row]:
    by_name = {(row["net"], row["mode"]): row for row in rows}
    told = []
    for goal in goals:
        try:
            value: float | None = goal.found(by_name)
        except KeyError:
            value = None
        row: Row = {"goal": goal.what, "value": value}
        for name, bound in (("bound", goal.bound), ("beyond", goal.beyond)):
            row[name] = f"{'<=' if goal.most else '>='} {bound:g}"
            reached = value is not None and (
                round(value, 2) <= bound if goal.most else round(value, 2) >= bound
            )
            row["met" if name == "bound" else "passed"] = None if value is None else reached
        told.append(row)
    return told


def _x(row: Row, name: str) -> str:
    ratio = row["ratios"].get(name)
    return "" if ratio is None else f"{ratio['median']:.2f}"


def _ms(row: Row) -> str:
    return "~" * (not row["calm"]) + short(row["times_us"]["fused"]["median"] / 1e3)


def tables(results: Row) -> str:
    """What docs/deep.md shows of a results file."""
    head = ["net", "rows x width", "layers", "call", "ms", "x eager", "x eager, fused Adam"]
    head += ["x compile", "x sequential", "x recompute"]
    body = []
    for row in results["rows"]:
        shape = f"{row['rows']} x {row['features']}"
        cells = [row["net"], shape, str(row["depth"]), row["mode"], _ms(row)]
        rivals = ("eager", "eager, fused Adam", "compile", "sequential", "recompute")
        body.append([*cells, *(_x(row, name) for name in rivals)])
    note = (
        "`ms` is FusedResidualStack's, `x` another's time over it in the same round, above 1 it is "
        "slower; `~` disturbed by other processes"
    )
    types = dict.fromkeys(row.get("dtype", "fp32") for row in results["rows"])
    timed = Table(f"Whole networks, {', '.join(types)}", head, body, 4, note)
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    goals = [
        [g["goal"], g["bound"], g["beyond"], f"{g['value']:.2f}" if g["value"] else "", ""]
        for g in results["goals"]
    ]
    for line, goal in zip(goals, results["goals"], strict=True):
        line[-1] = "beyond" if goal["passed"] else verdicts[goal["met"]]
    judged = Table("Goals", ["goal", "bound", "beyond", "found", ""], goals, 1)
    return f"Measured on {source(results)}.\n\n{timed.markdown()}\n\n{judged.markdown()}"


HEADLINE = (
    ("digits", INFERENCE),
    ("digits", ADAM),
    ("256 x 128", STEP),
    ("deep-rl, 1000 layers", STEP),
)


def headline(files: list[Row]) -> str:
    """What README shows: the same nets whatever they gain, a column a machine."""
    head = ["net", "layers", "rows x width", "call", *map(results_file.machine_of, files)]
    measured = [{(row["net"], row["mode"]): row for row in results["rows"]} for results in files]
    body = []
    for name in HEADLINE:
        found = [rows[name] for rows in measured]
        row, cells = found[0], [f"{_x(row, 'eager')} ({_ms(row)} ms)" for row in found]
        shape = f"{row['rows']} x {row['features']}"
        body.append([row["net"], str(row["depth"]), shape, row["mode"], *cells])
    note = "times faster than torch's layers one by one, by FusedResidualStack, and its time; "
    runs = (f"{r['machine']['threads']} threads, {r['commit']}, {r['date']}" for r in files)
    note += f"measured with {'; '.join(runs)}"
    return Table("Whole networks, fp32", head, body, 4, note).markdown()


def pages() -> dict[Path, str]:
    """The text of each page that shows results: the newest of each CPU."""
    found = results_file.newest_of_machines(RESULTS)
    files = [results for results in found if results["device"] == "cpu"]
    parts = {PAGE: "\n\n".join(map(tables, files)), README: headline(files)}
    return {page: replace_part(page, MARKERS, part) for page, part in parts.items()}


def _write() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(f"Written: {page}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench stacks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short, and no file")
    parser.add_argument("--only", default="", metavar="TEXT", help="part of a net's name; no file")
    parser.add_argument("--threads", type=int, help="1 measures CPU time: for a busy machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="no page is written then")
    told = "measure nothing; write the newest results of each machine into README and docs"
    parser.add_argument("--write", action="store_true", help=told)
    args = parser.parse_args(arguments)
    if args.write:
        _write()
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device, gpu = torch.device(args.device), args.device == "cuda"
    every = NETS_ON_GPU if gpu else NETS
    nets = tuple(net for net in every if args.only in net.name)
    if not nets:
        names = ", ".join(net.name for net in every)
        parser.error(f"--only {args.only!r} leaves no net; nets: {names}")
    results = results_file.collect(device)
    results["protocol"] = {"contenders": ABOUT, "modes": MODES}
    results["rows"] = []
    for row in measure(nets, QUICK if args.quick else SECONDS, device):
        ratios = ", ".join(f"{name} {r['median']:.2f}" for name, r in row["ratios"].items())
        ms = short(row["times_us"]["fused"]["median"] / 1e3)
        print(f"{row['net']}, {row['mode']}: {ms} ms; x {ratios}", file=sys.stderr, flush=True)
        results["rows"].append(row)
        results["goals"] = judge(results["rows"], GOALS_ON_GPU if gpu else GOALS)
        if args.output:  # anew after each row
            results_file.save(results, args.output)
    print(tables(results))
    if not (args.quick or args.only or args.output):
        path: Path = results_file.save(results, RESULTS / f"{results_file.name(results)}.json")
        if not gpu:
            _write()
        print(f"Written: {path}", file=sys.stderr)
    return 0
