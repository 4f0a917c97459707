"""README's table about a device: some layers of models, from the worst ratio to the best."""

from __future__ import annotations

from ..measure.cases import INFERENCE, STEP
from ..measure.results_file import Results
from .section import source
from .tables import (
    COMPILED,
    MAIN_DTYPE,
    RECIPE,
    SLOWER,
    Column,
    Row,
    line_a_row,
    ratio,
    select,
    share,
)

MOST = 5  # rows in README, of all devices together; four more are of whole networks
NOTE = (
    "times faster than eager torch and than torch.compile, a step is forward + backward; saved: "
    f"bytes kept for backward over eager's; {SLOWER}: slower by more than noise"
)


def headline(results: Results, most: int = MOST) -> str:
    """A sentence on what was measured where, and the table of at most `most` rows."""
    dtype = MAIN_DTYPE[results["device"]]
    steps = select(results["rows"], group="model", dtype=dtype, mode=STEP, calm=True)
    if not steps:
        return "No layer of a model was measured undisturbed."
    forward = {
        row["case"]: row
        for row in select(results["rows"], group="model", dtype=dtype, mode=INFERENCE)
    }
    columns: list[Column] = [
        ("layer", lambda row: row["case"]),
        *RECIPE,
        ("forward x eager", lambda row: ratio(forward.get(row["case"]), "eager")),
        ("step x eager", lambda row: ratio(row, "eager")),
        ("x compile", lambda row: ratio(row, *COMPILED)),
        ("saved", lambda row: share(row, "saved_bytes")),
    ]
    shown = spread(steps, most)
    lines = line_a_row(f"Layers of models, {dtype}", shown, columns, 3, NOTE).told().markdown()
    told = f"{len(shown)} of {len(steps)} layers, from the worst step to the best."
    return f"Measured on {source(results, brief=True)}; {told}\n\n{lines}"


def spread(rows: list[Row], most: int) -> list[Row]:
    """At most `most` rows at even distances in the ranking by eager's ratio, both ends included."""
    ranked = sorted(rows, key=lambda row: row["ratios"]["eager"]["median"])
    if len(ranked) <= most:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (most - 1))] for i in range(most)]
