"""What is timed: layers from real models, and the contenders that run them.

All contenders of a case share its parameters and inputs. The eager one is written by hand from
torch's own layers, as users write it, and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INFERENCE, RECORD, STEP = "forward", "forward, recording", "forward + backward"
MODES = {
    INFERENCE: "under no_grad, in eval()",
    RECORD: "in train(), with the graph for backward",
    STEP: "in train(), gradients of x, residual and every parameter",
}

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# linear f, norm n, activation a, input x, shortcut r
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "note": lambda f, n, a, x, r: a(n(f(x))) + r,
    "resnet-v1": lambda f, n, a, x, r: a(n(f(x)) + r),
    "prenorm": lambda f, n, a, x, r: a(f(n(x))) + r,
    "postnorm": lambda f, n, a, x, r: n(a(f(x)) + r),
    "bert-output": lambda f, n, a, x, r: n(f(x) + r),
    "linear-norm-add": lambda f, n, a, x, r: n(f(x)) + r,
}


@dataclass(frozen=True)
class Case:
    """One layer on x (rows, features); with `residual`, the shortcut is another tensor than x."""

    name: str
    rows: int
    features: int
    order: str = "note"
    norm: str = "layer"
    activation: str | None = "gelu"
    residual: bool = False
    eps: float = 1e-5
    host: bool = False  # nothing to compute, so what is timed is the host's path through the layer

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("fp32",) if self.host else tuple(DTYPES)

    @property
    def modes(self) -> tuple[str, ...]:
        return (INFERENCE, RECORD, STEP) if self.host else (INFERENCE, STEP)

    @property
    def contenders(self) -> tuple[str, ...]:
        return tuple(name for name in CONTENDERS if self.host or name != "functional")


CASES = (
    Case("tiny", 4, 8, activation="relu", host=True),
    Case("digits", 128, 64, activation="relu"),  # examples/degradation.py
    Case("rtdl-339", 512, 339, "prenorm", "batch", "relu"),  # tabular ResNet
    Case("rtdl-466", 512, 466),
    Case("simba-128", 256, 128, "prenorm", activation="relu"),  # reinforcement learning
    Case("deep-rl-256", 256, 256, activation="silu"),  # 1000-layer contrastive RL
    Case("simba-512", 256, 512, "prenorm", activation="relu"),
    Case("gnn-128", 4096, 128, norm="batch", activation="relu"),
    Case("mesh-128", 16384, 128, "linear-norm-add", activation=None, residual=True),
    Case("resnet-v1-256", 1024, 256, "resnet-v1", "batch", "relu"),
    Case("vit-384", 788, 384),  # 4 images of 197 tokens
    Case("postnorm-512", 1024, 512, "postnorm"),
    Case("bert-768", 512, 768, "bert-output", activation=None, residual=True, eps=1e-12),
    Case("wide-1024", 512, 1024),
    Case("square-512", 4096, 512),
)


class Eager(nn.Module):
    """The layer as users write it: nn.Linear, nn.LayerNorm, F.gelu and +."""

    def __init__(self, case: Case, linear: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        self.formula, self.activation = FORMULAS[case.order], ACTIVATIONS[case.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        r = x if residual is None else residual
        return self.formula(self.linear, self.norm, self.activation, x, r)


def functional(job: Job) -> Callable[..., Tensor]:
    """Order note with ReLU and no module call: the shortest host path that eager torch has."""
    linear, norm, features = job.fused.linear, job.fused.norm, (job.case.features,)
    weight, bias, gamma, beta = linear.weight, linear.bias, norm.weight, norm.bias
    return lambda x: F.relu(F.layer_norm(F.linear(x, weight, bias), features, gamma, beta)) + x


CONTENDERS: dict[str, Callable[[Job], Callable[..., Tensor]]] = {
    "functional": functional,
    "eager": lambda job: job.eager,
    "compile": lambda job: torch.compile(job.eager, dynamic=False, fullgraph=True),
    "fused": lambda job: job.fused,
}


class Job:
    """A case with its tensors."""

    def __init__(self, case: Case, dtype: str, device: torch.device) -> None:
        torch.manual_seed(0)
        where: Any = {"device": device, "dtype": DTYPES[dtype]}
        settings: Any = {"order": case.order, "norm": case.norm, "activation": case.activation}
        fused: Any = fusedres.FusedResidual(case.features, eps=case.eps, **settings, **where)
        nn.init.normal_(fused.norm.weight, 1.0, 0.1)
        nn.init.normal_(fused.norm.bias, 0.0, 0.1)
        self.case, self.dtype, self.device, self.fused = case, dtype, device, fused
        self.eager = Eager(case, fused.linear, fused.norm)
        x, residual, self.dy = (torch.randn(case.rows, case.features, **where) for _ in range(3))
        self.inputs = (x, residual) if case.residual else (x,)
        self.leaves = (*self.inputs, *fused.parameters())
        for t in self.inputs:
            t.requires_grad_()
        self.backend = backends.choose(
            "auto", fused.spec.text, DTYPES[dtype], device, case.features, case.features
        )

    def call(self, layer: Callable[..., Tensor], mode: str) -> Callable[[], None]:
        """One thing to time: `layer` run once in `mode`."""
        self.fused.train(mode != INFERENCE)
        self.eager.train(mode != INFERENCE)
        inputs, dy, leaves = self.inputs, self.dy, self.leaves

        @torch.no_grad()
        def inference() -> None:
            layer(*inputs)

        def record() -> None:
            layer(*inputs)

        def step() -> None:
            layer(*inputs).backward(dy)
            for t in leaves:
                t.grad = None

        return {INFERENCE: inference, RECORD: record, STEP: step}[mode]
