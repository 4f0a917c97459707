"""`python -m bench scaling`: how time, memory and exchange grow, predicted by model.py from
ceilings, and how far from that is what was measured. --write puts it into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from ..measure.cases import HOST, INFERENCE, STEP
from ..measure.results_file import RESULTS, ROOT, Results, load, newest
from ..report.section import replace_part
from ..report.tables import select, table
from . import model
from .model import Layer, Machine, of_row, seconds

PAGE = ROOT / "docs" / "scaling.md"
MARKERS = "<!-- bench scaling: begin -->", "<!-- bench scaling: end -->"
# No GPU was measured. NVIDIA's H200 data sheet: 4.8 TB/s, 989 TFLOP/s dense bf16, NVLink 900 GB/s
# both ways together. Of the first 90 %, of the second 80 %, of a link's way 80 % are what large
# copies, cuBLAS and NCCL are commonly seen to reach. Launch and latency are guesses.
ASSUMED = Machine(
    "cuda",
    "H200",
    "assumed: 0.9, 0.8 and 0.8 of the data sheet's bandwidth, bf16 rate and link",
    copy=0.9 * 4.8e12,
    matmul={"bf16": 0.8 * 989e12},
    launch=2e-6,
    link=0.8 * 450e9,
    latency=10e-6,
)
TIMED = ("fused", "eager")
DEEP = 200
WIDTHS, ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192), (256, 1024, 4096, 16384, 65536)
RECIPES = (
    ("note", "layer", "gelu"),
    ("note", "batch", "relu"),
    ("preact", "layer", "relu"),
    ("prenorm", "layer", "relu"),
    ("postnorm", "layer", "gelu"),
    ("bert-output", "layer", None),
)


def measured(results: Results) -> Machine:
    """The machine of a results file. A call's overhead is what it takes with nothing to compute."""
    found, ceilings = results["machine"], results["ceilings"]
    rows = select(results["rows"], group=HOST)
    return replace(
        ASSUMED,
        device=results["device"],
        name=found.get("gpu") or f"{found['cpu']}, {found['threads']} threads",
        source=f"measured, commit {results['commit']}, {results['date']}",
        copy=ceilings["copy_gb_per_s"] * 1e9,
        matmul={dtype: rate * 1e12 for dtype, rate in ceilings["matmul_tflop_per_s"].items()},
        host={(n, row["mode"]): row["times_us"][n]["median"] / 1e6 for row in rows for n in TIMED},
        link=ASSUMED.link if results["device"] == "cuda" else 0.0,
    )


def ceilings_table(machines: Iterable[Machine]) -> str:
    head = ["machine", "copy, GB/s", "product, TFLOP/s", "overhead, us", "link, GB/s; us", "source"]
    body = []
    for m in machines:
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in m.matmul.items())
        overhead = "a call's, measured" if m.host else f"{1e6 * m.launch:g} a kernel"
        link = f"{m.link / 1e9:,.0f}, {1e6 * m.latency:g}" if m.link else ""
        body.append([m.name, f"{m.copy / 1e9:,.0f}", rates, overhead, link, m.source])
    return table(head, body, left=6)


def predicted(layer: Layer, mode: str, machine: Machine) -> tuple[float, float, float]:
    """Microseconds of fused, of eager, and eager over fused."""
    fused, eager = (1e6 * seconds(layer, name, mode, machine) for name in TIMED)
    return fused, eager, eager / fused


def comparison(results: Results) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Rows of one product with their three numbers: predicted, measured."""
    machine = measured(results)
    for row in results["rows"]:
        one = row["group"] != HOST and not row.get("hidden") and row["mode"] in (INFERENCE, STEP)
        if one and row["dtype"] in machine.matmul and set(TIMED) <= row["times_us"].keys():
            times = [row["times_us"][name]["median"] for name in TIMED]
            ours = predicted(of_row(row), row["mode"], machine)
            yield row, ours, (*times, row["ratios"]["eager"]["median"])


def error_table(results: Results) -> str:
    """Predicted over measured: median, least and most over the rows of a mode and dtype."""
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for row, ours, found in comparison(results):
        factors = [p / m for p, m in zip(ours, found, strict=True)]
        groups.setdefault((row["mode"], row["dtype"]), []).append(factors)
    body = [
        [*group, str(len(rows)), *map(_span, zip(*rows, strict=True))]
        for group, rows in groups.items()
    ]
    return table(["mode", "dtype", "rows", "fused", "eager", "eager / fused"], body, left=2)


def _span(factors: tuple[float, ...]) -> str:
    return f"{median(factors):.2f} ({min(factors):.2f} to {max(factors):.2f})"


def row_table(results: Results, dtype: str) -> str:
    body = []
    for row, ours, found in comparison(results):
        if row["dtype"] == dtype:
            line = [row["case"], f"{row['rows']} x {row['features']}", row["mode"]]
            times = zip(ours[:2], found[:2], strict=True)
            line += [f"{us:,.0f}" for pair in times for us in pair]
            body.append([*line, f"{ours[2]:.2f}", f"{found[2]:.2f}"])
    columns = [f"{name}, {how}" for name in (*TIMED, "ratio") for how in ("predicted", "measured")]
    return table(["layer", "rows x width", "mode", *columns], body, left=3)


def growth_table(layers: Iterable[Layer], machine: Machine) -> str:
    body = []
    for layer in layers:
        found = [predicted(layer, mode, machine) for mode in (INFERENCE, STEP)]
        cells = (cell for us, _, ratio in found for cell in (f"{us:,.1f}", f"{ratio:.2f}"))
        body.append([f"{layer.M} x {layer.N}", *cells])
    head = ["rows x width", f"{INFERENCE}, us", "x eager", f"{STEP}, us", "x eager"]
    return table(head, body, left=1)


def memory_table(device: str) -> str:
    """Of 4096 x 1024, bf16: saved bytes of a layer over those of y; activations of a deep net."""
    body = []
    for order, norm, activation in RECIPES:
        layer = Layer(4096, 1024, 1024, order, norm, activation, "bf16", order == "bert-output")
        kept = [model.saved_bytes(layer, name, device) / layer.y for name in TIMED]
        deep = [model.depth_bytes(layer, name, DEEP, device) / 2**30 for name in TIMED]
        numbers = [*kept, kept[0] / kept[1], *deep, deep[0] / deep[1]]
        recipe = ", ".join(filter(None, (order, norm, activation)))
        body.append([recipe, *(f"{n:.2f}" for n in numbers)])
    deep_head = [f"{DEEP} layers: fused, GiB", "eager, GiB", "ratio"]
    return table(["recipe", *TIMED, "ratio", *deep_head], body, left=1)


def parallel_table(machine: Machine, rows: int = 65536) -> str:
    """Speed-up over one GPU of a step on `rows` rows in all, by cutting rows or outputs. Nothing
    overlaps; rows cut and overlapped: the exchange of gradients hides behind backward.
    """
    body = []
    for width in (1024, 4096, 8192):
        layer = Layer(rows, width, width, dtype="bf16")
        alone = seconds(layer, "fused", STEP, machine)
        for p in (2, 8):
            part, cut = replace(layer, M=rows // p), replace(layer, N=width // p, residual=True)
            step, forward = (seconds(part, "fused", mode, machine) for mode in (STEP, INFERENCE))
            exchange = model.data_parallel(part, p, machine)
            outputs = model.tensor_parallel(layer, p, machine)
            hidden = forward + max(step - forward, exchange)
            narrow = seconds(cut, "fused", STEP, machine)
            line = [width, p, 1e6 * alone, 1e6 * exchange, 1e6 * outputs]
            speeds = [alone / t for t in (step + exchange, hidden, narrow + outputs)]
            body.append([*(f"{n:,.0f}" for n in line), *(f"{n:.2f}" for n in speeds)])
    head = ["width", "GPUs", "one GPU, us", "gradients, us", "rows of y and dx, us"]
    return table([*head, "rows cut", "and overlapped", "outputs cut"], body, left=0)


def render(found: dict[str, Results]) -> str:
    """The generated part, from the newest results of each device that hold ceilings."""
    known = {device: results for device, results in found.items() if results.get("ceilings")}
    gpu = measured(known["cuda"]) if "cuda" in known else ASSUMED
    machines = [measured(known["cpu"])] if "cpu" in known else []
    parts = ["### Ceilings", ceilings_table([*machines, gpu])]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        told = ["Not measured yet."]
        if device in known:
            told = [error_table(known[device]), row_table(known[device], "fp32")]
        parts += [f"### Predicted over measured: {title}", *told]
    wide = [Layer(65536, n, n, dtype="bf16") for n in WIDTHS]
    tall = [Layer(m, 1024, 1024, dtype="bf16") for m in ROWS]
    parts += [
        "### Width and rows, one GPU, predicted: note, layer, gelu, bf16",
        growth_table(wide, gpu),
        growth_table(tall, gpu),
        "### Depth, GPU, predicted: bytes saved a layer over those of y, 4096 x 1024, bf16",
        memory_table("cuda"),
        "### GPUs, predicted: a step on 65536 rows in all, note, layer, gelu, bf16",
        parallel_table(gpu),
    ]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    args = parser.parse_args(arguments)
    part = render({device: load(path) for device, path in newest(RESULTS).items()})
    print(part)
    if args.write:
        PAGE.write_text(replace_part(PAGE, MARKERS, f"\n{part}\n"), encoding="utf-8")
        print(f"Written: {PAGE}", file=sys.stderr)
    return 0
