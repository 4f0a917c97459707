"""The goals for a GPU, and the rows that tell whether they are met.

The yardstick T is the bare product by cuBLAS on the same tensors: x @ weight.T for the forward
pass, dy @ weight and dy.T @ x for the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .cases import RECORD, STEP, Case
from .measure import NOISE

TALL, SHORT = 65536, 256  # rows
GRAPH_SECONDS = 1e-3
MOST_CALLS = 50

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One row: the contenders of `what` on x (rows, features), in bf16."""

    what: str
    rows: int = TALL
    features: int = 1024
    order: str = "note"
    norm: str = "layer"
    activation: str = "gelu"

    @property
    def name(self) -> str:
        recipe = f"{self.order} {self.norm} {self.activation}"
        return f"{self.what}, {recipe}, M={self.rows} N={self.features}"

    @property
    def case(self) -> Case:
        return Case(self.name, self.rows, self.features, self.order, self.norm, self.activation)

    @property
    def calls(self) -> int:
        """In one graph: about GRAPH_SECONDS by the roofline of an H100."""
        once = max(2 * self.rows * self.features**2 / 6e14, 6 * self.rows * self.features / 3e12)
        return max(1, min(MOST_CALLS, math.ceil(GRAPH_SECONDS / (once + 3e-6))))


@dataclass(frozen=True)
class Goal:
    """For each of `works`, the ratio `pair` is at most `bound`; with `least`, at least."""

    what: str
    pair: str
    bound: float
    works: tuple[Work, ...]
    least: bool = False

    @property
    def told(self) -> str:
        return f"{'>=' if self.least else '<='} {self.bound:g}"

    def met(self, value: float) -> bool:
        """To two digits, which is what a measurement is worth."""
        value = round(value, 2)
        return value >= self.bound if self.least else value <= self.bound


def wide(what: str, *features: int, rows: int = TALL) -> tuple[Work, ...]:
    return tuple(Work(what, rows, n) for n in features)


NARROW = (256, 128, 64)
SMALL = (1024, 512, 256, 128, 64)
BATCH = Work("training", 4096, 1024, norm="batch")
HOST = Work("host", 4, 8, activation="relu")
MEMORY = Work("memory", 16384, 1024)
OF_PRODUCT, OF_EAGER = "fused / product", "eager / fused"
GOALS = (
    Goal("forward / T", OF_PRODUCT, 1.05, wide("forward", 4096)),
    Goal("forward / T", OF_PRODUCT, 1.07, wide("forward", 2048)),
    Goal("forward / T", OF_PRODUCT, 1.12, wide("forward", 1024)),
    Goal("forward / T", OF_PRODUCT, 1.20, wide("forward", 512)),
    Goal("forward / T", OF_PRODUCT, 1.15, wide("forward", *NARROW)),
    Goal("eager / forward", OF_EAGER, 2.8, wide("forward", 512), least=True),
    Goal("eager / forward", OF_EAGER, 3.8, wide("forward", *NARROW), least=True),
    Goal("copy / forward", "copy / fused", 0.85, wide("forward", *NARROW), least=True),
    Goal("forward / T", OF_PRODUCT, 1.3, wide("forward", *SMALL, rows=SHORT)),
    Goal("eager / forward", OF_EAGER, 3.0, wide("forward", *SMALL, rows=SHORT), least=True),
    Goal("erf / tanh GELU", "erf / tanh", 1.03, wide("gelu", 1024, 512)),
    Goal("training / inference", "training / fused", 1.05, wide("forward", 4096, 2048, 1024)),
    Goal("backward / T", OF_PRODUCT, 1.12, wide("backward", 4096)),
    Goal("backward / T", OF_PRODUCT, 1.20, wide("backward", 2048)),
    Goal("backward / T", OF_PRODUCT, 1.40, wide("backward", 1024)),
    Goal("eager / backward", OF_EAGER, 3.0, wide("backward", 128, 64), least=True),
    Goal("eager / backward", OF_EAGER, 2.2, wide("backward", 256), least=True),
    Goal("eager / backward", OF_EAGER, 2.0, wide("backward", 512), least=True),
    Goal("eager / batch norm training", OF_EAGER, 2.0, (BATCH,), least=True),
    Goal("host time, forward", f"fused / eager, {RECORD}", 0.6, (HOST,)),
    Goal("host time, both", f"fused / eager, {STEP}", 0.55, (HOST,)),
    Goal("activation memory", "saved, fused / eager", 0.5, (MEMORY,)),
)
COMPILED = (
    *wide("compiled forward", 1024, 256), *wide("compiled backward", 1024, 256),
    *wide("compiled forward", 1024, rows=SHORT), *wide("compiled forward", 4096, 512, 64),
    *wide("compiled backward", 4096, 512, 64),
)  # fmt: skip


def works() -> list[Work]:
    """Every row once, the most telling first: when time runs out, the last ones are left out."""
    first = [Work("forward"), Work("backward"), HOST, MEMORY, BATCH, *COMPILED[:1], *COMPILED[2:3]]
    of_goals = [work for goal in GOALS for work in goal.works]
    orders = [
        Work(what, rows, order=order)
        for order in ("prenorm", "preact")
        for what, rows in (("forward", TALL), ("backward", TALL), ("forward", SHORT))
    ]
    rest = wide("backward", 1024, 256, rows=SHORT)
    return list(dict.fromkeys([*first, *of_goals, *orders, *rest, *COMPILED]))


def judge(rows: list[Row]) -> list[Row]:
    """Each goal for each of its rows: the value, and whether it is met; None: not measured."""
    by_name = {row["name"]: row for row in rows}
    judged = []
    for goal in GOALS:
        for work in goal.works:
            ratios = by_name.get(work.name, {}).get("ratios", {})
            value = ratios[goal.pair]["median"] if goal.pair in ratios else None
            met = None if value is None else goal.met(value)
            verdict = {"goal": goal.what, "row": work.name, "bound": goal.told}
            judged.append(verdict | {"value": value, "met": met})
    return judged


def slower(rows: list[Row]) -> list[str]:
    """Where fused takes longer than eager or torch.compile, by more than noise."""
    return [
        f"{row['name']}: {pair} = {row['ratios'][pair]['median']:.2f}"
        for row in rows
        for pair in (OF_EAGER, "compile / fused")
        if pair in row["ratios"] and row["ratios"][pair]["median"] < 1 - NOISE
    ]
