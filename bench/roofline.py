"""The roofline picture: what layers reach below the ceilings measured in the same run."""

from __future__ import annotations

from typing import Any

from .cases import GRAPH, INFERENCE, STEP
from .cells import Row, select, short, well_measured
from .figure import BLUE, GREEN, GREY, INK, ORANGE, panels
from .section import Results

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
    dtypes = [dtype for dtype in COLOURS if select(found, dtype=dtype)]
    peaks = {dtype: results["ceilings"]["matmul_tflop_per_s"][dtype] for dtype in dtypes}
    unit, scale = ("TFLOP/s", 1.0) if max(peaks.values()) >= 1 else ("GFLOP/s", 1e3)
    forward = GRAPH if select(found, mode=GRAPH) else INFERENCE
    figure, axes = panels(4.2, len(dtypes), sharey=True)
    everything = [*map(_point, found), *((1e3 * peak / copy, peak) for peak in peaks.values())]
    x_limits, y_limits = (_around(values) for values in zip(*everything, strict=True))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.set(xscale="log", yscale="log", xlim=x_limits, ylim=y_limits)
        axis.set_xlabel("FLOP a byte of inputs and outputs")
        told = f"matmul {short(scale * peaks[dtype])} {unit}, copy {short(copy)} GB/s"
        axis.set_title(f"{dtype}: {told}" if len(dtypes) < 3 else f"{dtype}\n{told}", size=9)
        _ticks(axis, scale)
        knee = 1e3 * peaks[dtype] / copy  # FLOP a byte
        left, right = x_limits
        roof = [left * copy * 1e-3, peaks[dtype], peaks[dtype]]
        axis.plot([left, knee, right], roof, color=INK, lw=1.5)
        _points(axis, select(found, dtype=dtype), forward, COLOURS[dtype])
    axes[0][0].set_ylabel(f"{unit} of fused")
    figure.suptitle(
        "Layers below the ceilings of the same run; above the slope: data from caches\n"
        f"circles: models, squares: square layers; filled: {forward}, hollow: {STEP}"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _names(figure, axis, select(found, dtype=dtype), forward)
    return figure


def _point(row: Row) -> tuple[float, float]:
    """FLOP a byte, TFLOP/s."""
    return row["flops"] / row["bytes"], row["tflop_per_s"]


def _around(values: tuple[float, ...]) -> tuple[float, float]:
    return min(values) / MARGIN, max(values) * MARGIN


def _ticks(axis: Any, scale: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side, factor in ((axis.xaxis, 1.0), (axis.yaxis, scale)):
        low, high = side.get_view_interval()
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        side.set_major_formatter(FuncFormatter(lambda value, _, f=factor: f"{f * value:,.4g}"))
        side.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)


def _points(axis: Any, found: list[Row], forward: str, colour: str) -> None:
    for group, marker in MARKERS.items():
        for mode, inside in ((forward, colour), (STEP, "white")):
            points = [_point(row) for row in select(found, group=group, mode=mode)]
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, marker, ms=4.5, mew=1, color=colour, mfc=inside)


def _names(figure: Any, axis: Any, found: list[Row], forward: str) -> None:
    """Names of as many models as there is room for."""
    figure.draw_without_rendering()
    drawn = [row for row in found if row["mode"] in (forward, STEP)]
    spots = axis.transData.transform([_point(row) for row in drawn]) if drawn else []
    roof = axis.lines[0].get_path().transformed(axis.transData)
    whole = axis.get_window_extent()
    taken: list[Any] = []
    for row in select(found, group="model", mode=forward):
        style: Any = {"textcoords": "offset points", "size": 7, "color": GREY}
        text = axis.annotate(row["case"], _point(row), (5, -2.5), **style)
        box = text.get_window_extent(figure.canvas.get_renderer())
        hit = any(box.x0 < x < box.x1 + 5 and box.y0 - 5 < y < box.y1 + 5 for x, y in spots)
        if (
            hit
            or box.count_overlaps(taken)
            or box.x1 > whole.x1
            or roof.intersects_bbox(box, False)
        ):
            text.remove()
        else:
            taken.append(box)
