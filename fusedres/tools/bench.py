"""`python -m fusedres bench`: a layer, fused against eager, on this machine in half a minute.

Eager is the layer as users write it, torch's own layers called one after another; both share their
parameters. Each pair is first held to float64, then timed in rounds that take turns (timing.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedres

from .. import backends
from ..modules import FusedResidual
from ..reference import ACTIVATION_FUNCTIONS, Residual
from . import system
from .timing import NOISE, interleave, summary

Show = Callable[[float, str], None]  # how many cases are done, and which one is next

SECONDS = 25.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INFERENCE, STEP = "forward", "forward + backward"
KINKED = ("relu", "leaky_relu", "relu6", "selu", "hardswish", "hardsigmoid")  # derivative jumps


class Case(NamedTuple):
    """A layer on x (M, K) with N outputs."""

    M: int
    K: int
    N: int
    order: str = "note"
    norm: str | None = "layer"
    activation: str | None = "gelu"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.order, self.norm, self.activation)))

    @property
    def shape(self) -> str:
        return f"{self.M}x{self.K}" + (f"x{self.N}" if self.N != self.K else "")


OTHERS = (
    Case(4096, 128, 128, norm="batch", activation="relu"),  # a graph net's
    Case(256, 512, 512, "prenorm", activation="relu"),  # reinforcement learning's
)
SHAPES = {  # rows x width of the default order, by device
    "cpu": ((8, 64), (128, 64), (512, 339), (4096, 256), (512, 1024)),
    "cuda": ((128, 64), (512, 339), (4096, 1024), (65536, 512), (16384, 4096)),
}


def default_cases(device: str) -> list[Case]:
    return [*(Case(M, N, N) for M, N in SHAPES[device]), *OTHERS]


class Eager(nn.Module):
    """The layer as users write it, from the fused layer's own nn.Linear, nn.LayerNorm, ..."""

    def __init__(self, layer: Residual) -> None:
        super().__init__()
        act = ACTIVATION_FUNCTIONS.get(str(layer.spec.activation))
        of: dict[str, Any] = {"linear": layer.linear, "norm": layer.norm, "act": act, "add": None}
        self.layer, self.stages = layer, [of[stage] for stage in layer.spec.stages]

    def forward(self, x: Tensor) -> Tensor:
        t, shortcut = x, self.layer.shortcut
        for stage in self.stages:
            if stage is not None:
                t = stage(t)
            elif shortcut is None:
                t = t + x
            else:
                t = t + shortcut(x)
        return t


class Job:
    """A case with its tensors, and what is timed."""

    def __init__(self, case: Case, dtype: str, device: torch.device) -> None:
        torch.manual_seed(0)
        M, K, N, order, norm, activation = case
        where: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
        self.case, self.device = case, device
        recipe: dict[str, Any] = {"order": order, "norm": norm, "activation": activation}
        self.fused = FusedResidual(K, N, **recipe, **where)
        self.eager = Eager(self.fused)
        self.layers: dict[str, nn.Module] = {"eager": self.eager, "fused": self.fused}
        self.x = torch.randn(M, K, **where, requires_grad=True)
        self.inputs = (self.x,)
        self.dy = torch.randn(M, N, **where)
        small = backends.is_small(device, DTYPES[dtype], M, N, K)
        spec = self.fused.spec.text
        self.backend = backends.choose("auto", spec, DTYPES[dtype], device, N, K, small)

    def calls(self, mode: str) -> dict[str, Callable[[], None]]:
        """One call of each layer in the mode."""
        for layer in self.layers.values():
            layer.train(mode == STEP)

        @torch.no_grad()
        def inference(layer: nn.Module) -> None:
            layer(self.x)

        def step(layer: nn.Module) -> None:
            torch.autograd.grad(layer(self.x), (self.x, *self.fused.parameters()), self.dy)

        run = step if mode == STEP else inference
        return {name: partial(run, layer) for name, layer in self.layers.items()}


def saved_bytes(layer: nn.Module, *inputs: Tensor) -> int:
    """Storages that autograd keeps, each once and whole, beside inputs, y, parameters, buffers."""
    saved: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.train()(*inputs)
    for t in (*inputs, y, *layer.parameters(), *layer.buffers()):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def check(job: Any) -> str | None:
    """What of y and the gradients is wrong, beside eager in float64.

    Their RMS error may be twice eager's, as sums run in another order, plus one rounding step.
    Where an activation's derivative jumps, an element that rounds across has its gradient right or
    wrong as a whole, in eager too: about 16 eps of them lie that near, sqrt(16 eps) of the RMS.
    """
    eps = torch.finfo(job.dy.dtype).eps
    kink = math.sqrt(16 * eps) if job.case.activation in KINKED else 0.0
    names = [*("x", "residual")[: len(job.inputs)], *dict(job.eager.named_parameters())]

    def results(layer: nn.Module, leaves: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
        y = layer.train()(*leaves[: len(job.inputs)])
        grads = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach(), **{f"d {n}": g for n, g in zip(names, grads, strict=True)}}

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    double, leaves = copy.deepcopy(job.eager).double(), [*job.inputs, *job.eager.parameters()]
    inputs = [t.detach().double().requires_grad_() for t in job.inputs]
    exact = results(double, [*inputs, *double.parameters()], job.dy.double())
    eager, fused = (results(layer, leaves, job.dy) for layer in (job.eager, job.fused))
    for name, truth in exact.items():
        error = rms(fused[name] - truth)
        allowed = 2 * rms(eager[name] - truth) + (eps + kink * (name != "y")) * rms(truth)
        if name.endswith("linear.bias") and job.case.norm == "batch":  # 0, but M roundings are not
            allowed += eps * math.sqrt(len(job.dy)) * rms(job.dy)
        if not error <= allowed:
            told = f"RMS error {error:.3g}, expected at most {allowed:.3g}"
            return f"{name.replace('layer.', '')} has {told}"
    return None


def measure(job: Job, dtype: str, mode: str, seconds: float) -> dict[str, Any]:
    """A row, as in the results files of the source repository."""
    case, calls = job.case, job.calls(mode)
    rounds, calm = interleave(calls, job.device, seconds)
    recipe = ("rows", "features", "out_features", "order", "norm", "activation")
    row: dict[str, Any] = {"case": f"{case} {case.shape}", "dtype": dtype, "mode": mode}
    row |= dict(zip(recipe, case, strict=True))
    row |= {"backend": job.backend, "rounds": len(rounds), "calm": calm}
    row |= compare(rounds, calm, ("eager",))
    if mode == STEP:
        row["saved_bytes"] = {name: saved_bytes(layer, job.x) for name, layer in job.layers.items()}
    return row


def compare(rounds: list[dict[str, float]], calm: bool, rivals: Sequence[str]) -> dict[str, Any]:
    """Times and ratios over the rounds, and to which of its rivals fused loses."""
    names = list(rounds[0])
    times = {name: summary([1e6 * each[name] for each in rounds]) for name in names}
    ratios = {n: summary([each[n] / each["fused"] for each in rounds]) for n in names}
    del ratios["fused"]
    judged = {name: ratios[name] for name in rivals if calm and name in ratios}
    slower = [n for n, r in judged.items() if r["median"] < 1 - NOISE and r["q3"] < 1]
    return {"times_us": times, "ratios": ratios, "slower_than": slower}


def bench(
    cases: Sequence[Case], dtype: str, device: torch.device, seconds: float, show: Show
) -> dict[str, Any]:
    """Every case in both modes: what was measured, and which layers are wrong or did not run."""
    end, modes = perf_counter() + seconds, (INFERENCE, STEP)
    rows: list[dict[str, Any]] = []
    wrong, failed = {}, {}
    for done, case in enumerate(cases):
        name = f"{case} {case.shape}"
        try:
            job = Job(case, dtype, device)
            told = check(job)
            if told is not None:
                wrong[name] = told
                continue
            for i, mode in enumerate(modes):
                show(done + i / len(modes), f"{name}, {mode}")
                left = len(modes) * (len(cases) - done) - i
                rows.append(measure(job, dtype, mode, max(0.0, end - perf_counter()) / left))
        except (RuntimeError, ValueError) as error:  # out of memory, one row for a batch norm
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    show(len(cases), "done")
    return {
        "fusedres": fusedres.__version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "machine": system.machine(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "rows": rows,
        "wrong": wrong,
        "failed": failed,
    }
