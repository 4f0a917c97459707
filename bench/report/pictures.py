"""The four pictures, as PNG files: each names its source, and holds a digest that tells when it is
stale.

White behind them, so that they look the same in a dark page; colours that colour-blind readers
tell apart; 8.5 inches at 200 dots are sharp at a page's width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..measure.cases import DTYPES, GRAPH, INFERENCE, STEP
from ..measure.results_file import Results
from .section import source
from .tables import MAIN_DTYPE, Row, distinct, recipe, select, shape, short, sizes, sweep

DPI = 200
PALETTE = 128  # colours: a third of the bytes
STAMP = "Source"  # the PNG text chunk with the digest of what was drawn
WIDTH = 8.5  # inches
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
STYLE: Any = {"font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 10.5}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
MODES = (INFERENCE, GRAPH, STEP)
NARROW = 14  # cells a line of panels, from which on the text in them is small
SHORT = 0.12  # of eager's bytes: a bar that has no room for its number
TITLES = {"saved_bytes": "kept for backward", "peak_bytes": "peak of forward + backward"}
OTHERS = "#a6a6a6"
COLOURS = {"fp32": BLUE, "bf16": ORANGE, "fp16": GREEN}
MARKERS = {"model": "o", "square": "s"}
MARGIN = 1.6  # around the points, as a factor
SAMPLED = 0.25  # of the rows of another dtype


def panels(height: float, columns: int, rows: int = 1, **options: Any) -> Any:
    import matplotlib.pyplot as plt

    size = (WIDTH, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def bars(axis: Any, values: list[float], colours: list[str], height: float) -> Any:
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    return axis.barh(range(len(values)), values, color=colours, height=height)


def well_measured(rows: list[Row]) -> list[Row]:
    """The rows of those dtypes that are not mere samples."""
    counts = Counter(row["dtype"] for row in rows)
    most = max(counts.values(), default=0)
    return [row for row in rows if counts[row["dtype"]] >= SAMPLED * most]


def heat_rows(results: Results) -> list[Row]:
    found = [row for row in sweep(results["rows"]) if "eager" in row["ratios"]]
    return well_measured([row for row in found if row["mode"] in MODES])


def heat(results: Results, found: list[Row]) -> Any:
    modes = [mode for mode in MODES if select(found, mode=mode)]
    dtypes = [dtype for dtype in DTYPES if select(found, dtype=dtype)]
    widths, counts = (sorted(distinct(found, key)) for key in ("features", "rows"))
    height = 1.0 + len(dtypes) * (0.3 + 0.32 * len(counts))
    figure, axes = panels(height, len(modes), len(dtypes), sharex=True, sharey=True)
    size = 9 if len(modes) * len(widths) < NARROW else 7
    limit = max([0.5, *(abs(math.log2(row["ratios"]["eager"]["median"])) for row in found)])
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


def _panel(axis: Any, found: list[Row], widths: Any, counts: Any, limit: float, size: int) -> None:
    from matplotlib.patches import Rectangle

    values = [[math.nan] * len(widths) for _ in counts]
    for row in found:
        x, y = widths.index(row["features"]), counts.index(row["rows"])
        ratio = row["ratios"]["eager"]["median"]
        values[y][x] = math.log2(ratio)
        colour = "white" if abs(values[y][x]) > 0.5 * limit else INK
        axis.text(x, y, f"{ratio:.2f}", ha="center", va="center", size=size, color=colour)
        if "eager" in row["slower_than"]:
            corner = x - 0.46, y - 0.44
            axis.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, ec=ORANGE, lw=1.5))
    whole = (-0.5, -0.5), len(widths), len(counts)
    axis.add_patch(Rectangle(*whole, fill=False, ec=PALE, hatch="////", lw=0, zorder=-1))
    axis.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    short = [f"{w // 1024}k" if w % 1024 == 0 else str(w) for w in widths]
    axis.set_xticks(range(len(widths)), short, size=size)
    axis.set_yticks(range(len(counts)), [f"{c:,}" for c in counts])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def memory_rows(results: Results) -> list[Row]:
    dtype = MAIN_DTYPE[results["device"]]
    found = select(results["rows"], group="model", dtype=dtype, mode=STEP)
    return [row for row in found if all(row.get(key, {}).get("eager") for key in TITLES)]


def memory(results: Results, found: list[Row]) -> Any:
    found, dtype = found[::-1], MAIN_DTYPE[results["device"]]
    figure, axes = panels(1.15 + 0.21 * len(found), 2, sharey=True)
    columns = [[row[key]["fused"] / row[key]["eager"] for row in found] for key in TITLES]
    right = max(1.0, *(part for parts in columns for part in parts))
    for axis, parts, (key, title) in zip(axes[0], columns, TITLES.items(), strict=True):
        bars(axis, [1.0] * len(found), [PALE], 0.8)
        bars(axis, parts, [ORANGE if round(part, 2) > 1 else BLUE for part in parts], 0.8)
        for at, (row, part) in enumerate(zip(found, parts, strict=True)):
            start, colour = (0.02, "white") if part > SHORT else (part + 0.02, INK)
            axis.text(start, at, f"{part:.2f}", size=8, va="center", color=colour)
            axis.text(right + 0.02, at, sizes(**row[key]), size=8, va="center", color=GREY)
        axis.axvline(1, color=INK, lw=0.8)
        axis.set(title=title, xlabel="fused / eager")
        axis.set(xlim=(0, right), ylim=(-0.6, len(found) - 0.4))
    labels = [f"{row['case']}  ({recipe(row)})" for row in found]
    axes[0][0].set_yticks(range(len(found)), labels)
    more = "; orange: more than eager" * (right > 1)
    figure.suptitle(f"Memory of fused (blue) as a part of eager's (grey), {dtype}{more}")
    return figure


def host_rows(results: Results) -> list[Row]:
    return [row for row in select(results["rows"], group="host") if row.get("host_us")]


def host(results: Results, found: list[Row]) -> Any:
    """Microseconds a call takes the host, by contender."""
    names = sorted(found[0]["host_us"], key=found[0]["host_us"].__getitem__, reverse=True)
    colours = [BLUE if name == "fused" else OTHERS for name in names]
    figure, axes = panels(1.15 + 0.22 * len(names), len(found), sharey=True)
    for axis, row in zip(axes[0], found, strict=True):
        drawn = bars(axis, [row["host_us"].get(n, math.nan) for n in names], colours, 0.75)
        axis.bar_label(drawn, fmt="%.0f", padding=3)
        most = max(row["host_us"].values())
        axis.set(title=row["mode"], xlabel="us a call", xlim=(0, 1.2 * most))
    axes[0][0].set_yticks(range(len(names)), names)
    figure.suptitle(f"Host time of a call: nothing to compute, x is {shape(found[0])}")
    return figure


def roofline_rows(results: Results) -> list[Row]:
    limits = results["ceilings"]
    peaks = limits.get("matmul_tflop_per_s", {}) if limits.get("copy_gb_per_s") else {}
    found = [row for row in results["rows"] if row["group"] in MARKERS and row.get("tflop_per_s")]
    return well_measured([row for row in found if peaks.get(row["dtype"])])


def roofline(results: Results, found: list[Row]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    copy = results["ceilings"]["copy_gb_per_s"]
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
        for side, factor in ((axis.xaxis, 1.0), (axis.yaxis, scale)):
            low, high = side.get_view_interval()
            side.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
            side.set_major_formatter(FuncFormatter(lambda value, _, f=factor: f"{f * value:,.4g}"))
            side.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
        roof = [left * copy * 1e-3, peak, peak]
        axis.plot([left, knees[dtype], right], roof, color=INK, lw=1.5)
        for group, marker in MARKERS.items():
            for mode, inside in ((forward, COLOURS[dtype]), (STEP, "white")):
                spots = [_point(row) for row in select(by_dtype[dtype], group=group, mode=mode)]
                x, y = zip(*spots, strict=True) if spots else ((), ())
                axis.plot(x, y, marker, ms=4.5, mew=1, color=COLOURS[dtype], mfc=inside)
    axes[0][0].set_ylabel(f"{unit} of fused")
    figure.suptitle(
        "Layers and the ceilings of torch in the same run; above the slope: data from caches\n"
        f"circles: models, squares: square layers; filled: {forward}, hollow: {STEP}"
    )
    for axis, of_it in zip(axes[0], by_dtype.values(), strict=True):
        _names(figure, axis, of_it, forward)
    return figure


def _point(row: Row) -> tuple[float, float]:
    """FLOP a byte, TFLOP/s."""
    return row["flops"] / row["bytes"], row["tflop_per_s"]


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


class Picture(NamedTuple):
    name: str
    alt: str
    rows: Callable[[Results], list[Row]]
    draw: Callable[[Results, list[Row]], Any]


PICTURES = (
    Picture("speedup", "Speed-up over eager torch by width and batch", heat_rows, heat),
    Picture("memory", "Memory of fused as a part of eager's", memory_rows, memory),
    Picture("roofline", "Layers and the measured ceilings of torch", roofline_rows, roofline),
    Picture("host", "Host time of a call by contender", host_rows, host),
)


def names(results: Results) -> dict[str, Picture]:
    """By file name, the pictures that the results have rows for."""
    return {f"{results['device']}-{p.name}.png": p for p in PICTURES if p.rows(results)}


def links(results: Results, folder: Path) -> str:
    shown = names(results).items()
    return "\n\n".join(f"![{p.alt}]({(folder / name).as_posix()})" for name, p in shown)


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures of one device in place of those that are there."""
    try:
        import matplotlib
        from PIL import Image, PngImagePlugin  # which matplotlib needs
    except ModuleNotFoundError:
        raise SystemExit("bench report: pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    info = PngImagePlugin.PngInfo()
    info.add_text(STAMP, digest(results))
    for old in folder.glob(f"{results['device']}-*.png"):
        old.unlink()
    paths = {folder / name: picture for name, picture in names(results).items()}
    with matplotlib.rc_context(STYLE):
        for path, picture in paths.items():
            figure = picture.draw(results, picture.rows(results))
            figure.supxlabel(source(results, brief=True), fontsize=7, color=STYLE["axes.edgecolor"])
            figure.savefig(buffer := io.BytesIO(), dpi=DPI, facecolor="white")
            pyplot.close(figure)
            with Image.open(buffer) as image:
                image.convert("RGB").quantize(PALETTE).save(path, pnginfo=info, optimize=True)
    return list(paths)


def digest(results: Results) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
