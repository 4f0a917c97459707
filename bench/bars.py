"""The pictures of memory and of host time."""

from __future__ import annotations

import math
from typing import Any

from .cases import STEP
from .cells import MAIN_DTYPE, Row, recipe, select, shape, sizes
from .figure import BLUE, GREY, INK, ORANGE, PALE, panels
from .section import Results

SHORT = 0.12  # of eager's bytes: a bar that has no room for its number


def memory_rows(results: Results) -> list[Row]:
    dtype = MAIN_DTYPE[results["device"]]
    found = select(results["rows"], group="model", dtype=dtype, mode=STEP)
    return [row for row in found if row.get("saved_bytes") and row.get("peak_bytes")]


def memory(results: Results) -> Any:
    """Fused's saved and peak bytes as parts of eager's."""
    found = memory_rows(results)[::-1]
    figure, axes = panels(1.15 + 0.21 * len(found), 2, sharey=True)
    titles = {"saved_bytes": "kept for backward", "peak_bytes": "peak of forward + backward"}
    parts = {key: [_part(row[key]) for row in found] for key in titles}
    right = max(1.0, *(part for line in parts.values() for part in line if not math.isnan(part)))
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        _bars(axis, parts[key], [sizes(**row[key]) for row in found], right)
        axis.set_title(title)
    labels = [f"{row['case']}  ({recipe(row)})" for row in found]
    axes[0][0].set_yticks(range(len(found)), labels)
    dtype = MAIN_DTYPE[results["device"]]
    more = "; orange: more than eager" * (right > 1)
    figure.suptitle(f"Memory of fused (blue) as a part of eager's (grey), {dtype}{more}")
    return figure


def _part(found: dict[str, int]) -> float:
    return found["fused"] / found["eager"] if found["eager"] else math.nan


def _bars(axis: Any, parts: list[float], told: list[str], right: float) -> None:
    axis.barh(range(len(parts)), 1, color=PALE, height=0.8)
    colours = [ORANGE if part > 1 else BLUE for part in parts]
    axis.barh(range(len(parts)), parts, color=colours, height=0.8)
    for at, (part, text) in enumerate(zip(parts, told, strict=True)):
        start, colour = (0.02, "white") if part > SHORT else (part + 0.02, INK)
        axis.text(start, at, f"{part:.2f}", size=8, va="center", color=colour)
        axis.text(right + 0.02, at, text, size=8, va="center", color=GREY)
    axis.axvline(1, color=INK, lw=0.8)
    axis.set(xlabel="fused / eager", xlim=(0, right), ylim=(-0.6, len(parts) - 0.4))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def host_rows(results: Results) -> list[Row]:
    return [row for row in select(results["rows"], group="host") if row.get("host_us")]


def host(results: Results) -> Any:
    """Microseconds a call takes the host, by contender."""
    found = host_rows(results)
    names = sorted(found[0]["host_us"], key=found[0]["host_us"].__getitem__, reverse=True)
    figure, axes = panels(1.15 + 0.22 * len(names), len(found), sharey=True)
    for axis, row in zip(axes[0], found, strict=True):
        values = [row["host_us"].get(name, math.nan) for name in names]
        colours = [BLUE if name == "fused" else "#a6a6a6" for name in names]
        axis.bar_label(axis.barh(names, values, color=colours, height=0.75), fmt="%.0f", padding=3)
        most = max(row["host_us"].values())
        axis.set(title=row["mode"], xlabel="µs a call", xlim=(0, 1.2 * most))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    figure.suptitle(f"Host time of a call: nothing to compute, x is {shape(found[0])}")
    return figure
