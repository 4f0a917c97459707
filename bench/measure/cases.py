"""What is timed: layers from real models and square sweeps, and the tensors they run on.

The eager layer is written by hand from torch's own layers, as users write it. It shares the
parameters and inputs of the fused one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from fusedres import FusedResidual, FusedResidualMLP, backends
from fusedres.dtypes import typed
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import Spec
from fusedres.tools.bench import DTYPES, INFERENCE, STEP

RECORD = "forward, recording"
ONE_THREAD, STEP_ONE_THREAD = "forward, one thread", "forward + backward, one thread"
GRAPH, RECORD_GRAPH = "forward, CUDA graph", "forward, recording, CUDA graph"
BACKWARD_GRAPH = "backward, CUDA graph"
GRAPHS = (GRAPH, RECORD_GRAPH, BACKWARD_GRAPH)
FORWARDS, STEPS = (INFERENCE, ONE_THREAD, GRAPH), (STEP, STEP_ONE_THREAD)
MODES = {
    INFERENCE: "under no_grad, in eval()",
    RECORD: "in train(), with the graph for backward",
    STEP: "in train(), gradients of x, residual and every parameter",
    ONE_THREAD: "as forward, with one thread of torch's and its CPU time",
    STEP_ONE_THREAD: "as forward + backward, with one thread of torch's and its CPU time",
    GRAPH: "as forward, many calls captured in one CUDA graph",
    RECORD_GRAPH: "as forward, recording, many calls captured in one CUDA graph",
    BACKWARD_GRAPH: "gradients of x, residual and every parameter for one recorded forward pass, "
    "many times in one CUDA graph",
}
AUTOCAST = "autocast"  # tensors in fp32, products in bf16
TENSORS = DTYPES | {AUTOCAST: torch.float32}
MODEL, SQUARE, HOST = "model", "square", "host"
MLP = "norm-linear-act-linear-add"

# linear f (of MLP: both), norm n, activation a, input x, shortcut r
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "note": lambda f, n, a, x, r: a(n(f(x))) + r,
    "resnet-v1": lambda f, n, a, x, r: a(n(f(x)) + r),
    "preact": lambda f, n, a, x, r: f(a(n(x))) + r,
    "prenorm": lambda f, n, a, x, r: a(f(n(x))) + r,
    "postnorm": lambda f, n, a, x, r: n(a(f(x)) + r),
    "bert-output": lambda f, n, a, x, r: n(f(x) + r),
    "linear-norm-add": lambda f, n, a, x, r: n(f(x)) + r,
    MLP: lambda f, n, a, x, r: f[1](a(f[0](n(x)))) + r,
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
    group: str = MODEL
    hidden: int | None = None  # width between the two matmuls of order MLP
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def weights(self) -> int:
        """How many elements the weight has, or both have."""
        return self.features * (2 * self.hidden if self.hidden else self.features)

    @property
    def modes(self) -> tuple[str, ...]:
        """On every device; on a GPU also GRAPH where there is something to compute."""
        return (INFERENCE, RECORD, STEP) if self.group == HOST else (INFERENCE, STEP)


class Task(NamedTuple):
    """What becomes one row of the results."""

    case: Case
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype}, {self.mode}"


def product_dtype(dtype: str) -> str:
    """The one that a row's products are taken in."""
    return "bf16" if dtype == AUTOCAST else dtype


def square(
    rows: int, features: int, order: str = "note", norm: str = "layer", activation: str = "gelu"
) -> Case:
    recipe = order, norm, activation
    suffix = "".join(f"-{word}" for word in recipe if word not in ("note", "layer", "gelu"))
    return Case(f"square-{rows}x{features}{suffix}", rows, features, *recipe, group=SQUARE)


TINY = Case("tiny", 4, 8, activation="relu", group=HOST, dtypes=("fp32",))
MODELS = (
    Case("rtdl-339", 512, 339, "prenorm", "batch", "relu"),  # tabular ResNet
    Case("simba-128", 256, 128, "prenorm", activation="relu"),  # reinforcement learning
    Case("deep-rl-256", 256, 256, activation="silu"),  # 1000-layer contrastive RL
    Case("vit-384", 788, 384),  # 4 images of 197 tokens
    Case("bert-768", 512, 768, "bert-output", activation=None, residual=True, eps=1e-12),
    Case("gnn-128", 4096, 128, norm="batch", activation="relu"),
    Case("mesh-128", 16384, 128, "linear-norm-add", activation=None, residual=True),
    Case("rtdl-466", 512, 466),
    Case("vit-mlp-384", 788, 384, MLP, hidden=1536),
    Case("bro-512", 256, 512, activation="relu"),  # one matmul of its block
    Case("simba-512", 256, 512, "prenorm", activation="relu"),
    Case("resnet-v1-256", 1024, 256, "resnet-v1", "batch", "relu"),
    Case("digits", 128, 64, activation="relu"),  # examples/degradation.py
    Case("vla-4096", 64, 4096, "prenorm", activation="relu", dtypes=("bf16",)),  # action head
    Case("bert-1024", 512, 1024, "bert-output", activation=None, residual=True, eps=1e-12),
    Case("rtdl-168", 256, 168, "prenorm", "batch", "relu"),
    Case("rtdl-699", 1024, 699, "prenorm", "batch", "relu"),
    Case("postnorm-512", 1024, 512, "postnorm"),
    Case("rms-1024", 512, 1024, norm="rms", activation="silu"),
)
ROWS, WIDTHS = (256, 4096, 65536), (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SQUARES = tuple(square(rows, width) for width in WIDTHS for rows in ROWS)  # the small ones first
CASES = (TINY, *MODELS, *SQUARES)


class Eager(nn.Module):
    """The layer as users write it: nn.Linear, nn.LayerNorm, F.gelu and +."""

    def __init__(self, case: Case, linear: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        self.formula = FORMULAS[case.order]
        self.activation = ACTIVATION_FUNCTIONS.get(str(case.activation), lambda h: h)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        r = x if residual is None else residual
        return self.formula(self.linear, self.norm, self.activation, x, r)


Call = Callable[[], object]


class Operands(NamedTuple):
    inputs: tuple[Tensor, ...]  # x (M, K), residual (M, N) if it is another one
    dy: Tensor  # (M, N)


class Job:
    """A case with its tensors; `copies` sets of inputs, through which calls rotate."""

    def __init__(self, case: Case, dtype: str, device: torch.device, copies: int = 1) -> None:
        torch.manual_seed(0)
        self.case, self.dtype, self.device = case, dtype, device
        self.where: Any = {"device": device, "dtype": TENSORS[dtype]}
        self.fused = self.layer(case.activation)
        layers = (self.fused.fc1, self.fused.fc2) if case.hidden else (self.fused,)
        self.first = layers[0]
        self.norm: Any = self.first.norm
        nn.init.normal_(self.norm.weight, 1.0, 0.1)
        if getattr(self.norm, "bias", None) is not None:
            nn.init.normal_(self.norm.bias, 0.0, 0.1)
        self.linears: list[nn.Linear] = [layer.linear for layer in layers]
        linear = nn.ModuleList(self.linears) if case.hidden else self.first.linear
        self.eager = Eager(case, linear, self.norm)
        self.parameters = tuple(self.eager.parameters())
        self.sets = [self._operands() for _ in range(copies)]
        self.inputs, self.dy = self.sets[0]

    @property
    def spec(self) -> Spec:
        """Of the first fused call, in the mode of the last `call`: that tells batch norm's."""
        return self.first.spec.with_batch_stats(self.case.norm == "batch" and self.norm.training)

    @property
    def backend(self) -> str:
        """The one that `auto` takes for that call."""
        (N, K), spec, dtype = self.first.linear.weight.shape, self.spec.text, self.where["dtype"]
        if self.dtype == AUTOCAST:
            spec, dtype = typed(spec, dtype, dtype, None, DTYPES["bf16"], self.device.type)
        small = backends.is_small(self.device, dtype, self.case.rows, N, K)
        return backends.choose("auto", spec, dtype, self.device, N, K, small)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES["bf16"], enabled=self.dtype == AUTOCAST)

    def layer(self, activation: str | None) -> Any:
        """A fused layer of the case with parameters of its own."""
        case = self.case
        settings: Any = {"order": case.order, "norm": case.norm, "eps": case.eps, **self.where}
        if case.hidden:
            widths = case.features, case.hidden
            return FusedResidualMLP(*widths, activation=activation, **settings)
        return FusedResidual(case.features, activation=activation, **settings)

    def _operands(self) -> Operands:
        shape = (self.case.rows, self.case.features)
        x, residual, dy = (torch.randn(shape, **self.where) for _ in range(3))
        inputs = (x, residual) if self.case.residual else (x,)
        return Operands(tuple(t.requires_grad_() for t in inputs), dy)

    def set_mode(self, mode: str) -> None:
        for module in (self.fused, self.eager):
            module.train(mode not in FORWARDS)

    def call(self, layer: Callable[..., Tensor], mode: str) -> Call:
        """One thing to time: `layer` run once in `mode`, each time on the next set of inputs."""
        self.set_mode(mode)
        if isinstance(layer, nn.Module):
            layer.train(self.fused.training)
        if self.dtype == AUTOCAST:
            layer = self._cast(layer)
        turns, parameters = cycle(self.sets), self.parameters

        def record() -> None:
            layer(*next(turns).inputs)

        def step() -> None:
            inputs, dy = next(turns)
            layer(*inputs).backward(dy)
            for t in (*inputs, *parameters):
                t.grad = None

        if mode == BACKWARD_GRAPH:
            return self._backward(layer)
        if mode in FORWARDS:
            return torch.no_grad()(record)
        return step if mode in STEPS else record

    def _cast(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast(*inputs: Tensor) -> Tensor:
            with self.autocast():
                return layer(*inputs)

        return cast

    def _backward(self, layer: Callable[..., Tensor]) -> Call:
        with functorch_config.patch(donated_buffer=False):  # else a compiled one runs only once
            recorded = [(layer(*inputs), inputs, dy) for inputs, dy in self.sets]
        turns, parameters = cycle(recorded), self.parameters

        def gradients() -> object:
            y, inputs, dy = next(turns)
            return torch.autograd.grad(y, (*inputs, *parameters), dy, retain_graph=True)

        return gradients
