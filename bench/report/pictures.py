"""Results as PNG files: each names its source, and holds a digest that tells when it is stale.

White behind them, so that they look the same in a dark page; colours that colour-blind readers
tell apart; 8.5 inches at 200 dots are sharp at README's width.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..measure.results_file import Results
from . import bars, heat, roofline
from .figure import GREY, INK
from .section import source

DPI = 200
COLOURS = 128  # of the palette: a third of the bytes

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
STAMP = "Source"  # the PNG text chunk with the digest of what was drawn


class Picture(NamedTuple):
    """Drawn where a results file has rows for it."""

    name: str
    alt: str
    rows: Callable[[Results], list[Any]]
    draw: Callable[[Results], Any]


PICTURES = (
    Picture("speedup", "Speed-up over eager torch by width and batch", heat.rows, heat.draw),
    Picture("memory", "Memory of fused as a part of eager's", bars.memory_rows, bars.memory),
    Picture("roofline", "Layers below the measured ceilings", roofline.rows, roofline.draw),
    Picture("host", "Host time of a call by contender", bars.host_rows, bars.host),
)


def digest(results: Results) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def _drawn(results: Results) -> dict[str, Picture]:
    """By file name, those that the results have rows for."""
    return {f"{results['device']}-{p.name}.png": p for p in PICTURES if p.rows(results)}


def names(results: Results) -> list[str]:
    return list(_drawn(results))


def links(results: Results, folder: Path) -> str:
    """Markdown that shows the pictures in `folder`."""
    shown = _drawn(results).items()
    return "\n\n".join(f"![{p.alt}]({(folder / name).as_posix()})" for name, p in shown)


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures of one device in place of those that are there."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("bench report: pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for old in folder.glob(f"{results['device']}-*.png"):
        old.unlink()
    drawn = {folder / name: picture for name, picture in _drawn(results).items()}
    with matplotlib.rc_context(STYLE):
        for path, picture in drawn.items():
            figure = picture.draw(results)
            figure.supxlabel(source(results, brief=True), fontsize=7, color=GREY)
            _save(figure, path, digest(results))
            plt.close(figure)
    return list(drawn)


def _save(figure: Any, path: Path, stamped: str) -> None:
    from PIL import Image, PngImagePlugin  # which matplotlib needs

    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(buffer, dpi=DPI, facecolor="white")
    info.add_text(STAMP, stamped)
    with Image.open(buffer) as image:
        palette = image.convert("RGB").quantize(COLOURS)
        palette.save(path, pnginfo=info, optimize=True)


def stamp(path: Path) -> str | None:
    """The digest of the results a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(STAMP)
