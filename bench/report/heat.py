"""The picture of speed-up over eager torch: square layers, by width and number of rows."""

from __future__ import annotations

import math
from typing import Any

from ..measure.cases import DTYPES, GRAPH, INFERENCE, STEP
from ..measure.results_file import Results
from .figure import INK, ORANGE, PALE, panels
from .rows import Row, distinct, select, sweep, well_measured
from .tables import recipe

MODES = (INFERENCE, GRAPH, STEP)
NARROW = 14  # cells a line of panels, from which on the text in them is small


def rows(results: Results) -> list[Row]:
    found = [row for row in sweep(results["rows"]) if "eager" in row["ratios"]]
    return well_measured([row for row in found if row["mode"] in MODES])


def draw(results: Results) -> Any:
    found = rows(results)
    modes = [mode for mode in MODES if select(found, mode=mode)]
    dtypes = [dtype for dtype in DTYPES if select(found, dtype=dtype)]
    widths, counts = (sorted(distinct(found, key)) for key in ("features", "rows"))
    height = 1.0 + len(dtypes) * (0.3 + 0.32 * len(counts))
    figure, axes = panels(height, len(modes), len(dtypes), sharex=True, sharey=True)
    size = 9 if len(modes) * len(widths) < NARROW else 7
    limit = max([0.5, *(abs(_log(row)) for row in found)])
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, mode in zip(line, modes, strict=True):
            _panel(axis, select(found, dtype=dtype, mode=mode), widths, counts, limit, size)
            axis.set_title(f"{mode}, {dtype}")
        line[0].set_ylabel("rows of x")
    for axis in axes[-1]:
        axis.set_xlabel("width N = K")
    figure.suptitle(
        f"Speed-up over eager torch ({recipe(found[0])}): eager's time / fused's\n"
        "above 1 fused is faster; framed: slower by more than noise; hatched: not measured"
    )
    return figure


def _log(row: Row) -> float:
    return math.log2(row["ratios"]["eager"]["median"])


def _panel(
    axis: Any, found: list[Row], widths: list[int], counts: list[int], limit: float, size: int
) -> None:
    from matplotlib.patches import Rectangle

    values = [[math.nan] * len(widths) for _ in counts]
    for row in found:
        x, y = widths.index(row["features"]), counts.index(row["rows"])
        values[y][x] = _log(row)
        style = {"ha": "center", "va": "center", "size": size}
        style["color"] = "white" if abs(values[y][x]) > 0.5 * limit else INK
        axis.text(x, y, f"{row['ratios']['eager']['median']:.2f}", **style)
        if "eager" in row["slower_than"]:
            frame = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, ec=ORANGE, lw=1.5)
            axis.add_patch(frame)
    whole = (-0.5, -0.5), len(widths), len(counts)
    axis.add_patch(Rectangle(*whole, fill=False, ec=PALE, hatch="////", lw=0, zorder=-1))
    axis.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    short = [f"{w // 1024}k" if w % 1024 == 0 else str(w) for w in widths]
    axis.set_xticks(range(len(widths)), short, size=size)
    axis.set_yticks(range(len(counts)), [f"{c:,}" for c in counts])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
