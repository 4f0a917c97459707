"""The form of a results file."""

from __future__ import annotations

import math
from typing import Any

from .cases import DTYPES, GRAPHS, HOST, MODEL, MODES, SQUARE, STEP
from .contenders import RIVALS

GROUPS = (MODEL, SQUARE, HOST)
FILE = {
    "date": str,
    "commit": str,
    "dirty": bool,
    "device": str,
    "machine": dict,
    "clocks": dict,
    "versions": dict,
    "protocol": dict,
    "ceilings": dict,
    "not_measured": list,
    "rows": list,
}
ROW = {
    "case": str,
    "group": str,
    "dtype": str,
    "mode": str,
    "rows": int,
    "features": int,
    "out_features": int,
    "order": str,
    "norm": str,
    "activation": (str, type(None)),
    "backend": str,
    "rounds": int,
    "calm": bool,
    "times_us": dict,
    "ratios": dict,
    "slower_than": list,
    "flops": int,
    "bytes": int,
    "gb_per_s": float,
    "tflop_per_s": float,
    "copy_share": float,
    "matmul_share": float,
    "failed": dict,
}


def check_results(results: dict[str, Any]) -> list[str]:
    """What is wrong with a results file; nothing, if it has the form that `python -m bench`
    writes.
    """
    found = _fields(results, FILE, "file")
    if found:
        return found
    for name in ("cpu", "cores", "threads", *(["gpu"] if results["device"] == "cuda" else [])):
        found += _present(results["machine"], name, "machine")
    for name in ("python", "torch", "fusedres"):
        found += _present(results["versions"], name, "versions")
    if results["device"] not in ("cpu", "cuda"):
        found.append(f"device is {results['device']!r}, expected cpu or cuda")
    ceilings = results["ceilings"]
    numbers = [ceilings.get("copy_gb_per_s"), *ceilings.get("matmul_tflop_per_s", {}).values()]
    found += [
        f"ceilings: {number!r} is not positive" for number in numbers if not _positive(number)
    ]
    for left_out in results["not_measured"]:
        found += _fields(left_out, dict.fromkeys(("case", "dtype", "mode", "why"), str), "left out")
    seen = set()
    for row in results["rows"]:
        where = " ".join(str(row.get(key)) for key in ("case", "dtype", "mode"))
        found += _row(row, where, results["device"])
        found += [f"{where}: there twice"] if where in seen else []
        seen.add(where)
    return found


def _row(row: dict[str, Any], where: str, device: str) -> list[str]:
    found = _fields(row, ROW, where)
    if found:
        return found
    for key, known in (("group", GROUPS), ("dtype", tuple(DTYPES)), ("mode", tuple(MODES))):
        if row[key] not in known:
            found.append(f"{where}: {key} is {row[key]!r}, expected one of {', '.join(known)}")
    times, ratios = row["times_us"], row["ratios"]
    if set(times) != {*ratios, "fused"}:
        found.append(f"{where}: times of {sorted(times)}, ratios of {sorted(ratios)}")
    if not {"eager", "fused"} <= {*times, *row["failed"]}:
        found.append(f"{where}: neither a time nor a failure of eager and fused")
    for name, spread in [*times.items(), *ratios.items()]:
        ends = [spread.get(key) for key in ("q1", "median", "q3")]
        if not all(map(_positive, ends)) or ends != sorted(ends):
            found.append(f"{where}: {name} has quartiles {ends}")
    if not set(row["slower_than"]) <= {*RIVALS} & {*ratios}:
        found.append(f"{where}: slower than {row['slower_than']}, which has no ratio or no say")
    wanted = ["saved_bytes", "peak_bytes"] if row["mode"] == STEP else []
    if row["mode"] not in GRAPHS:
        wanted += ["launches", *(["host_us"] if device == "cuda" or row["group"] == HOST else [])]
    for key in wanted:
        found += _present(row, key, where)
        missing = {"fused", "eager"} - {*row.get(key, {}), *row["failed"]}
        found += [f"{where}: {key} lacks {', '.join(sorted(missing))}"] if missing else []
    return found


def _fields(found: dict[str, Any], expected: dict[str, Any], where: str) -> list[str]:
    wrong = [f"{where}: {key} is missing" for key in expected if key not in found]
    return wrong + [
        f"{where}: {key} is {found[key]!r}, expected {kind}"
        for key, kind in expected.items()
        if key in found and not isinstance(found[key], kind)
    ]


def _present(found: dict[str, Any], key: str, where: str) -> list[str]:
    return [] if key in found else [f"{where}: {key} is missing"]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
