"""Which backend a call gets, and the reason in words: `explain`'s lines "backend" and "chosen"."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import backends
from ..backends import cuda
from ..checks import BACKENDS
from ..spec import Spec


class Choice(NamedTuple):
    backend: str  # "eager": the layer's own submodules, one by one
    why: str  # completes "chosen ..."
    why_not: dict[str, str]  # the other backends that cannot run this call, with the reason


def is_here(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_available()


def choose(
    asked: str, spec: Spec, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int
) -> Choice:
    """What the call runs on `device`; where that is not here, what it would run there.

    Raises NotImplementedError if a named backend cannot, as the call does.
    """
    call = (spec, dtype, device, N, K)
    names = BACKENDS[1:] + ("vendor",) * (device.type == "cuda")
    reasons = {name: _why_not(name, *call) for name in names}
    small = backends.is_small(device, dtype, M, N, K)
    setting, named = "backend", asked
    if asked == "auto":
        setting, named = "the environment's FUSEDRES_BACKEND", backends.environment_backend()
    order = (*backends.candidates(device, small), "reference") if named == "auto" else (named,)
    if is_here(device):
        chosen = backends.choose(asked, spec.text, dtype, device, N, K, small)
    else:
        found = next((name for name in order if reasons[name] is None), None)
        if found is None:
            raise backends.refusal(setting, named, spec, dtype, N, K, reasons[named])
        chosen = cuda.pair(*call) if found == "cuda" else found
    kind = chosen.partition("+")[0]
    expected = next((name for name in order if reasons[name] is None), None)
    if kind != expected:  # choices are kept
        why = "when such a layer first ran, under another environment"
    elif named == "auto":
        why = _by_auto(kind, device, dtype, M, N, K)
    elif asked != "auto":
        why = f"by name: backend={asked!r}"
    elif backends.environment_flag("FUSEDRES_DISABLE"):
        why = "by the environment: FUSEDRES_DISABLE=1"
    else:
        why = f"by the environment: FUSEDRES_BACKEND={os.environ['FUSEDRES_BACKEND']}"
    reasons.pop("vendor", None)  # nobody asks for it by name
    others = {name: told for name, told in reasons.items() if told and name != kind}
    return Choice(chosen, why, others)


def _by_auto(chosen: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str:
    if chosen == "reference":
        return "by auto, since no kernel can run it"
    if chosen == "cpu":
        return "by auto, which takes it on a CPU"
    if chosen == "vendor":
        return "by auto: the library multiplies in true fp32, and one pass does the rest"
    most = backends.most_rows(device, dtype, N, K)
    size = (
        f"small up to {most} rows here, and x has {M}" if most >= 0 else "none this wide is small"
    )
    if most >= M:
        return f"by auto, which takes cuda for small layers, then triton: {size}"
    return f"by auto, which takes triton, and cuda for small layers: {size}"


def _why_not(
    backend: str, spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int
) -> str | None:
    return unless_away(device, backends.why_not, backend, spec, dtype, device, N, K)


def unless_away(device: torch.device, why_not: Callable[..., str | None], *call: Any) -> str | None:
    """why_not(*call), and None where `device` is not here to be asked."""
    try:
        return why_not(*call)
    except (AssertionError, RuntimeError):  # torch is asked about a GPU that is not here, at last
        if is_here(device):
            raise
        return None
