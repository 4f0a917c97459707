"""Results files in the agreed form, without measuring: times from a roofline."""

from __future__ import annotations

from typing import Any

FORWARD, RECORD, STEP, GRAPH = (
    "forward",
    "forward, recording",
    "forward + backward",
    "forward, CUDA graph",
)
MODELS = (
    ("digits", 128, 64, "note", "layer", "relu"),
    ("rtdl-339", 512, 339, "prenorm", "batch", "relu"),
    ("mesh-128", 16384, 128, "linear-norm-add", "layer", None),
    ("vit-384", 788, 384, "note", "layer", "gelu"),
    ("bert-768", 512, 768, "bert-output", "layer", None),
)
SQUARES = tuple(
    (f"square-{m}x{n}", m, n, "note", "layer", "gelu") for m in (256, 4096) for n in (64, 256, 1024)
)
# copy GB/s, TFLOP/s of fp32, seconds to launch, and eager's factor over fused by mode
MACHINES = {"cpu": (20.0, 0.2, 5e-6), "cuda": (2900.0, 50.0, 3e-6)}
FACTORS = {"eager": 1.4, "compile": 1.25, "matmul": 0.7}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SPEED = {"fp32": 1, "bf16": 2, "fp16": 2}


def spread(value: float) -> dict[str, float]:
    return {"median": value, "q1": 0.97 * value, "q3": 1.03 * value}


def layer_row(device: str, group: str, case: Any, dtype: str, mode: str) -> dict[str, Any]:
    name, m, n, order, norm, activation = case
    copy, rate, launch = MACHINES[device]
    passes = 3 if mode == STEP else 1
    flops, moved = 2 * m * n * n * passes, (2 * m * n + n * n + 3 * n) * BYTES[dtype] * passes
    rate *= SPEED[dtype]
    seconds = max(flops / rate / 1e12, moved / copy / 1e9) * 1.1 + launch * passes
    wins = 1 + 0.3 / (1 + n / 512) + m * 1e-5  # narrow and tall layers win most
    ratios = {k: f * wins / 1.4 for k, f in FACTORS.items()}
    row = {
        "case": name,
        "group": group,
        "dtype": dtype,
        "mode": mode,
        "rows": m,
        "features": n,
        "out_features": n,
        "order": order,
        "norm": norm,
        "activation": activation,
        "backend": "cpu" if device == "cpu" else "triton",
        "rounds": 40,
        "calm": True,
        "times_us": {k: spread(1e6 * seconds * r) for k, r in {"fused": 1.0, **ratios}.items()},
        "ratios": {k: spread(r) for k, r in ratios.items()},
        "flops": flops,
        "bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "copy_share": moved / seconds / 1e9 / copy,
        "matmul_share": flops / seconds / 1e12 / rate,
        "launches": {"fused": passes, "eager": 4 * passes},
        "failed": {},
    }
    row["slower_than"] = [k for k in ("eager", "compile") if ratios[k] < 0.97]
    if mode == STEP:
        tensor = m * n * BYTES[dtype]
        row["saved_bytes"] = {"eager": 2 * tensor + 8 * m, "fused": tensor}
        row["peak_bytes"] = {"eager": 6 * tensor, "fused": 4 * tensor}
    if device == "cuda":
        row["host_us"] = {"eager": 40.0, "fused": 22.0}
    return row


def host_row(device: str, mode: str, base: float) -> dict[str, Any]:
    row = layer_row(device, "host", ("tiny", 4, 8, "note", "layer", "relu"), "fp32", mode)
    ratios = {"functional": 0.8, "eager": 1.3, "compile": 2.4}
    row["times_us"] = {k: spread(base * r) for k, r in {**ratios, "fused": 1.0}.items()}
    row["host_us"] = {k: t["median"] for k, t in row["times_us"].items()}
    row["ratios"] = {k: spread(r) for k, r in ratios.items()}
    return row | {"slower_than": ["functional"]}


def sample(
    device: str = "cpu",
    models: Any = MODELS,
    squares: Any = SQUARES,
    dtypes: Any = ("fp32", "bf16"),
) -> dict[str, Any]:
    """A results file of `device`."""
    modes = (FORWARD, STEP) if device == "cpu" else (FORWARD, STEP, GRAPH)
    copy, rate, _ = MACHINES[device]
    machine = {"cpu": "Example CPU", "cores": 2, "threads": 2, "simd": "AVX512"}
    if device == "cuda":
        machine |= {"gpu": "Example GPU", "memory_gib": 80.0, "driver": "580.1"}
    cases = [*(("model", c) for c in models), *(("square", c) for c in squares)]
    hosts = zip((FORWARD, RECORD, STEP), (17.0, 30.0, 122.0), strict=True)
    return {
        "date": "2030-01-02",
        "commit": "abc1234567",
        "dirty": False,
        "device": device,
        "machine": machine,
        "clocks": {"load_at_start": 0.1},
        "versions": {"python": "3.11.7", "torch": "2.11.0", "fusedres": "0.1.0"},
        "protocol": {"rounds": "take turns", "ratios": "contender / fused"},
        "ceilings": {
            "copy_gb_per_s": copy,
            "matmul_tflop_per_s": {d: rate * SPEED[d] for d in dtypes},
        },
        "not_measured": [],
        "rows": [
            *(host_row(device, mode, base) for mode, base in hosts),
            *(
                layer_row(device, group, case, dtype, mode)
                for group, case in cases
                for dtype in dtypes
                for mode in modes
            ),
        ],
    }


def find(results: dict[str, Any], case: str, dtype: str, mode: str) -> Any:
    """The row of a case."""
    wanted = (case, dtype, mode)
    [row] = [r for r in results["rows"] if (r["case"], r["dtype"], r["mode"]) == wanted]
    return row


def task_row(task: Any, **ratios: float) -> dict[str, Any]:
    """As much of a task's row as goals are judged by."""
    spreads = {name: spread(ratio) for name, ratio in ratios.items()}
    keys = {"case": task.case.name, "dtype": task.dtype, "mode": task.mode, "calm": True}
    slower = [name for name in ("eager", "compile") if ratios.get(name, 1.0) < 0.98]
    return keys | {"ratios": spreads, "slower_than": slower, "failed": {}}
