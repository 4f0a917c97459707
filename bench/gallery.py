"""``python -m bench.gallery --write``: docs/models.md, what of public models can be fused.

Every model of bench/zoo.py, without dropout, as torch.compile(backend="fusedres") and as convert
make it: outputs, gradients and buffers of a training step against the model as it was, by the
accuracy rule (of the error against float64, the RMS is at most 1.10 times the model's own and the
largest at most 2 times).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fusedres
from fusedres.models.compiled import backend
from fusedres.models.report import Report

from .report.section import replace_part
from .zoo import ZOO

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MARKERS = "<!-- gallery -->", "<!-- /gallery -->"
WAYS = ("compile", "convert")


def quiet(model: nn.Module) -> nn.Module:
    """Without dropout, whose masks differ: what is left is the same function."""
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def step(call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one training step, by name."""
    model.zero_grad()
    outputs = [t for t in tree_leaves(_tensors(call(*args))) if t.is_floating_point()]
    generator, loss = torch.Generator().manual_seed(1), torch.zeros(())
    for y in outputs:
        loss = loss + (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum()
    loss.backward()
    result = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    result |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return result | {f"b {n}": b.clone() for n, b in model.named_buffers() if b.is_floating_point()}


def _tensors(output: Any) -> Any:
    return [v for v in output.values() if v is not None] if isinstance(output, dict) else output


def fuse(way: str, model: nn.Module, args: tuple[Any, ...], when: str = "always") -> Any:
    """The model (it is changed) as something to call, and a function that makes the report."""
    if way == "convert":
        report = fusedres.convert(model, *args, when=when).residual_adds
        return model, lambda: report
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options={"when": when})
    return compiled, lambda: fusedres.report(model)


def worst(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The error over what the accuracy rule allows, at most 1: outputs, gradients and buffers each
    as one vector, every tensor in units of its largest value, or of a thousandth of the largest of
    all: a gradient that is 0 but for rounding has no unit. Infinite: not the same results.
    """
    facts = [[(n, t.dtype, t.shape) for n, t in r.items()] for r in (ours, eager)]
    if facts[0] != facts[1]:
        return float("inf")
    ratios = [0.0]
    for kind in ("y", "d ", "b "):
        names = [name for name in eager if name.startswith(kind) and eager[name].numel()]
        if names:
            sizes = {name: float(exact[name].abs().max()) for name in names}
            scales = {name: max(sizes[name], 1e-3 * max(sizes.values())) or 1.0 for name in names}
            off = {k: [(r[n].double() - exact[n]) / scales[n] for n in names]
                   for k, r in (("ours", ours), ("eager", eager))}  # fmt: skip
            came, allowed = (torch.cat([t.flatten() for t in off[k]]) for k in ("ours", "eager"))
            one = torch.finfo(eager[names[0]].dtype).eps  # a rounding step
            least = one * came.numel() ** -0.5  # one in one element
            rms = came.square().mean().sqrt() / (1.1 * allowed.square().mean().sqrt() + least)
            ratios += [float(rms), float(came.abs().max() / (2 * allowed.abs().max() + one))]
    return max(ratios)


@dataclass
class Row:
    """What came out for one model and one way."""

    report: Report
    error: float
    seconds: float


def measure(name: str, way: str) -> Row:
    torch.manual_seed(0)
    plain, args = ZOO[name]()
    plain = quiet(plain.train())
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    doubles = tree_map(_double, args)
    expected, true = step(plain, plain, args), step(exact, exact, doubles)
    begin = time.perf_counter()
    call, report = fuse(way, ours, args)
    came = step(call, ours, args)
    seconds = time.perf_counter() - begin
    return Row(report(), worst(came, expected, true), seconds)


def _double(v: Any) -> Any:
    return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v


def _table() -> str:
    lines = [
        "| model | residual adds | compile | convert | equal | left, and why |",
        "|---|--:|--:|--:|---|---|",
    ]
    totals = {"found": 0, "compile": 0, "convert": 0}
    for name in ZOO:
        try:
            rows = {way: measure(name, way) for way in WAYS}
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        found = rows["compile"].report.found
        counts = {
            way: sum(not a.convolutional for a in row.report.fused) for way, row in rows.items()
        }
        equal = "yes" if all(row.error <= 1 for row in rows.values()) else "NO"
        why = {a.what for a in rows["compile"].report.left if not a.convolutional}
        cells = (name, found, *counts.values(), equal, "; ".join(sorted(why)))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        totals["found"] += found
        for way in WAYS:
            totals[way] += counts[way]
        print(lines[-1], [f"{r.error:.2f}" for r in rows.values()], flush=True)
    part = {way: f"{totals[way]} ({totals[way] / max(totals['found'], 1):.0%})" for way in WAYS}
    lines.append(f"| all | {totals['found']} | {part['compile']} | {part['convert']} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = _table()
    if options.write:
        PAGE.write_text(replace_part(PAGE, MARKERS, text))
    else:
        print(text)


if __name__ == "__main__":
    main()
