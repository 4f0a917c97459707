"""`python -m fusedres selftest`: every backend that is here against the reference, in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import BACKENDS
from ..modules import FusedResidual
from ..reference import Residual
from ..spec import NORMS, ORDERS

SECONDS = 10.0  # a GPU's kernels compile when first used, a second or more each
M, K = 33, 37  # no multiple of any tile or vector
ACTIVATIONS = ("gelu", "silu", "tanh", "softplus")  # smooth: the same derivative on both sides


@dataclass
class Found:
    """About one backend."""

    backend: str
    good: int = 0  # layers that agree with the reference
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)  # layers it does not take, by reason
    left: int = 0  # layers for which there was no time

    @property
    def here(self) -> bool:
        return bool(self.good or self.wrong)


def grid() -> Iterator[dict[str, Any]]:
    """Settings of the layers that are checked."""
    activation = itertools.cycle(ACTIVATIONS)
    for order in ORDERS:
        for norm in (None, *NORMS):
            yield {"order": order, "norm": norm, "activation": next(activation)}
    yield {"out_features": 20}
    yield {"gate": "channel", "gate_init": 0.5, "dropout": 0.2, "drop_path": 0.1}
    yield {"order": "linear-act", "bias": False}


def _results(layer: Residual, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, every gradient and every running statistic of one training step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same masks every time
    y = layer(x)
    y.backward(dy)
    found: dict[str, Any] = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    found |= {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
    return found


def check(backend: str, settings: dict[str, Any], dtype: torch.dtype, device: str) -> str | None:
    """None if the backend is as near to float64 as eager torch is, else what is wrong.

    Sums in another order and a rounding more or less are right too: on so few elements the largest
    error may be 4 times eager's plus 8 rounding steps.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    of_backend: dict[str, Any] = {"backend": backend}
    torch.manual_seed(0)
    settings = {"activation": "gelu", **settings}
    eager = Residual(K, **settings, **where)
    fused = FusedResidual(K, **settings, **where, **of_backend)
    exact = Residual(K, **settings, device=device, dtype=torch.float64)
    fused.load_state_dict(eager.state_dict())
    exact.load_state_dict(eager.state_dict())
    x, dy = torch.randn(M, K, **where), torch.randn(M, eager.out_features, **where)
    true = _results(exact, x.double(), dy.double())
    ours, theirs = _results(fused, x, dy), _results(eager, x, dy)
    for name, t in true.items():
        error, allowed = ((r[name].double() - t).abs().max().item() for r in (ours, theirs))
        allowed = 4 * allowed + 8 * torch.finfo(dtype).eps * t.abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.3g}, allowed are {allowed:.3g}"
    return None


def _one(backend: str, end: float) -> Found:
    """One layer at least, then as many as there is time for until `end`."""
    on_gpu = backend != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    found = Found(backend)
    dtypes = [torch.float32, torch.float16]
    if backend != "triton" or on_gpu:  # Triton's interpreter cannot do bf16
        dtypes.append(torch.bfloat16)
    for settings, dtype in itertools.product(grid(), dtypes):
        spec = FusedResidual(K, **settings, device="meta").spec
        N = settings.get("out_features", K)
        reason = backends.why_not(backend, spec, dtype, device, N, K)
        if reason is not None:
            found.refused[reason] = found.refused.get(reason, 0) + 1
        elif found.here and perf_counter() > end:
            found.left += 1
        else:
            try:
                wrong = check(backend, settings, dtype, device.type)
            except Exception as error:  # a backend that breaks is wrong; others are still checked
                wrong = f"{type(error).__name__}: {error}"
            found.good += wrong is None
            if wrong is not None:
                found.wrong.append(f"{settings} {dtype}: {wrong}")
    return found


def selftest(seconds: float = SECONDS) -> Iterator[Found]:
    """What is found about one backend after the other."""
    end, threads = perf_counter() + seconds, torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors on a machine that may be busy
    try:
        for backend in BACKENDS[2:]:
            yield _one(backend, end)
    finally:
        torch.set_num_threads(threads)
