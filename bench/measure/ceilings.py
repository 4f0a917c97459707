"""The machine's own limits, measured in the run whose rows are held against them."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusedres.tools.timing import seconds_per_call

from .cases import DTYPES, Call

COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # beyond every cache
WIDTHS = {"cpu": 1024, "cuda": 8192}
NARROWEST = 256
SECONDS = 0.4  # for each ceiling; fewer with --quick
LEAST, MOST = 3, 200  # calls

PROTOCOL = (
    f"copy: {COPIED_BYTES['cpu'] >> 20} MiB on a CPU, {COPIED_BYTES['cuda'] >> 20} MiB on a GPU, "
    f"bytes read and written a second; matmul: square, {WIDTHS['cpu']} or {WIDTHS['cuda']} wide, "
    f"less where that takes long; the fastest of the calls within {SECONDS:g} s. Shares may pass 1 "
    "where a CPU's caches hold what a copy moves through memory"
)


def ceilings(device: torch.device, seconds: float = SECONDS) -> dict[str, Any]:
    """As the results file holds them: GB/s of a copy, TFLOP/s of a product in each dtype."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / fastest(lambda: target.copy_(source), device, seconds)
    rates = {name: matmul_rate(dtype, device, seconds) / 1e12 for name, dtype in DTYPES.items()}
    return {"copy_gb_per_s": copy / 1e9, "matmul_tflop_per_s": rates}


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of a product as wide as can be measured soon: a CPU without fp16 is slow."""
    n, call = NARROWEST, _product(NARROWEST, dtype, device)
    while n < WIDTHS[device.type] and 8 * fastest(call, device, 0.0) < seconds:
        n *= 2
        call = _product(n, dtype, device)
    return 2 * n**3 / fastest(call, device, seconds)


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def fastest(call: Call, device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call, which is what the machine can do."""
    once = seconds_per_call(call, 1, device)  # and warms up
    calls = min(MOST, max(LEAST, math.ceil(seconds / once)))
    return min(seconds_per_call(call, 1, device) for _ in range(calls))
