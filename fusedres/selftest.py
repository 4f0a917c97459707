"""`python -m fusedres selftest`: every backend that is here against the reference, in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import BACKENDS
from .modules import FusedResidual
from .reference import Residual
from .spec import NORMS, ORDERS

M, K = 33, 37  # no multiple of any tile or vector
ACTIVATIONS = ("gelu", "silu", "tanh", "softplus")  # smooth: the same derivative on both sides


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
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    found |= {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
    return found


def check(backend: str, settings: dict[str, Any], dtype: torch.dtype, device: str) -> str | None:
    """None if the backend is as near to float64 as eager torch is, else what is wrong."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    torch.manual_seed(0)
    settings = {"activation": "gelu", **settings}
    eager = Residual(K, **settings, **where)
    fused = FusedResidual(K, **settings, **where, backend=backend)
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


def _one(backend: str) -> tuple[str, list[str]]:
    """A line about the backend, and one for each layer that it gets wrong."""
    on_gpu = backend != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    good, wrong, refused = 0, [], []
    dtypes = [torch.float32]
    if backend != "triton" or on_gpu:  # Triton's interpreter cannot do bf16
        dtypes.append(torch.bfloat16)
    for settings, dtype in itertools.product(grid(), dtypes):
        spec = FusedResidual(K, **settings, device="meta").spec
        N = settings.get("out_features", K)
        reason = backends.why_not(backend, spec, dtype, device, N, K)
        if reason is not None:
            refused.append(reason)
            continue
        try:
            found = check(backend, settings, dtype, device.type)
        except Exception as error:  # a backend that breaks is wrong; the others are still checked
            found = f"{type(error).__name__}: {error}"
        good += found is None
        if found is not None:
            wrong.append(f"  WRONG {settings} {dtype}: {found}")
    if not good and not wrong:
        return f"{backend:8}not here: {refused[-1]}", []
    line = f"{backend:8}{good} layers agree with the reference, forward and backward"
    return line + (f"; {len(refused)} it does not take" if refused else ""), wrong


def selftest() -> int:
    """Checks and prints; 0 if all is well, 1 if a backend is wrong."""
    failed, checked, threads = 0, False, torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors on a machine that may be busy
    try:
        for backend in BACKENDS[2:]:
            line, wrong = _one(backend)
            print("\n".join([line, *wrong]), flush=True)
            failed += len(wrong)
            checked = checked or "not here" not in line
    finally:
        torch.set_num_threads(threads)
    if failed:
        print(f"{failed} layers are wrong")
    else:
        print("all is well" if checked else "nothing to check: layers run as torch operations")
    return 1 if failed else 0
