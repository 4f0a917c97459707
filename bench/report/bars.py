"""The pictures of memory and of host time."""

from __future__ import annotations

import math
from typing import Any

from ..measure.cases import STEP
from ..measure.results_file import Results
from .figure import BLUE, GREY, INK, ORANGE, PALE, bars, panels
from .rows import MAIN_DTYPE, Row, select
from .tables import recipe, shape, sizes

SHORT = 0.12  # of eager's bytes: a bar that has no room for its number
TITLES = {"saved_bytes": "kept for backward", "peak_bytes": "peak of forward + backward"}
OTHERS = "#a6a6a6"


def memory_rows(results: Results) -> list[Row]:
    dtype = MAIN_DTYPE[results["device"]]
    found = select(results["rows"], group="model", dtype=dtype, mode=STEP)
    return [row for row in found if row.get("saved_bytes") and row.get("peak_bytes")]


def memory(results: Results) -> Any:
    """Fused's saved and peak bytes as parts of eager's."""
    found = memory_rows(results)[::-1]
    figure, axes = panels(1.15 + 0.21 * len(found), 2, sharey=True)
    parts = {
        key: [row[key]["fused"] / (row[key]["eager"] or math.nan) for row in found]
        for key in TITLES
    }
    right = max(1.0, *(part for line in parts.values() for part in line if not math.isnan(part)))
    for axis, (key, title) in zip(axes[0], TITLES.items(), strict=True):
        bars(axis, [1.0] * len(found), [PALE], 0.8)
        bars(axis, parts[key], [ORANGE if part > 1 else BLUE for part in parts[key]], 0.8)
        for at, (row, part) in enumerate(zip(found, parts[key], strict=True)):
            start, colour = (0.02, "white") if part > SHORT else (part + 0.02, INK)
            axis.text(start, at, f"{part:.2f}", size=8, va="center", color=colour)
            axis.text(right + 0.02, at, sizes(**row[key]), size=8, va="center", color=GREY)
        axis.axvline(1, color=INK, lw=0.8)
        axis.set(title=title, xlabel="fused / eager")
        axis.set(xlim=(0, right), ylim=(-0.6, len(found) - 0.4))
    labels = [f"{row['case']}  ({recipe(row)})" for row in found]
    axes[0][0].set_yticks(range(len(found)), labels)
    more = "; orange: more than eager" * (right > 1)
    dtype = MAIN_DTYPE[results["device"]]
    figure.suptitle(f"Memory of fused (blue) as a part of eager's (grey), {dtype}{more}")
    return figure


def host_rows(results: Results) -> list[Row]:
    return [row for row in select(results["rows"], group="host") if row.get("host_us")]


def host(results: Results) -> Any:
    """Microseconds a call takes the host, by contender."""
    found = host_rows(results)
    names = sorted(found[0]["host_us"], key=found[0]["host_us"].__getitem__, reverse=True)
    colours = [BLUE if name == "fused" else OTHERS for name in names]
    figure, axes = panels(1.15 + 0.22 * len(names), len(found), sharey=True)
    for axis, row in zip(axes[0], found, strict=True):
        drawn = bars(axis, [row["host_us"].get(n, math.nan) for n in names], colours, 0.75)
        axis.bar_label(drawn, fmt="%.0f", padding=3)
        most = max(row["host_us"].values())
        axis.set(title=row["mode"], xlabel="µs a call", xlim=(0, 1.2 * most))
    axes[0][0].set_yticks(range(len(names)), names)
    figure.suptitle(f"Host time of a call: nothing to compute, x is {shape(found[0])}")
    return figure
