"""What all pictures share: size, colours, and bars that lie one below the other."""

from __future__ import annotations

from typing import Any

WIDTH = 8.5  # inches
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
STYLE: Any = {"font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 10.5}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


def panels(height: float, columns: int, rows: int = 1, **options: Any) -> Any:
    """A figure and its axes as a grid."""
    import matplotlib.pyplot as plt

    size = (WIDTH, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def bars(axis: Any, values: list[float], colours: list[str], height: float) -> Any:
    """One bar a line."""
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    return axis.barh(range(len(values)), values, color=colours, height=height)
