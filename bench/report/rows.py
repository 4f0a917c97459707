"""Rows of a results file: which of them, and who was measured beside fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}  # what most users of the device compute in
SAMPLED = 0.25  # of the rows of another dtype


def select(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def well_measured(rows: list[Row]) -> list[Row]:
    """The rows of those dtypes that are not mere samples."""
    counts = Counter(row["dtype"] for row in rows)
    most = max(counts.values(), default=0)
    return [row for row in rows if counts[row["dtype"]] >= SAMPLED * most]


def sweep(rows: list[Row]) -> list[Row]:
    """The square rows of the recipe that most of them have."""
    squares = select(rows, group="square")
    recipes = [(row["order"], row["norm"], row["activation"]) for row in squares]
    most = Counter(recipes).most_common(1)
    return [row for row, recipe in zip(squares, recipes, strict=True) if recipe == most[0][0]]


def contenders(rows: Iterable[Row], key: str = "ratios") -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def strongest(row: Row, names: Iterable[str]) -> str | None:
    """The fastest of the named contenders that ran, None where none did."""
    ran = [name for name in names if name in row["ratios"]]
    return min(ran, key=lambda name: row["ratios"][name]["median"], default=None)
