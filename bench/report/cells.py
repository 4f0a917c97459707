"""Rows of a results file, and what stands in a cell of a table about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..measure.cases import BACKWARD_GRAPH, GRAPH, MLP, RECORD, RECORD_GRAPH, STEP

Row = dict[str, Any]

SLOWER = "▼"  # beside a ratio: fused is slower by more than noise
UNMEASURED = "-"
BRIEF_MODES = {
    STEP: "step",
    RECORD: "recording",
    GRAPH: "graph",
    RECORD_GRAPH: "graph, recording",
    BACKWARD_GRAPH: "graph, backward",
}
MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}  # what most users of the device compute in
COMPILED = ("compile", "compile-max")
NAMES = {MLP: "mlp", "layer": "LN", "batch": "BN", "rms": "RMS"}
SAMPLED = 0.25  # of the rows of another dtype
KIB, MIB = 2**10, 2**20


def select(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """Rows whose columns have the wanted values."""
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
    counts = Counter(map(recipe, squares))
    return [row for row in squares if recipe(row) == counts.most_common(1)[0][0]]


def contenders(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["ratios"]))


def strongest(row: Row, names: Iterable[str]) -> str | None:
    """The fastest of the named contenders that ran, None where none did."""
    ran = [name for name in names if name in row["ratios"]]
    return min(ran, key=lambda name: row["ratios"][name]["median"], default=None)


# Cells.


def brief(mode: str) -> str:
    return BRIEF_MODES.get(mode, mode)


def recipe(row: Row) -> str:
    """Order, norm and activation, as in `note LN gelu`."""
    words = (NAMES.get(row[key], row[key]) for key in ("order", "norm", "activation"))
    return " ".join(filter(None, words))


def shape(row: Row) -> str:
    """Rows, features and, where they are other, features out."""
    widths = dict.fromkeys((row["features"], row["out_features"]))
    return f"{row['rows']}x{'->'.join(map(str, widths))}"


def digits(value: float | None, form: str = ".2f") -> str:
    return UNMEASURED if value is None else format(value, form)


def microseconds(value: float | None) -> str:
    return digits(value, ".1f" if value is not None and value < 100 else ",.0f")


def time(row: Row) -> str:
    """Fused's median; `~` where other processes disturbed the measurement."""
    return "~" * (not row["calm"]) + microseconds(row["times_us"]["fused"]["median"])


def ratio(row: Row | None, *names: str) -> str:
    """The strongest named contender's time over fused's."""
    name = strongest(row, names) if row else None
    if row is None or name is None:
        return UNMEASURED
    return digits(row["ratios"][name]["median"]) + SLOWER * (name in row["slower_than"])


def share(row: Row, key: str) -> str:
    """Fused's bytes as a part of eager's."""
    found = row.get(key)
    return digits(found["fused"] / found["eager"] if found and found["eager"] else None)


def short(value: float) -> str:
    """At least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sizes(fused: int, eager: int) -> str:
    """In the unit that suits eager's, as in `12 / 24 MiB`."""
    unit, name = (MIB, "MiB") if eager >= 1000 * KIB else (KIB, "KiB")
    return f"{short(fused / unit)} / {short(eager / unit)} {name}"


def pair(found: dict[str, Any] | None, form: str = ",.0f", unit: float = 1.0) -> str:
    """Fused's value and eager's, as in `1 / 4`."""
    values = [(found or {}).get(name) for name in ("fused", "eager")]
    return " / ".join(digits(None if v is None else v / unit, form) for v in values)
