"""The form of a results file."""

from __future__ import annotations

import math
from typing import Any

from .cases import DTYPES, GRAPHS, HOST, MODEL, MODES, SQUARE, STEP
from .contenders import RIVALS

Form = dict[Any, tuple[str, ...]]  # fields by type, or by the values they may have
FILE: Form = {
    str: ("date", "commit"),
    ("cpu", "cuda"): ("device",),
    bool: ("dirty",),
    dict: ("machine", "clocks", "versions", "protocol", "ceilings"),
    list: ("not_measured", "rows"),
}
ROW: Form = {
    str: ("case", "order", "norm", "backend"),
    (MODEL, SQUARE, HOST): ("group",),
    tuple(DTYPES): ("dtype",),
    tuple(MODES): ("mode",),
    str | None: ("activation",),
    int: ("rows", "features", "out_features", "rounds", "flops", "bytes"),
    bool: ("calm",),
    float: ("gb_per_s", "tflop_per_s", "copy_share", "matmul_share"),
    dict: ("times_us", "ratios", "failed"),
    list: ("slower_than",),
}


def check_results(results: dict[str, Any]) -> list[str]:
    """What is wrong with a results file; nothing in those that `python -m bench` writes."""
    if found := _fields(results, FILE, "file"):
        return found
    named = ["cpu", "cores", "threads", *(["gpu"] if results["device"] == "cuda" else [])]
    found += _fields(results["machine"], {object: tuple(named)}, "machine")
    found += _fields(results["versions"], {object: ("python", "torch", "fusedres")}, "versions")
    ceilings = results["ceilings"]
    numbers = [ceilings.get("copy_gb_per_s"), *ceilings.get("matmul_tflop_per_s", {}).values()]
    found += [f"ceilings: {n!r} is not positive" for n in numbers if not _positive(n)]
    for left_out in results["not_measured"]:
        found += _fields(left_out, {str: ("case", "dtype", "mode", "why")}, "left out")
    seen = set()
    for row in results["rows"]:
        where = " ".join(str(row.get(key)) for key in ("case", "dtype", "mode"))
        found += _fields(row, ROW, where) or _row(row, where, results["device"])
        found += [f"{where}: there twice"] if where in seen else []
        seen.add(where)
    return found


def _fields(found: dict[str, Any], form: Form, where: str) -> list[str]:
    wrong = []
    for kind, keys in form.items():
        for key in keys:
            if key not in found:
                wrong.append(f"{where}: {key} is missing")
            elif not (
                found[key] in kind if isinstance(kind, tuple) else isinstance(found[key], kind)
            ):
                wrong.append(f"{where}: {key} is {found[key]!r}, expected {kind}")
    return wrong


def _row(row: dict[str, Any], where: str, device: str) -> list[str]:
    told = []
    times, ratios, failed = row["times_us"], row["ratios"], row["failed"]
    if set(times) != {*ratios, "fused"} or not {"eager", "fused"} <= {*times, *failed}:
        told.append(f"times of {sorted(times)}, ratios of {sorted(ratios)}")
    for name, spread in [*times.items(), *ratios.items()]:
        ends = [spread.get(key) for key in ("q1", "median", "q3")]
        if not all(map(_positive, ends)) or ends != sorted(ends):
            told.append(f"{name} has quartiles {ends}")
    if not set(row["slower_than"]) <= {*RIVALS} & {*ratios}:
        told.append(f"slower than {row['slower_than']}, which has no ratio or no say")
    wanted = ["saved_bytes", "peak_bytes"] if row["mode"] == STEP else []
    if row["mode"] not in GRAPHS:
        wanted += ["launches", *(["host_us"] if device == "cuda" or row["group"] == HOST else [])]
    for key in wanted:
        missing = {"fused", "eager"} - {*row.get(key, {}), *failed}
        told += [] if key in row else [f"{key} is missing"]
        told += [f"{key} lacks {', '.join(sorted(missing))}"] if missing else []
    return [f"{where}: {line}" for line in told]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
