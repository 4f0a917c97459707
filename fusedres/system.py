"""What this machine has and lacks, for `python -m fusedres info`. Nothing here raises."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fusedres

from . import backends, ops
from .spec import make_spec

VARIABLES = (
    "FUSEDRES_BACKEND", "FUSEDRES_DISABLE", "FUSEDRES_LOG", "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
BUILD = "with g++, in the source repository: `pip install --no-build-isolation .`, or make test"
TRITON = "pip install triton (torch's CUDA build for Linux brings it)"
GPU = "`nvidia-smi` must list one, CUDA_VISIBLE_DEVICES must not hide it, torch needs a CUDA build"
EXTRAS = {"scikit-learn": "demo", "matplotlib": "demo", "numpy": "bench"}


def system() -> dict[str, Any]:
    """The facts, ready for JSON. A probe that fails leaves its error in the place of its fact."""
    facts: dict[str, Any] = {
        "fusedres": fusedres.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch CUDA": _probe(lambda: torch.version.cuda),
        "triton": _installed("triton"),
        "threads": _probe(torch.get_num_threads),
        "extension": _probe(lambda: None if ops._C is None else ops._C.build_info()),
        "GPUs": _probe(_gpus),
        "backends": {name: _probe(partial(_state, name)) for name in ("cpu", "triton", "cuda")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    facts["missing"] = _missing(facts)
    return facts


def report(facts: dict[str, Any]) -> str:
    """The facts as text."""
    lines = []
    for name, value in facts.items():
        if name == "missing":
            continue
        if isinstance(value, dict):
            lines.append(f"{name:12}" + ("" if value else "none set"))
            lines += [f"  {key:20}{item}" for key, item in value.items()]
        elif isinstance(value, list):
            lines.append(f"{name:12}{'; '.join(value) or 'none'}")
        else:
            lines.append(f"{name:12}{'none' if value is None else value}")
    lines.append("missing     " + ("" if facts["missing"] else "nothing"))
    lines += [f"  {item['what']}\n      {item['how']}" for item in facts["missing"]]
    return "\n".join(lines)


def _probe(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def _state(backend: str) -> str:
    """ "runs", or why it does not run even the plain layer."""
    kind = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    spec = make_spec()
    reason = backends.why_not(backend, spec, torch.float32, torch.device(kind), 64, 64)
    return "runs" if reason is None else reason


def _missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    missing = []
    if ops.native_missing:
        missing.append({"what": ops.native_missing, "how": BUILD})
    if facts["triton"] is None:
        missing.append({"what": "Triton, for the GPU kernels", "how": TRITON})
    if not facts["GPUs"]:
        missing.append({"what": "a CUDA GPU (the CPU kernels need none)", "how": GPU})
    for package, extra in EXTRAS.items():
        if _installed(package) is None:
            what = f"{package}, for `python -m fusedres {extra}`"
            missing.append({"what": what, "how": f'pip install "fusedres[{extra}]"'})
    for check in (backends.environment_backend, lambda: backends.environment_flag("FUSEDRES_LOG")):
        try:
            check()
        except ValueError as error:
            missing.append({"what": f"a valid environment: {error}", "how": "set or unset it"})
    return missing
