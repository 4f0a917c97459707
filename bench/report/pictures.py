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
from . import drawings
from .section import source

DPI = 200
COLOURS = 128  # of the palette: a third of the bytes
STAMP = "Source"  # the PNG text chunk with the digest of what was drawn


class Picture(NamedTuple):
    name: str
    alt: str
    rows: Callable[[Results], list[Any]]
    draw: Callable[[Results], Any]


PICTURES = (
    Picture(
        "speedup", "Speed-up over eager torch by width and batch", drawings.heat_rows, drawings.heat
    ),
    Picture(
        "memory", "Memory of fused as a part of eager's", drawings.memory_rows, drawings.memory
    ),
    Picture(
        "roofline", "Layers below the measured ceilings", drawings.roofline_rows, drawings.roofline
    ),
    Picture("host", "Host time of a call by contender", drawings.host_rows, drawings.host),
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
    with matplotlib.rc_context(drawings.STYLE):
        for path, picture in paths.items():
            figure = picture.draw(results)
            figure.supxlabel(
                source(results, brief=True), fontsize=7, color=drawings.STYLE["axes.edgecolor"]
            )
            figure.savefig(buffer := io.BytesIO(), dpi=DPI, facecolor="white")
            pyplot.close(figure)
            with Image.open(buffer) as image:
                image.convert("RGB").quantize(COLOURS).save(path, pnginfo=info, optimize=True)
    return list(paths)


def digest(results: Results) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def stamp(path: Path) -> str | None:
    """The digest of the results a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(STAMP)
