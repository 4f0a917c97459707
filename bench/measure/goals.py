"""The goals for a GPU, and the rows that tell whether they are met.

The yardstick T is the bare product by cuBLAS on the same tensors: x @ weight.T for the forward
pass, dy @ weight and dy.T @ x for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import BACKWARD_GRAPH, GRAPH, RECORD, RECORD_GRAPH, STEP, TINY, Task, square

TALL, SHORT = 65536, 256  # rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """For each of `tasks`, the ratio `pair` is at most `bound`; with `least`, at least."""

    what: str
    pair: str
    bound: float
    tasks: tuple[Task, ...]
    least: bool = False

    @property
    def told(self) -> str:
        return f"{'>=' if self.least else '<='} {self.bound:g}"

    def met(self, value: float) -> bool:
        """To two digits, which is what a measurement is worth."""
        value = round(value, 2)
        return value >= self.bound if self.least else value <= self.bound


def wide(mode: str, *features: int, rows: int = TALL) -> tuple[Task, ...]:
    return tuple(Task(square(rows, n), "bf16", mode) for n in features)


NARROW = (256, 128, 64)
SMALL = (1024, 512, 256, 128, 64)
BATCH = Task(square(4096, 1024, norm="batch"), "bf16", RECORD_GRAPH)
MEMORY = Task(square(TALL, 1024), "bf16", STEP)
HOSTS = tuple(Task(TINY, "fp32", mode) for mode in (RECORD, STEP))
OF_PRODUCT, OF_EAGER, SAVED = "fused / matmul", "eager / fused", "saved, fused / eager"
GOALS = (
    Goal("forward / T", OF_PRODUCT, 1.05, wide(GRAPH, 4096)),
    Goal("forward / T", OF_PRODUCT, 1.07, wide(GRAPH, 2048)),
    Goal("forward / T", OF_PRODUCT, 1.12, wide(GRAPH, 1024)),
    Goal("forward / T", OF_PRODUCT, 1.20, wide(GRAPH, 512)),
    Goal("forward / T", OF_PRODUCT, 1.15, wide(GRAPH, *NARROW)),
    Goal("eager / forward", OF_EAGER, 2.8, wide(GRAPH, 512), least=True),
    Goal("eager / forward", OF_EAGER, 3.8, wide(GRAPH, *NARROW), least=True),
    Goal("copy / forward", "copy / fused", 0.85, wide(GRAPH, *NARROW), least=True),
    Goal("forward / T", OF_PRODUCT, 1.3, wide(GRAPH, *SMALL, rows=SHORT)),
    Goal("eager / forward", OF_EAGER, 3.0, wide(GRAPH, *SMALL, rows=SHORT), least=True),
    Goal("erf / tanh GELU", "fused / gelu_tanh", 1.03, wide(GRAPH, 1024, 512)),
    Goal("training / inference", "training / fused", 1.05, wide(GRAPH, 4096, 2048, 1024)),
    Goal("backward / T", OF_PRODUCT, 1.12, wide(BACKWARD_GRAPH, 4096)),
    Goal("backward / T", OF_PRODUCT, 1.20, wide(BACKWARD_GRAPH, 2048)),
    Goal("backward / T", OF_PRODUCT, 1.40, wide(BACKWARD_GRAPH, 1024)),
    Goal("eager / backward", OF_EAGER, 3.0, wide(BACKWARD_GRAPH, 128, 64), least=True),
    Goal("eager / backward", OF_EAGER, 2.2, wide(BACKWARD_GRAPH, 256), least=True),
    Goal("eager / backward", OF_EAGER, 2.0, wide(BACKWARD_GRAPH, 512), least=True),
    Goal("eager / batch norm training", OF_EAGER, 2.0, (BATCH,), least=True),
    Goal("host time, forward", "fused / eager", 0.6, HOSTS[:1]),
    Goal("host time, both", "fused / eager", 0.55, HOSTS[1:]),
    Goal("activation memory", SAVED, 0.5, (MEMORY,)),
)


def tasks() -> list[Task]:
    """Every row once, the most telling first: when time runs out, the last ones are left out."""
    first = [*wide(GRAPH, 1024), *wide(BACKWARD_GRAPH, 1024), *HOSTS, MEMORY, BATCH]
    of_goals = [task for goal in GOALS for task in goal.tasks]
    orders = [
        Task(square(rows, 1024, order), "bf16", mode)
        for order in ("prenorm", "preact")
        for mode, rows in ((GRAPH, TALL), (BACKWARD_GRAPH, TALL), (GRAPH, SHORT))
    ]
    rest = wide(BACKWARD_GRAPH, 1024, 256, rows=SHORT)
    return list(dict.fromkeys([*first, *of_goals, *orders, *rest]))


def value(row: Row, pair: str) -> float | None:
    """What `row` tells of a goal's ratio; None if one of the two was not measured."""
    if pair == SAVED:
        found = row.get("saved_bytes")
        return found["fused"] / found["eager"] if found else None
    above, below = pair.split(" / ")
    ratio = row["ratios"].get(above if below == "fused" else below)
    return ratio and (ratio["median"] if below == "fused" else 1 / ratio["median"])


def judge(rows: list[Row]) -> list[Row]:
    """Each goal for each of its rows: the value, and whether it is met; None: not measured."""
    by_task = {(row["case"], row["dtype"], row["mode"]): row for row in rows}
    judged = []
    for goal in GOALS:
        for task in goal.tasks:
            row = by_task.get((task.case.name, task.dtype, task.mode))
            found = row and value(row, goal.pair)
            met = None if found is None else goal.met(found)
            verdict = {"goal": goal.what, "row": str(task), "bound": goal.told}
            judged.append(verdict | {"value": found, "met": met})
    return judged
