"""The goals of a results file as a table."""

from __future__ import annotations

from .tables import UNMEASURED, Row, Table, digits

VERDICTS = {True: "met", False: "MISSED", None: "not measured"}
DISTURBED = "disturbed"  # measured beside other processes, so not judged


def goal_table(
    judged: list[Row], full: bool = False, foretold: dict[tuple[str, str], float] | None = None
) -> Table:
    """A line a goal, with its worst row; `full`: a line a row, with what was predicted for it."""
    if full:
        head = ["goal", "row", "bound", "beyond", "predicted", "found", "quartiles", "verdict"]
        told = [digits((foretold or {}).get((g["goal"], g["row"])), ".2f") for g in judged]
        body = [
            [g["goal"], g["row"], *_bounds(g), before, *_found(g), verdict(g)]
            for g, before in zip(judged, told, strict=True)
        ]
        return Table("Every goal", head, body, left=4)
    goals: dict[tuple[str, str], list[Row]] = {}
    for row in judged:
        goals.setdefault((row["goal"], row["bound"]), []).append(row)
    head = ["goal", "worst row", "bound", "beyond", "found", "quartiles", "met", "beyond"]
    note = "how many of its rows meet a goal, and what would be better still"
    return Table("Goals", head, [_line(rows) for rows in goals.values()], left=4, note=note)


def verdict(judged: Row) -> str:
    disturbed = judged["met"] is None and judged["value"] is not None
    return DISTURBED if disturbed else VERDICTS[judged["met"]]


def _line(rows: list[Row]) -> list[str]:
    counted = [row for row in rows if row["met"] is not None]
    sign = 1 if rows[0]["bound"].startswith(">=") else -1
    worst = min(counted, key=lambda row: sign * row["value"], default=None)
    name = worst["row"] if worst else verdict(max(rows, key=lambda row: row["value"] is not None))
    found = _found(worst) if worst else [UNMEASURED] * 2
    met = [_count([row[key] for row in counted]) for key in ("met", "passed")]
    return [rows[0]["goal"], name, *_bounds(rows[0]), *found, *met]


def _bounds(judged: Row) -> list[str]:
    return [judged["bound"], judged["beyond"] or UNMEASURED]


def _found(judged: Row) -> list[str]:
    if judged["value"] is None:
        return [UNMEASURED] * 2
    form = "d" if isinstance(judged["value"], int) else ".2f"
    ends = dict.fromkeys(digits(end, form) for end in judged["quartiles"])
    return [digits(judged["value"], form), "-".join(ends)]


def _count(found: list[bool | None]) -> str:
    known = [each for each in found if each is not None]
    return f"{sum(known)} of {len(known)}" if known else UNMEASURED
