"""Which backend runs a call, and why."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache

import torch

from .. import wiring
from ..checks import BACKENDS
from ..spec import REGISTERED, Spec, one_of
from ..tracing import constant_when_compiled
from . import native, plan

_log = logging.getLogger("fusedres")


def why_not(
    backend: str, spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int
) -> str | None:
    """None if `backend` can run a layer of N outputs and K inputs, else the reason."""
    if backend == "reference":
        return None
    if spec.dtypes and "float64" in (*spec.dtypes, str(dtype).removeprefix("torch.")):
        return "the kernels take no float64 beside other dtypes"
    if backend == "cpu":
        if device.type == "cpu" and spec.activation in REGISTERED:
            return f"the C++ kernels know only the built-in activations, not {spec.activation!r}"
        return f"x is on {device}" if device.type != "cpu" else native.missing
    module = importlib.import_module(f".{backend}", __name__)  # importing triton takes its time
    return module.why_not(spec, dtype, device, N, K)


def candidates(device: torch.device, small: bool) -> tuple[str, ...]:
    """What "auto" tries, best first.

    On a GPU a launch by Triton costs the host several times what one from C++ does, so the C++
    kernels take small layers. Products of true fp32 are the library's where they are not small.
    """
    if device.type != "cuda":
        return ("cpu",) if device.type == "cpu" else ()
    return ("cuda", "triton") if small else ("vendor", "triton", "cuda")


def is_small(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
    """Whether a layer of x (M, K) and N outputs is small for a GPU: "auto" then chooses otherwise.

    A compiled graph is guarded by this, and by nothing else of the batch size.
    """
    return most_rows(device, dtype, N, K) >= M


@constant_when_compiled
@lru_cache(maxsize=4096)
def most_rows(device: torch.device, dtype: torch.dtype, N: int, K: int) -> int:
    """Up to how many rows a layer is small: by the tables of kernels/configs, in which
    ``python -m fusedres tune`` puts what it has measured, else by their general limits.
    """
    if device.type != "cuda":
        return -1
    limits = plan.limits_of_auto(device)
    measured = limits["rows by size"].get(plan.size_key(dtype.itemsize, N, K))
    if measured is not None:
        return measured
    if max(N, K) > limits["features"]:
        return -1
    few = limits["fp32 products"] // max(N * K, 1)
    return min(limits["rows"], few) if dtype == torch.float32 else limits["rows"]


CHAIN_WIDTHS = (16, 32, 64, 128, 256)  # features of which one launch takes rows through all layers


@constant_when_compiled
@lru_cache(maxsize=4096)
def chain_limit(
    backend: str, links: str, dtype: torch.dtype, device: torch.device, N: int, K: int
) -> int | str:
    """Up to how many rows Triton takes through the layers that `links` (wiring.py)
    describes in one call, or why it takes none. The environment is read as in `choose`.
    """
    if one_of("backend", backend, BACKENDS) == "auto":
        backend = environment_backend()
    if backend not in ("auto", "triton"):
        return f"the backend is '{backend}'"
    found: int | str = importlib.import_module(".chain", __name__).limit(links, dtype, device, N, K)
    return found


LOOPS = ("triton", "vendor")  # backends that run a link of a chain between tensors that are there


@constant_when_compiled
@lru_cache(maxsize=4096)
def chain_backend(
    backend: str, links: str, dtype: torch.dtype, device: torch.device, N: int, K: int
) -> str:
    """Which backend runs the layers that `links` describes, a launch or two each: one of LOOPS if
    all of them can be called at once. None is small, as it might be alone: many are not the host's
    time only. Raises what `choose` does.
    """
    call = dtype, device, N, K
    chosen = {choose(backend, line.recipe, *call) for line in wiring.read(links)}
    others = sorted(chosen - {*LOOPS})
    return others[0] if others else "triton" if "triton" in chosen else "vendor"


@constant_when_compiled
@lru_cache(maxsize=4096)
def choose(
    backend: str,
    recipe: str,
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    K: int,
    small: bool = False,
) -> str:
    """The backend that runs this layer: a key of ops.FORWARD, or "reference".

    Raises NotImplementedError with the reason if a named backend cannot. FUSEDRES_DISABLE=1 and
    FUSEDRES_BACKEND are read when a layer of this kind runs for the first time.
    """
    spec, named_by = Spec.parse(recipe), "backend"
    if one_of("backend", backend, BACKENDS) == "auto":
        backend, named_by = environment_backend(), "the environment's FUSEDRES_BACKEND"
    if backend == "auto":
        for backend in (*candidates(device, small), "reference"):
            reason = why_not(backend, spec, dtype, device, N, K)
            if reason is None:
                break
            if reason == native.missing and not native.skipped:
                native.warn(reason)
    elif reason := why_not(backend, spec, dtype, device, N, K):
        raise refusal(named_by, backend, spec, dtype, N, K, reason)
    if backend in ("triton", "vendor"):
        from . import triton

        triton.prepare(device)
    elif backend == "cuda":
        from . import cuda

        backend = cuda.name(spec, dtype, device, N, K)
    if environment_flag("FUSEDRES_LOG"):
        _log.warning("'%s' %s %s N=%d K=%d -> %s", spec, dtype, device, N, K, backend)
    return backend


def refusal(
    named_by: str, backend: str, spec: Spec, dtype: torch.dtype, N: int, K: int, reason: str | None
) -> NotImplementedError:
    """Of a backend that was named and cannot."""
    return NotImplementedError(
        f"fused_residual: {named_by}={backend!r} cannot run '{spec}' with {dtype}, N={N}, "
        f"K={K}: {reason}; {named_by}='auto' falls back"
    )


def environment_flag(name: str) -> bool:
    return one_of(name, os.environ.get(name, "0"), ("0", "1")) == "1"


def environment_backend() -> str:
    """What FUSEDRES_DISABLE and FUSEDRES_BACKEND make of "auto"; an unknown value is an error."""
    if environment_flag("FUSEDRES_DISABLE"):
        return "reference"
    return one_of("FUSEDRES_BACKEND", os.environ.get("FUSEDRES_BACKEND", "auto"), BACKENDS)
