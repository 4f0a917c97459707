"""Rows of a results file, and tables of them, in Markdown that reads well in a terminal too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from statistics import median
from typing import Any

from ..measure.cases import (
    BACKWARD_GRAPH,
    GRAPH,
    INFERENCE,
    MLP,
    ONE_THREAD,
    RECORD,
    RECORD_GRAPH,
    STEP,
    STEP_ONE_THREAD,
)

Row = dict[str, Any]

MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}  # what most users of the device compute in
SLOWER = "▼"  # beside a ratio: fused is slower by more than noise
UNMEASURED = "-"
BRIEF = {
    INFERENCE: "forward",
    STEP: "step",
    ONE_THREAD: "forward, 1 thread",
    STEP_ONE_THREAD: "step, 1 thread",
    RECORD: "recording",
    GRAPH: "graph",
    RECORD_GRAPH: "graph, recording",
    BACKWARD_GRAPH: "graph, backward",
}
COMPILED = ("compile", "compile-max")
NAMES = {MLP: "mlp", "layer": "LN", "batch": "BN", "rms": "RMS"}
KIB, MIB = 2**10, 2**20


def select(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


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


def table(head: list[str], body: list[list[str]], left: int) -> str:
    """The first `left` columns are left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(cells: list[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        padded = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in columns]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [head, rule, *body]))


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


Column = tuple[str, Callable[[Row], str]]


def line_a_row(
    title: str, rows: Iterable[Row], columns: Iterable[Column], left: int, note: str = ""
) -> Table:
    head, cells = zip(*columns, strict=True)
    return Table(title, list(head), [[cell(row) for cell in cells] for row in rows], left, note)


def _against(title: str, *names: str) -> Column:
    return f"x {title}", lambda row: ratio(row, *names)


LAYER: Column = ("layer", itemgetter("case"))
RECIPE: tuple[Column, ...] = (("recipe", recipe), ("rows x width", shape))
RATIOS = (_against("eager", "eager"), _against("compile", *COMPILED), _against("matmul", "matmul"))
LAUNCHES: Column = ("launches", lambda row: pair(row.get("launches")))
TIMES: tuple[Column, ...] = (("us", time), *RATIOS)
SHARES: tuple[Column, ...] = (
    ("saved", lambda row: share(row, "saved_bytes")),
    ("peak", lambda row: share(row, "peak_bytes")),
)
FORWARD, BOTH = (LAYER, *RECIPE, *TIMES), (LAYER, *TIMES, *SHARES, LAUNCHES)
NAMED: tuple[Column, ...] = (
    LAYER,
    *RECIPE,
    *((key, itemgetter(key)) for key in ("dtype", "mode", "backend")),
    ("fused, us", time),
    ("quartiles", lambda row: " to ".join(microseconds(row["times_us"]["fused"][q]) for q in ENDS)),
)
COUNTED: tuple[Column, ...] = (
    ("GB/s", lambda row: digits(row.get("gb_per_s"), ",.1f")),
    ("of copy", lambda row: digits(row.get("copy_share"), ".0%")),
    ("TFLOP/s", lambda row: digits(row.get("tflop_per_s"), ".3g")),
    ("of matmul", lambda row: digits(row.get("matmul_share"), ".0%")),
    ("saved, MiB: fused / eager", lambda row: pair(row.get("saved_bytes"), ",.2f", MIB)),
    ("peak, MiB", lambda row: pair(row.get("peak_bytes"), ",.2f", MIB)),
    LAUNCHES,
    ("host, us", lambda row: pair(row.get("host_us"), ".1f")),
    ("rounds", lambda row: str(row["rounds"])),
)
ENDS = ("q1", "q3")


def full_tables(results: dict[str, Any]) -> list[Table]:
    """One table a group; columns that no row has are left out."""
    tables = []
    for group in distinct(results["rows"], "group"):
        rows = select(results["rows"], group=group)
        columns = [*NAMED, *(_against(name, name) for name in contenders(rows)), *COUNTED]
        tables.append(line_a_row(f"Every row: {group}", rows, columns, left=6).told())
    return tables


def page_tables(results: dict[str, Any]) -> list[Table]:
    rows, dtype = results["rows"], MAIN_DTYPE[results["device"]]
    models = select(rows, group="model", dtype=dtype)
    recipes = "a recipe is order, norm (LN: layer, BN: batch, RMS) and activation"
    parts = "bytes kept for backward and at the peak over eager's, launches of fused / eager"
    forward, both = (select(models, mode=mode) for mode in (INFERENCE, STEP))
    found = [
        summary_table(rows),
        line_a_row(f"Layers of models, {dtype}, forward", forward, FORWARD, 3, recipes),
        line_a_row(f"Layers of models, {dtype}, step", both, BOTH, 1, parts),
        square_table(rows, dtype),
        host_table(rows),
    ]
    return [table.told() for table in found if table.body]


def summary_table(rows: list[Row]) -> Table:
    """One line a group, mode and dtype: the middle and the ends of its ratios."""
    head = ["rows", "mode", "dtype", "x eager", "range", "slower", "x compile", "range", "slower"]
    modes, dtypes = distinct(rows, "mode"), distinct(rows, "dtype")
    body = []
    for group, mode, dtype in product(("model", "square"), modes, dtypes):
        if chosen := select(rows, group=group, mode=mode, dtype=dtype):
            spreads = *spread_of(chosen, ("eager",)), *spread_of(chosen, COMPILED)
            body.append([f"{group}s", BRIEF[mode], dtype, *spreads])
    return Table("All rows in short", head, body, left=3, note="medians")


def spread_of(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """Median, ends and losses of the ratios to the strongest of `names`."""
    found = [(row, name) for row in rows if (name := strongest(row, names))]
    if not found:
        return [UNMEASURED] * 3
    ratios = [row["ratios"][name]["median"] for row, name in found]
    slower = sum(name in row["slower_than"] for row, name in found)
    ends = f"{digits(min(ratios))}-{digits(max(ratios))}"
    return [digits(median(ratios)), ends, f"{slower} of {len(found)}"]


def square_table(rows: list[Row], dtype: str) -> Table:
    """One line a mode, contender and number of rows; one column a width."""
    rows = select(sweep(rows), dtype=dtype)
    widths, counts = (sorted(distinct(rows, key)) for key in ("features", "rows"))
    against = ("eager", ("eager",)), ("compile", COMPILED)
    body = []
    for mode, (title, names), count in product(distinct(rows, "mode"), against, counts):
        line = {r["features"]: r for r in select(rows, mode=mode, rows=count)}
        cells = [ratio(line.get(width), *names) for width in widths]
        if set(cells) != {UNMEASURED}:
            body.append([BRIEF[mode], title, f"{count:,}", *cells])
    kind = f" ({recipe(rows[0])})" if rows else ""
    head = ["mode", "against", "rows", *map(str, widths)]
    return Table(f"Square layers{kind}, {dtype}", head, body, left=2, note="times faster by width")


def host_table(rows: list[Row]) -> Table:
    """Microseconds the host takes for a call, on tensors too small to compute anything."""
    rows = select(rows, group="host")
    names = contenders(rows, "host_us")
    columns: list[Column] = [("mode", lambda row: BRIEF[row["mode"]])]
    columns += [(n, lambda row, n=n: microseconds(row["host_us"].get(n))) for n in names]
    columns += [_against(name, name) for name in contenders(rows) if name in names]
    sizes = f", {shape(rows[0])}, {rows[0]['dtype']}" if rows else ""
    return line_a_row(f"Host time of a call{sizes}", rows, columns, left=1, note="us")


def loss_table(rows: list[Row]) -> Table:
    """Each contender that is faster by more than noise, the worst loss first."""
    lost = [(row["ratios"][name], name, row) for row in rows for name in row["slower_than"]]
    body = []
    for found, name, row in sorted(lost, key=lambda entry: entry[0]["median"]):
        low, middle, high = (digits(found[key]) for key in ("q1", "median", "q3"))
        line = [row["case"], row["dtype"], BRIEF[row["mode"]], name]
        body.append([*line, middle + SLOWER, f"{low}-{high}"])
    head = ["layer", "dtype", "mode", "against", "ratio", "quartiles"]
    return Table("Where it loses", head, body, left=4, note="the worst first")
