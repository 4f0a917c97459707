"""Measurements held against the goals, and where fused loses."""

from __future__ import annotations

from typing import Any

from .cases import product_dtype
from .goals import GOALS, LOST, PEAK, SAVED, Goal

Row = dict[str, Any]
FAST = 0.5  # of the product in fp32: what is fast for the goals of another dtype
BYTES = {SAVED: "saved_bytes", PEAK: "peak_bytes"}


def losses(rows: list[Row]) -> list[str]:
    """Where fused is slower than eager or torch.compile by more than noise."""
    lost = [(row, n, row["ratios"][n]) for row in rows for n in row["slower_than"]]
    return [
        f"{row['case']} {row['dtype']}, {row['mode']}: {name} takes {r['median']:.2f} of "
        f"fused's time ({r['q1']:.2f} to {r['q3']:.2f})"
        for row, name, r in lost
        if name != "functional"
    ]


def value(row: Row, pair: str) -> dict[str, float] | None:
    """What `row` tells of a goal's pair, with quartiles; None if one of the two is missing."""
    if pair in BYTES:
        found = row.get(BYTES[pair])
        return found and dict.fromkeys(("median", "q1", "q3"), found["fused"] / found["eager"])
    above, _, below = pair.partition(" / ")
    if not below:
        return row["times_us"].get(above)
    ratio = row["ratios"].get(above if below == "fused" else below)
    if ratio is None or below == "fused":
        return ratio
    return {"median": 1 / ratio["median"], "q1": 1 / ratio["q3"], "q3": 1 / ratio["q1"]}


def judge(results: Row) -> list[Row]:
    """Each goal that this machine has, for each of its rows: the value, and whether it is met. None
    is not measured or, beside a value, disturbed by other processes.
    """
    rows, judged = results["rows"], []
    by_task = {(row["case"], row["dtype"], row["mode"]): row for row in rows}
    for goal in GOALS[results["device"]]:
        if goal.pair == LOST:
            calm = [bool(losses([row])) for row in rows if row["calm"]]
            spread = dict.fromkeys(("median", "q1", "q3"), sum(calm)) if calm else None
            judged.append(_verdict(goal, f"of {len(calm)} rows", spread))
        for task in goal.tasks if _applies(goal, results) else ():
            row = by_task.get((task.case.name, task.dtype, task.mode))
            found = row and value(row, goal.pair)
            calm = goal.pair in BYTES or bool(row and row["calm"])
            judged.append(_verdict(goal, str(task), found, calm))
    return judged


def _applies(goal: Goal, results: Row) -> bool:
    if goal.fast is None:
        return True
    rates = results["ceilings"]["matmul_tflop_per_s"]
    found = {rates[product_dtype(task.dtype)] >= FAST * rates["fp32"] for task in goal.tasks}
    return found == {goal.fast}


def _verdict(goal: Goal, row: str, found: dict[str, float] | None, calm: bool = True) -> Row:
    told: Row = {"goal": goal.what, "row": row, "value": found and found["median"]}
    told["quartiles"] = [found["q1"], found["q3"]] if found else []
    for name, met, bound in (("bound", "met", goal.bound), ("beyond", "passed", goal.beyond)):
        told |= {name: None, met: None}
        if bound is not None:
            told[name] = f"{'>=' if goal.least else '<='} {bound:g}"
            told[met] = goal.reaches(found["median"], bound) if found and calm else None
    return told
