"""The roofline picture: what layers reach below the ceilings measured in the same run."""

from __future__ import annotations

from typing import Any

from ..measure.cases import GRAPH, INFERENCE, STEP
from ..measure.results_file import Results
from .figure import BLUE, GREEN, GREY, INK, ORANGE, panels
from .rows import Row, select, well_measured
from .tables import short

COLOURS = {"fp32": BLUE, "bf16": ORANGE, "fp16": GREEN}
MARKERS = {"model": "o", "square": "s"}
MARGIN = 1.6  # around the points, as a factor


def rows(results: Results) -> list[Row]:
    limits = results["ceilings"]
    peaks = limits.get("matmul_tflop_per_s", {}) if limits.get("copy_gb_per_s") else {}
    found = [row for row in results["rows"] if row["group"] in MARKERS and row.get("tflop_per_s")]
    return well_measured([row for row in found if peaks.get(row["dtype"])])


def draw(results: Results) -> Any:
    found, copy = rows(results), results["ceilings"]["copy_gb_per_s"]
    by_dtype = {d: of_it for d in COLOURS if (of_it := select(found, dtype=d))}
    peaks = {dtype: results["ceilings"]["matmul_tflop_per_s"][dtype] for dtype in by_dtype}
    knees = {dtype: 1e3 * peak / copy for dtype, peak in peaks.items()}  # FLOP a byte
    unit, scale = ("TFLOP/s", 1.0) if max(peaks.values()) >= 1 else ("GFLOP/s", 1e3)
    forward = GRAPH if select(found, mode=GRAPH) else INFERENCE
    figure, axes = panels(4.2, len(peaks), sharey=True)
    points = [*map(_point, found), *((knees[dtype], peaks[dtype]) for dtype in peaks)]
    limits = [(min(values) / MARGIN, max(values) * MARGIN) for values in zip(*points, strict=True)]
    left, right = limits[0]
    for axis, (dtype, peak) in zip(axes[0], peaks.items(), strict=True):
        axis.set(xscale="log", yscale="log", xlim=limits[0], ylim=limits[1])
        axis.set_xlabel("FLOP a byte of inputs and outputs")
        told = f"matmul {short(scale * peak)} {unit}, copy {short(copy)} GB/s"
        axis.set_title(f"{dtype}: {told}" if len(peaks) < 3 else f"{dtype}\n{told}", size=9)
        _ticks(axis, scale)
        roof = [left * copy * 1e-3, peak, peak]
        axis.plot([left, knees[dtype], right], roof, color=INK, lw=1.5)
        for group, marker in MARKERS.items():
            for mode, inside in ((forward, COLOURS[dtype]), (STEP, "white")):
                spots = [_point(row) for row in select(by_dtype[dtype], group=group, mode=mode)]
                x, y = zip(*spots, strict=True) if spots else ((), ())
                axis.plot(x, y, marker, ms=4.5, mew=1, color=COLOURS[dtype], mfc=inside)
    axes[0][0].set_ylabel(f"{unit} of fused")
    figure.suptitle(
        "Layers below the ceilings of the same run; above the slope: data from caches\n"
        f"circles: models, squares: square layers; filled: {forward}, hollow: {STEP}"
    )
    for axis, of_it in zip(axes[0], by_dtype.values(), strict=True):
        _names(figure, axis, of_it, forward)
    return figure


def _point(row: Row) -> tuple[float, float]:
    """FLOP a byte, TFLOP/s."""
    return row["flops"] / row["bytes"], row["tflop_per_s"]


def _ticks(axis: Any, scale: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side, factor in ((axis.xaxis, 1.0), (axis.yaxis, scale)):
        low, high = side.get_view_interval()
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        side.set_major_formatter(FuncFormatter(lambda value, _, f=factor: f"{f * value:,.4g}"))
        side.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)


def _names(figure: Any, axis: Any, found: list[Row], forward: str) -> None:
    """Names of as many models as there is room for."""
    figure.draw_without_rendering()
    drawn = [row for row in found if row["mode"] in (forward, STEP)]
    spots = axis.transData.transform([_point(row) for row in drawn]) if drawn else []
    roof = axis.lines[0].get_path().transformed(axis.transData)
    right, taken = axis.get_window_extent().x1, []
    style: Any = {"textcoords": "offset points", "size": 7, "color": GREY}
    for row in select(found, group="model", mode=forward):
        text = axis.annotate(row["case"], _point(row), (5, -2.5), **style)
        box = text.get_window_extent(figure.canvas.get_renderer())
        hit = any(box.x0 < x < box.x1 + 5 and box.y0 - 5 < y < box.y1 + 5 for x, y in spots)
        outside = box.x1 > right or roof.intersects_bbox(box, False)
        if hit or outside or box.count_overlaps(taken):
            text.remove()
        else:
            taken.append(box)
