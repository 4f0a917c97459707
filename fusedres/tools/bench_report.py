"""The short benchmark as a table, and what is to be said about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import console
from .bench import INFERENCE
from .console import Cell
from .timing import NOISE

HEADER = ("layer", "x", "", "eager", "fused", "eager / fused", "saved")


def show(found: dict[str, Any]) -> None:
    for line in head(found):
        console.out(line, "dim")
    if found["rows"]:
        console.out()
        console.table(HEADER, [cells(row) for row in found["rows"]], left=3)
        console.out()
    for line, style in verdict(found):
        console.out(line, style)


def head(found: dict[str, Any]) -> Iterator[str]:
    backends = ", ".join(dict.fromkeys(row["backend"] for row in found["rows"])) or "none"
    yield f"{found['machine']}; threads: {found['threads']}; torch {found['torch']}"
    yield f"{found['dtype']} on {found['device']}; fused runs backend {backends}"
    yield "eager: torch's own layers, called one after another, on the same parameters"
    yield "eager, fused: us a call, medians of rounds that take turns"
    yield "eager / fused: above 1 fused is faster; half of the rounds lie within the brackets"
    yield "saved: bytes kept for backward, fused / eager"


def cells(row: dict[str, Any]) -> list[Cell]:
    forward = row["mode"] == INFERENCE
    times = [f"{row['times_us'][name]['median']:,.0f}" for name in ("eager", "fused")]
    saved = row.get("saved_bytes")
    return [
        row["case"].rsplit(" ", 1)[0] if forward else "",
        row["case"].rsplit(" ", 1)[1] if forward else "",
        "forward" if forward else "fwd+bwd",
        *times,
        (ratio(row) + ("" if row["calm"] else " ?"), _style(row)),
        f"{saved['fused'] / saved['eager']:.2f}" if saved and saved["eager"] else "",
    ]


def ratio(row: dict[str, Any]) -> str:
    r = row["ratios"]["eager"]
    return f"{r['median']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})"


def faster(row: dict[str, Any]) -> bool:
    """By more than noise."""
    r = row["ratios"]["eager"]
    return bool(row["calm"] and r["median"] > 1 + NOISE and r["q1"] > 1)


def _style(row: dict[str, Any]) -> str:
    if not row["calm"]:
        return "note"
    return "bad" if row["slower_than"] else "good" if faster(row) else ""


def verdict(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong, what is slower, and what the measurement is worth."""
    rows, calm = found["rows"], [row for row in found["rows"] if row["calm"]]
    for kind in ("wrong", "failed"):
        for name, what in found[kind].items():
            yield f"{kind.upper()}: {name}: {what}", "bad"
    plain = [row["case"] for row in rows if row["backend"] == "reference"]
    if plain and len(plain) == len(rows):
        yield "Nothing is fused here: torch operations ran; `info` says what is missing.", "note"
    elif plain:
        names = "; ".join(dict.fromkeys(plain))
        yield f"Not fused, torch operations ran, `explain` says why: {names}.", "note"
    slower = [row for row in calm if row["slower_than"]]
    for row in slower:
        yield (
            f"slower: {row['case']}, {row['mode']}: eager takes {ratio(row)} of fused's time",
            "bad",
        )
    if calm:
        quick, n = sum(map(faster, calm)), len(calm)
        same = n - quick - len(slower)
        yield (
            f"Of {n} rows fused is faster in {quick}, slower in {len(slower)}, and within noise "
            f"({NOISE:.0%}) in {same}.",
            "head",
        )
    if busy := len(rows) - len(calm):
        yield (
            f"The machine was busy: in {busy} of {len(rows)} rows (marked ?) other processes took "
            "a core too often, and they are not judged. Run it on a calm machine, or with "
            "--threads 1, which measures CPU time.",
            "note",
        )
