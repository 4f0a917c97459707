"""What this machine has and lacks, for `python -m fusedres info`. Nothing here raises."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedres

from .. import backends
from ..backends import native
from ..spec import make_spec

VARIABLES = (
    "FUSEDRES_BACKEND",
    "FUSEDRES_DISABLE",
    "FUSEDRES_LOG",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
PACKAGES = {  # optional ones, name to install: name to import, what it is for
    "triton": ("triton", "the GPU kernels (torch's CUDA build for Linux brings it)"),
    "rich": ("rich", "tables, colours and bars on a terminal"),
    "scikit-learn": ("sklearn", "`python -m fusedres demo`"),
    "matplotlib": ("matplotlib", "the demo's picture"),
    "numpy": ("numpy", "the demo, and Triton's interpreter (which wants numpy<2.4)"),
}
CUTLASS = "nvidia-cutlass"  # headers, which only a build wants
BUILD = "in the source repository: `pip install --no-build-isolation -e .`"
GPU = "`nvidia-smi` must list one, and CUDA_VISIBLE_DEVICES must not hide it"
CPU_BUILD = f"this torch is a build without CUDA, install one with it; {GPU}"


def system() -> dict[str, Any]:
    """The facts, ready for JSON. A probe that fails leaves its error in the place of its fact."""
    facts: dict[str, Any] = {
        "fusedres": _probe(lambda: fusedres.__version__),
        "folder": _probe(lambda: str(Path(__file__).parents[1])),
        "python": _probe(platform.python_version),
        "platform": _probe(platform.platform),
        "CPU": _probe(cpu),
        "threads": _probe(torch.get_num_threads),
        "torch": _probe(lambda: str(torch.__version__)),
        "torch CUDA": _probe(lambda: torch.version.cuda),
        "packages": {name: _probe(partial(_package, name)) for name in (*PACKAGES, CUTLASS)},
        "g++": _probe(lambda: shutil.which(os.environ.get("CXX", "g++"))),
        "extension": _probe(lambda: native.extension and native.extension.build_info()),
        "GPUs": _probe(_gpus),
        "backends": {name: _probe(partial(_state, name)) for name in ("cpu", "triton", "cuda")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return facts | {"missing": list(_missing(facts))}


def report(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts as lines of text, each with its style."""
    for name, value in facts.items():
        if name == "missing":
            continue
        if isinstance(value, dict):
            yield f"{name:12}{'' if value else 'none set'}".rstrip(), ""
            for key, item in value.items():
                yield f"  {key:20}{_text(item)}", "good" if item == "runs" else ""
        else:
            yield f"{name:12}{_text(value)}", ""
    yield ("missing", "head") if facts["missing"] else ("missing     nothing", "good")
    for item in facts["missing"]:
        yield f"  {item['what']}", "note"
        yield f"      {item['how']}", ""


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) or "''"


def _probe(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _package(name: str) -> str | None:
    """Its version, with what is wrong with it; None if it is not installed."""
    try:
        found = str(version(name))
    except PackageNotFoundError:
        return None
    try:
        if name in PACKAGES:
            importlib.import_module(PACKAGES[name][0])
    except Exception as error:
        return f"{found}, but importing it fails ({type(error).__name__}: {error})"
    return found


def cpu() -> str:
    """The CPU's name and number of cores."""
    name, known = platform.processor(), Path("/proc/cpuinfo")
    if known.exists():
        lines = (line.partition(":") for line in known.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def machine(device: torch.device) -> str:
    """What a measurement ran on."""
    gpu = device.type == "cuda"
    return str(_probe(lambda: torch.cuda.get_device_name(device) if gpu else cpu()))


def _gpus() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def _state(backend: str) -> str:
    """Why it does not run even the plain layer, else "runs"."""
    kind = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    spec = make_spec()
    reason = backends.why_not(backend, spec, torch.float32, torch.device(kind), 64, 64)
    return "runs" if reason is None else reason


def _missing(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    if native.missing:
        tool = "" if facts["g++"] else "install g++, then "
        yield {"what": native.missing, "how": tool + BUILD}
    if native.hopper_missing:
        yield {"what": native.hopper_missing, "how": f"pip install {CUTLASS}, then {BUILD}"}
    if not facts["GPUs"]:
        how = GPU if facts["torch CUDA"] else CPU_BUILD
        yield {"what": "a CUDA GPU (the CPU kernels need none)", "how": how}
    for package, (_, purpose) in PACKAGES.items():
        found = facts["packages"][package]
        if found is None:
            yield {"what": f"{package}, for {purpose}", "how": f"pip install {package}"}
        elif " " in found:  # more than a version
            yield {
                "what": f"a working {package}, for {purpose}: {found}",
                "how": f"pip install --force-reinstall {package}",
            }
    for check in (backends.environment_backend, lambda: backends.environment_flag("FUSEDRES_LOG")):
        try:
            check()
        except Exception as error:
            yield {"what": f"a valid environment: {error}", "how": "set or unset it"}
