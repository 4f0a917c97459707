"""Results as tables: Markdown that reads well in a terminal too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from .cases import INFERENCE, STEP
from .cells import (
    COMPILED,
    MAIN_DTYPE,
    SLOWER,
    UNMEASURED,
    Row,
    brief,
    contenders,
    digits,
    distinct,
    microseconds,
    pair,
    ratio,
    recipe,
    select,
    shape,
    share,
    strongest,
    sweep,
    time,
)


def table(head: list[str], body: list[list[str]], left: int) -> str:
    """Markdown with the first `left` columns left-aligned and the others right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [head, rule, *body]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Table:
    """`left` columns are text, the others numbers."""

    title: str
    head: list[str]
    body: list[list[str]]
    left: int
    note: str = ""

    def told(self) -> Table:
        """Without the columns in which nothing was measured."""
        columns = zip(self.head, *self.body, strict=True)
        kept = [c for c in columns if not self.body or not set(c[1:]) <= {UNMEASURED, pair(None)}]
        head, *body = map(list, zip(*kept, strict=True))
        return replace(self, head=head, body=body)

    def markdown(self) -> str:
        caption = f"**{self.title}**" + (f"; {self.note}" if self.note else "") + ":"
        return f"{caption}\n\n{table(self.head, self.body, self.left)}"


# What README shows.


def summary_table(rows: list[Row]) -> Table:
    """One line a group, mode and dtype: the middle and the ends of its ratios."""
    head = ["rows", "mode", "dtype"]
    for name in ("eager", "compile"):
        head += [f"x {name}", "range", "slower"]
    body = []
    for group in ("model", "square"):
        for mode in distinct(rows, "mode"):
            for dtype in distinct(rows, "dtype"):
                chosen = select(rows, group=group, mode=mode, dtype=dtype)
                line = [f"{group}s", brief(mode), dtype]
                line += [*_spread(chosen, ("eager",)), *_spread(chosen, COMPILED)]
                body += [line] if chosen else []
    return Table("All rows in short", head, body, left=3, note="medians")


def _spread(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    found = [(row, name) for row in rows if (name := strongest(row, names))]
    if not found:
        return [UNMEASURED] * 3
    ratios = [row["ratios"][name]["median"] for row, name in found]
    slower = sum(name in row["slower_than"] for row, name in found)
    ends = f"{digits(min(ratios))}-{digits(max(ratios))}"
    return [digits(median(ratios)), ends, f"{slower} of {len(found)}"]


def forward_table(rows: list[Row], dtype: str) -> Table:
    """One line a layer of a model."""
    body = [
        [row["case"], recipe(row), shape(row), time(row), *_ratios(row)]
        for row in select(rows, group="model", dtype=dtype, mode=INFERENCE)
    ]
    head = ["layer", "recipe", "rows x width", "us", *RATIOS]
    note = "a recipe is order, norm (LN: layer, BN: batch, RMS) and activation"
    return Table(f"Layers of models, {dtype}, forward", head, body, left=3, note=note)


def step_table(rows: list[Row], dtype: str) -> Table:
    """One line a layer of a model."""
    body = [
        [row["case"], time(row), *_ratios(row), *_memory(row), pair(row.get("launches"))]
        for row in select(rows, group="model", dtype=dtype, mode=STEP)
    ]
    head = ["layer", "us", *RATIOS, "saved", "peak", "launches"]
    note = "bytes kept for backward and at the peak over eager's, launches of fused / eager"
    return Table(f"Layers of models, {dtype}, step", head, body, left=1, note=note)


RATIOS = ("x eager", "x compile", "x matmul")


def _ratios(row: Row) -> list[str]:
    return [ratio(row, "eager"), ratio(row, *COMPILED), ratio(row, "matmul")]


def _memory(row: Row) -> list[str]:
    return [share(row, "saved_bytes"), share(row, "peak_bytes")]


def square_table(rows: list[Row], dtype: str) -> Table:
    """One line a mode, contender and number of rows; one column a width."""
    rows = select(sweep(rows), dtype=dtype)
    widths = sorted(distinct(rows, "features"))
    body = []
    for mode in distinct(rows, "mode"):
        for title, names in (("eager", ("eager",)), ("compile", COMPILED)):
            for count in sorted(distinct(rows, "rows")):
                line = {r["features"]: r for r in select(rows, mode=mode, rows=count)}
                cells = [ratio(line.get(width), *names) for width in widths]
                measured = any(cell != UNMEASURED for cell in cells)
                body += [[brief(mode), title, f"{count:,}", *cells]] if measured else []
    kind = f" ({recipe(rows[0])})" if rows else ""
    head = ["mode", "against", "rows", *map(str, widths)]
    return Table(f"Square layers{kind}, {dtype}", head, body, left=2, note="times faster by width")


def host_table(rows: list[Row]) -> Table:
    """Microseconds the host takes for a call, on tensors too small to compute anything."""
    rows = select(rows, group="host")
    names = list(dict.fromkeys(name for row in rows for name in row["host_us"]))
    others = [name for name in contenders(rows) if name in names]
    body = [
        [brief(row["mode"]), *(microseconds(row["host_us"].get(name)) for name in names)]
        + [ratio(row, name) for name in others]
        for row in rows
    ]
    head = ["mode", *names, *(f"x {name}" for name in others)]
    sizes = f", {shape(rows[0])}, {rows[0]['dtype']}" if rows else ""
    return Table(f"Host time of a call{sizes}", head, body, left=1, note="us")


def loss_table(rows: list[Row]) -> Table:
    """Each contender that is faster by more than noise, the worst loss first."""
    lost = [(row["ratios"][name], name, row) for row in rows for name in row["slower_than"]]
    body = [
        [row["case"], row["dtype"], brief(row["mode"]), name, *_lost(found)]
        for found, name, row in sorted(lost, key=lambda entry: entry[0]["median"])
    ]
    head = ["layer", "dtype", "mode", "against", "ratio", "quartiles"]
    return Table("Where it loses", head, body, left=4, note="the worst first")


def _lost(found: dict[str, float]) -> list[str]:
    return [digits(found["median"]) + SLOWER, f"{digits(found['q1'])}-{digits(found['q3'])}"]


def readme_tables(results: dict[str, Any]) -> list[Table]:
    rows, dtype = results["rows"], MAIN_DTYPE[results["device"]]
    found = [
        summary_table(rows),
        forward_table(rows, dtype),
        step_table(rows, dtype),
        square_table(rows, dtype),
        host_table(rows),
    ]
    return [table.told() for table in found if table.body]
