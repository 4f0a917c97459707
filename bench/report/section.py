"""What a results file says, as text: a device's part of docs/benchmarks.md, and where it goes."""

from __future__ import annotations

import re
from pathlib import Path

from ..measure.results_file import Results, machine_of
from .goals import goal_table
from .tables import SLOWER, Row, distinct, full_tables, loss_table, page_tables, select, short

NUMBER = re.compile(r"\d+(?:\.\d+)?")
BRIEF = ("torch", "fusedres")
MOST_NAMED = 6  # of the layers that were not measured, for one reason


def source(results: Results, brief: bool = False) -> str:
    found = results["machine"]
    where = [machine_of(results)]
    if results["device"] == "cpu":
        where += [_count(found[key], key.removesuffix("s")) for key in ("cores", "threads")]
        where += [found["simd"]] if found.get("simd") else []
    elif found.get("driver"):
        where.append(f"driver {found['driver']}")
    versions = [f"{n} {v}" for n, v in results["versions"].items() if n in BRIEF or not brief]
    commit = results["commit"] + " with changes" * results["dirty"]
    return f"{', '.join(where)}; {', '.join(versions)}; commit {commit}, {results['date']}"


def ceilings(results: Results) -> str:
    """What the machine reached in the same run, the yardstick of every share."""
    found = results["ceilings"]
    told = [f"copy {short(found['copy_gb_per_s'])} GB/s"] if found.get("copy_gb_per_s") else []
    for dtype, rate in found.get("matmul_tflop_per_s", {}).items():
        unit = f"{short(rate)} TFLOP/s" if rate >= 1 else f"{short(1e3 * rate)} GFLOP/s"
        told.append(f"matmul {dtype} {unit}")
    return ", ".join(told)


def protocol(results: Results) -> str:
    rows, limits = results["rows"], ceilings(results)
    uneasy = sum(not row["calm"] for row in rows)
    told = [
        f"Measured on {source(results)}.",
        "A round times every contender once, in rotating order, in one process; times are fused's "
        "medians over rounds.",
        "`x eager` is eager's time over fused's within a round, so above 1 fused is faster; "
        f"{SLOWER}: slower by more than noise.",
        "`x compile` is the faster of torch.compile's modes that ran, `x matmul` the bare product; "
        "a step is forward + backward.",
        "Graph: forward in a CUDA graph." * (results["device"] == "cuda"),
        f"Ceilings of the same run: {limits}." if limits else "",
        f"`~`: disturbed by other processes ({uneasy} of {len(rows)}), so not judged."
        * bool(uneasy),
    ]
    return "\n".join(filter(None, told))


def launches(results: Results) -> str:
    found = [r for r in results["rows"] if r["group"] != "host" and r.get("launches")]
    unit = "Kernels on the GPU" if results["device"] == "cuda" else "Torch ops"
    told = []
    for mode in distinct(found, "mode"):
        counts = [row["launches"] for row in select(found, mode=mode)]
        names = [name for name in ("fused", "eager") if any(name in c for c in counts)]
        spans = [_span([f"{n} {c[n]}" for c in counts if n in c]) for n in names]
        told += [f"{mode} {' and '.join(spans)}"]
    return f"{unit} a call: {'; '.join(told)}." if told else ""


def unmeasured(results: Results, brief: bool = True) -> list[str]:
    """What is not there, by reason: rows that were not measured, contenders that did not run."""
    told = [(row["why"], row) for row in results["not_measured"]]
    for row in results["rows"]:
        told += [(f"{name}: {why}", row) for name, why in row["failed"].items()]
    alike: dict[str, list[tuple[str, Row]]] = {}
    for why, row in told:
        alike.setdefault(NUMBER.sub("", why), []).append((why, row))
    lines = []
    for found in alike.values():
        rows = [row for _, row in found]
        names, dtypes = distinct(rows, "case"), ", ".join(distinct(rows, "dtype"))
        more = f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED)
        each = "; ".join(f"{row['case']} {row['dtype']}, {row['mode']}" for row in rows)
        cases = f"{', '.join(names[:MOST_NAMED])}{more} ({dtypes})" if brief else each
        lines.append(f"* {_span([why for why, _ in found])} ({_count(len(rows), 'row')}): {cases}")
    return lines


def _span(texts: list[str]) -> str:
    """Texts that differ in their numbers only as one, with the least and the largest of each."""
    columns = zip(*map(NUMBER.findall, texts), strict=True)
    ends = [dict.fromkeys((min(c, key=float), max(c, key=float))) for c in columns]
    spans = map(" to ".join, ends)
    return NUMBER.sub(lambda _: next(spans), texts[0])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def section(results: Results, pictures: str = "", full: bool = False) -> str:
    """What docs/benchmarks.md shows of one device; `full` shows every row."""
    lost, judged = loss_table(results["rows"]), sum(row["calm"] for row in results["rows"])
    slower = f"**{lost.title}**: nowhere in {_count(judged, 'row')}."
    missing, goals = unmeasured(results, brief=not full), results.get("goals", [])
    parts = [
        protocol(results),
        *(t.markdown() for t in (full_tables if full else page_tables)(results)),
        launches(results),
        pictures,
        lost.markdown() if lost.body else slower,
        goal_table(goals, full).markdown() if goals else "",
        "\n".join(["**Not measured:**", "", *missing]) if missing else "",
    ]
    return "\n\n".join(filter(None, parts))


def replace_part(page: Path, markers: tuple[str, str], part: str) -> str:
    """The text of a page with what stands between the markers replaced."""
    text, (begin, end) = page.read_text(encoding="utf-8"), markers
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        raise SystemExit(f"bench: {page.name} has no {begin} with {end} after it to write between")
    return f"{text[: first + len(begin)]}\n{part}\n{text[last:]}"
