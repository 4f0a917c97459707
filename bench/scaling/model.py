"""What a layer costs by arithmetic: FLOPs and bytes of its kernels, seconds by a roofline, memory.
Rows M, features K in and N out, b bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from fusedres.spec import Spec, make_spec

from ..measure.cases import DTYPES, INFERENCE, STEP

EXACT = 4  # bytes of a statistic in fp32
FROM_OUTPUT = ("relu", "tanh", "sigmoid")  # their derivative needs h alone, so eager keeps h


class Kernel(NamedTuple):
    """One launch: what it computes and what it moves."""

    flops: int
    bytes: int


def move(count: int) -> Kernel:
    return Kernel(0, count)


@dataclass(frozen=True)
class Layer:
    """With `residual` the shortcut is another tensor than x."""

    M: int
    K: int
    N: int
    order: str = "note"
    norm: str | None = "layer"
    activation: str | None = "gelu"
    dtype: str = "fp32"
    residual: bool = False
    training: bool = True

    @cached_property
    def spec(self) -> Spec:
        return make_spec(self.order, self.norm, self.activation, training=self.training)

    @property
    def b(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def x(self) -> int:
        """Bytes of x (M, K)."""
        return self.M * self.K * self.b

    @property
    def y(self) -> int:
        """Bytes of y, of z and of whatever follows `linear` (M, N)."""
        return self.M * self.N * self.b

    @property
    def width(self) -> int:
        """Of the norm's tensor."""
        return self.spec.width("norm", self.K, self.N)

    def tensor(self, stage: str) -> int:
        """Bytes of the tensor on which `stage` acts."""
        return self.M * self.spec.width(stage, self.K, self.N) * self.b

    def product(self) -> Kernel:
        """M x K by K x N: 2 M N K FLOPs; each of the three matrices moves once."""
        return Kernel(2 * self.M * self.N * self.K, self.x + self.N * self.K * self.b + self.y)

    @property
    def parameters(self) -> int:
        """weight (N, K), bias (N) and the norm's gamma and beta."""
        vectors = {None: 0, "rms": 1}.get(self.spec.norm, 2)
        return self.N * self.K + self.N + vectors * self.width


def of_row(row: dict[str, Any]) -> Layer:
    """The layer of a results row. What stands as the shortcut follows from the bytes counted."""
    sizes = row["rows"], row["features"], row["out_features"]
    layer = Layer(*sizes, row["order"], row["norm"], row["activation"], row["dtype"])
    passes = 3 if row["mode"] == STEP else 1
    return replace(layer, residual=row["bytes"] >= passes * (layer.product().bytes + layer.y))


def eager_forward(layer: Layer) -> Iterator[Kernel]:
    """One kernel a stage. norm and act read and write a tensor, add reads two and writes one; batch
    norm's statistics take one more reading.
    """
    for stage in layer.spec.stages:
        if stage == "linear":
            yield layer.product()
        else:
            three = stage == "add" or (stage == "norm" and layer.spec.batch_stats)
            yield move((3 if three else 2) * layer.tensor(stage))


def eager_backward(layer: Layer) -> Iterator[Kernel]:
    """act and norm read dh and what was saved and write a gradient; a norm's column sums read both
    again; linear sums dz down for the bias and has two products; add hands dy on, and where both
    its sides come from x, their gradients are added.
    """
    for stage in reversed(layer.spec.stages):
        if stage == "linear":
            yield from (move(layer.y), layer.product(), layer.product())
        elif stage == "add":
            yield from () if layer.residual else (move(3 * layer.x),)
        else:
            yield move(3 * layer.tensor(stage))
            yield from (move(2 * layer.tensor(stage)),) if stage == "norm" else ()


def fused_forward(layer: Layer, device: str) -> Iterator[Kernel]:
    """GPU: one kernel; x, weight and what stands for the shortcut are read, y is written, x once
    for both its uses. CPU: the product, and a pass over rows on either side of it that has stages.
    """
    product, shortcut = layer.product(), "add" in layer.spec.stages
    if device == "cuda":
        yield Kernel(product.flops, product.bytes + (shortcut and layer.residual) * layer.y)
        return
    if layer.spec.batch_stats:
        yield move(layer.tensor("norm"))  # the statistics
    if layer.spec.prologue:
        yield move(2 * layer.x)
    yield product
    if layer.spec.epilogue:
        yield move((2 + shortcut) * layer.y)


def fused_backward(layer: Layer, device: str) -> Iterator[Kernel]:
    """A pass dy, z -> dz where backward needs z, the two products, and a pass for dx where stages
    stand before linear or, on a CPU, where the shortcut's gradient is added; GPUs add it in the
    product. Batch norm on a CPU reads dy and its tensor once more, for the sums.
    """
    dx = dw = layer.product()
    added = "add" in layer.spec.stages and not layer.residual
    if layer.spec.batch_stats and device == "cpu":
        yield move(2 * layer.tensor("norm"))
    if layer.spec.saves_z:
        yield move(3 * layer.y)
    if device == "cuda" and added:
        dx = Kernel(dx.flops, dx.bytes + layer.y)
    yield from (dx, dw)
    if layer.spec.prologue or (added and device == "cpu"):
        yield move((3 + (added and bool(layer.spec.prologue))) * layer.x)


def kernels(layer: Layer, contender: str, mode: str, device: str) -> list[Kernel]:
    """Of one call; `mode` as in the results file."""
    layer = replace(layer, training=mode != INFERENCE)
    if contender == "eager":
        return [*eager_forward(layer), *(eager_backward(layer) if mode == STEP else ())]
    found = list(fused_forward(layer, device))
    return found + list(fused_backward(layer, device)) if mode == STEP else found


@dataclass(frozen=True)
class Machine:
    """Ceilings in FLOP/s and bytes/s, overheads in seconds; `source` says how they are known."""

    device: str
    name: str
    source: str
    copy: float
    matmul: dict[str, float]
    launch: float  # of one kernel
    host: dict[tuple[str, str], float] = field(default_factory=dict)  # of a call, where measured
    link: float = 0.0  # of one GPU, each way
    latency: float = 0.0  # of one collective


def seconds(layer: Layer, contender: str, mode: str, machine: Machine) -> float:
    """Kernels run one after another, each as long as the slower of its arithmetic and its traffic:
    t = sum max(flops / peak, bytes / bandwidth) + overhead. On a CPU fused multiplies fp16 in fp32.
    """
    found = kernels(layer, contender, mode, machine.device)
    in_fp32 = (layer.dtype, contender, machine.device) == ("fp16", "fused", "cpu")
    peak = machine.matmul["fp32" if in_fp32 else layer.dtype]
    overhead = machine.host.get((contender, mode), len(found) * machine.launch)
    return sum(max(k.flops / peak, k.bytes / machine.copy) for k in found) + overhead


def saved_bytes(layer: Layer, contender: str, device: str) -> int:
    """Kept for backward beyond x, y and parameters.

    fused: z where a stage after linear needs it, and batch norm's mean and variance; on a GPU mean
    and rstd of each row too. eager: the input of norm, linear and activation (of FROM_OUTPUT the
    output), mean and rstd. On a CPU torch keeps statistics in the layer's dtype, and RMSNorm is no
    op of its own there: it keeps its input and the normalised rows in fp32.
    """
    spec, M = layer.spec, layer.M
    if contender == "fused":
        rows = 2 * M if device == "cuda" and spec.norm in ("layer", "rms") else 0
        vectors = 2 * layer.width if spec.batch_stats else rows
        return spec.saves_z * layer.y + vectors * EXACT
    kept, more = set(), 0  # tensors, numbered by the stages before them: 0 is x, the last is y
    composed = spec.norm == "rms" and device == "cpu"
    for i, stage in enumerate(spec.stages):
        if stage == "norm" and composed:
            more = M * layer.width * EXACT * (2 if layer.b < EXACT else 1)
        if stage == "linear" or (stage == "norm" and not (composed and layer.b < EXACT)):
            kept.add(i)
        if stage == "act":
            kept.add(i + (spec.activation in FROM_OUTPUT))
    linear = spec.stages.index("linear")
    more += sum(layer.y if i > linear else layer.x for i in kept - {0, len(spec.stages)})
    # mean and rstd; RMSNorm has no mean
    numbers = {None: 0, "layer": 2 * M, "rms": M, "batch": 2 * layer.width}[spec.norm]
    return more + numbers * (EXACT if device == "cuda" or composed else layer.b)


def depth_bytes(layer: Layer, contender: str, depth: int, device: str) -> int:
    """Activations of `depth` square layers at the end of forward: x of the first, y of each (the
    next one's x), and what each one saves.
    """
    return layer.y + depth * (layer.y + saved_bytes(layer, contender, device))
