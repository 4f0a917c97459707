"""Every row of a results file with everything that was measured, as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cells import (
    MIB,
    SLOWER,
    Row,
    contenders,
    digits,
    distinct,
    microseconds,
    pair,
    percent,
    ratio,
    recipe,
    select,
    shape,
    time,
)
from .tables import Table

QUARTILES = ("q1", "q3")

Column = tuple[str, Callable[[Row], str]]
COLUMNS: tuple[Column, ...] = (
    ("layer", lambda row: row["case"]),
    ("recipe", recipe),
    ("rows x width", shape),
    ("dtype", lambda row: row["dtype"]),
    ("mode", lambda row: row["mode"]),
    ("backend", lambda row: row["backend"]),
    ("fused, us", time),
    ("quartiles", lambda row: _quartiles(row["times_us"]["fused"])),
)
MORE_COLUMNS: tuple[Column, ...] = (
    ("GB/s", lambda row: digits(row.get("gb_per_s"), ",.1f")),
    ("of copy", lambda row: percent(row.get("copy_share"))),
    ("TFLOP/s", lambda row: digits(row.get("tflop_per_s"), ".3g")),
    ("of matmul", lambda row: percent(row.get("matmul_share"))),
    ("saved, MiB: fused / eager", lambda row: _mebibytes(row, "saved_bytes")),
    ("peak, MiB", lambda row: _mebibytes(row, "peak_bytes")),
    ("launches", lambda row: pair(row.get("launches"))),
    ("host, us", lambda row: pair(row.get("host_us"), "{:.1f}")),
    ("rounds", lambda row: str(row["rounds"])),
)


def _quartiles(found: dict[str, float]) -> str:
    return " to ".join(microseconds(found[q]) for q in QUARTILES)


def _mebibytes(row: Row, key: str) -> str:
    found = row.get(key)
    return pair(found and {name: b / MIB for name, b in found.items()}, "{:,.2f}")


def full_tables(results: dict[str, Any]) -> list[Table]:
    """One table a group; columns that no row has are left out."""
    rows = results["rows"]
    return [_full(group, select(rows, group=group)) for group in distinct(rows, "group")]


def _full(group: str, rows: list[Row]) -> Table:
    ratios = [(f"x {name}", lambda row, name=name: ratio(row, name)) for name in contenders(rows)]
    columns: list[Column] = [*COLUMNS, *ratios, *MORE_COLUMNS]
    body = [[cell(row) for _, cell in columns] for row in rows]
    return Table(f"Every row: {group}", [name for name, _ in columns], body, left=6).told()


def goal_tables(results: dict[str, Any]) -> list[Table]:
    """The verdicts of `make gpu-check`, where the file holds them."""
    verdicts = {True: "met", False: f"missed {SLOWER}", None: "not measured"}
    body = [
        [goal["goal"], goal["row"], goal["bound"], digits(goal["value"]), verdicts[goal["met"]]]
        for goal in results.get("goals", [])
    ]
    head = ["goal", "row", "bound", "found", "verdict"]
    return [Table("Goals", head, body, left=2)] if body else []
