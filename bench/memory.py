"""`python -m bench memory`: the most that a training step of a whole net holds at once, by depth.

Counted by torch's profiler, not timed, so it is the same on a busy machine. A step is forward,
backward and Adam; parameters and Adam's state, alike for all, are not counted, gradients are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .measure import results_file
from .measure.counts import peak_bytes
from .report.pictures import BLUE, DPI, GREEN, GREY, STAMP, STYLE, WIDTH, digest
from .report.section import replace_part, source
from .report.tables import Table
from .stacks import ADAM, Net, Row, calls_of, contenders

RESULTS = results_file.RESULTS / "memory"
PAGE = results_file.ROOT / "docs/deep.md"
PICTURE = results_file.ROOT / "docs/pictures/deep-memory.png"
MARKERS = "<!-- memory:begin -->", "<!-- memory:end -->"
NETS = (
    *(Net("digits", 128, 64, depth) for depth in (4, 20, 56, 110, 200)),
    *(Net("deep-rl", 512, 256, depth, 4, "silu") for depth in (4, 16, 64)),
)
EAGER = "eager, fused Adam"  # no temporaries of the optimiser's own
WAYS = {EAGER: "torch's layers", "fused": "fused", "recompute": "fused, recompute=True"}
COLOURS = {EAGER: GREY, "fused": BLUE, "recompute": GREEN}
MIB = 2**20


def measure(nets: tuple[Net, ...]) -> Iterator[Row]:
    device = torch.device("cpu")
    for net in nets:
        x = torch.randn(net.rows, net.features, requires_grad=True)
        calls = calls_of(net, ADAM, contenders(net), x)
        row: Row = {"net": net.name, "rows": net.rows, "features": net.features, "depth": net.depth}
        yield row | {"peak_bytes": {way: peak_bytes(calls[way], device) for way in WAYS}}


def table(results: Row) -> str:
    head = ["net", "rows x width", "layers", *(f"{name}, MiB" for name in WAYS.values())]
    head += ["fused / torch's", "recompute / torch's"]
    body = []
    for row in results["rows"]:
        peaks = [row["peak_bytes"][way] for way in WAYS]
        cells = [row["net"], f"{row['rows']} x {row['features']}", str(row["depth"])]
        cells += [f"{peak / MIB:.3g}" for peak in peaks]
        body.append([*cells, *(f"{peak / peaks[0]:.2f}" for peak in peaks[1:])])
    note = "gradients counted, parameters and Adam's state not"
    text = Table("Peak memory of a training step, fp32", head, body, 3, note).markdown()
    picture = f"![Peak memory of a training step against depth](pictures/{PICTURE.name})"
    return f"{picture}\n\n{text}\n\nCounted on {source(results, brief=True)}."


def draw(results: Row, picture: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["net"] for row in results["rows"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained", facecolor="white")
        for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
            rows = [row for row in results["rows"] if row["net"] == name]
            depths = [row["depth"] for row in rows]
            for way, label in WAYS.items():
                peaks = [row["peak_bytes"][way] / MIB for row in rows]
                axis.plot(depths, peaks, "o-", color=COLOURS[way], label=label)
            axis.set(title=f"{name}: {rows[0]['rows']} rows of {rows[0]['features']}")
            axis.set(xlabel="layers", ylabel="MiB", xlim=(0, None), ylim=(0, None))
            axis.legend(frameon=False)
        figure.suptitle("Peak memory of one training step: less is better")
        figure.supxlabel(source(results, brief=True), fontsize=7, color=GREY)
        figure.savefig(picture, dpi=DPI, metadata={STAMP: digest(results)})


def pages(results: Row) -> dict[Path, str]:
    """The text of each page that shows the results."""
    return {PAGE: replace_part(PAGE, MARKERS, table(results))}


def _write(results: Row) -> None:
    for page, text in pages(results).items():
        page.write_text(text, encoding="utf-8")
    draw(results, PICTURE)
    print(f"Written: {PAGE}, {PICTURE}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--write", action="store_true", help="the newest results into docs")
    args = parser.parse_args(arguments)
    if args.write:
        _write(results_file.load(results_file.newest(RESULTS)["cpu"]))
        return 0
    results: dict[str, Any] = results_file.collect(torch.device("cpu"))
    results["protocol"] = {"contenders": WAYS, "mode": ADAM}
    results["rows"] = []
    for row in measure(NETS):
        told = ", ".join(f"{way} {n / MIB:.3g} MiB" for way, n in row["peak_bytes"].items())
        print(f"{row['net']}, {row['depth']} layers: {told}", file=sys.stderr, flush=True)
        results["rows"].append(row)
    RESULTS.mkdir(exist_ok=True)
    path: Path = results_file.save(results, RESULTS / f"{results_file.name(results)}.json")
    _write(results)
    print(f"Written: {path}", file=sys.stderr)
    return 0
