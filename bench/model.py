"""What a layer costs by arithmetic: FLOPs and bytes of its kernels, seconds by a roofline, memory.
Rows M, features K in and N out, b bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from fusedres.spec import Spec, make_spec

from .cases import INFERENCE, STEP

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EXACT = 4  # bytes of a statistic in fp32
FROM_OUTPUT = ("relu", "tanh", "sigmoid")  # their derivative needs h alone, so eager keeps h


class Kernel(NamedTuple):
    """One launch: what it computes and what it moves."""

    flops: int
    bytes: int


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
        return BYTES[self.dtype]

    def tensor(self, stage: str) -> int:
        """Bytes of the tensor on which `stage` acts."""
        return self.M * self.spec.width(stage, self.K, self.N) * self.b

    def product(self) -> Kernel:
        """M x K by K x N: 2 M N K FLOPs; each of the three matrices moves once."""
        elements = self.M * self.K + self.N * self.K + self.M * self.N
        return Kernel(2 * self.M * self.N * self.K, elements * self.b)

    @property
    def parameters(self) -> int:
        """weight (N, K), bias (N) and the norm's gamma and beta."""
        vectors = {None: 0, "rms": 1}.get(self.spec.norm, 2)
        width = self.spec.width("norm", self.K, self.N)
        return self.N * self.K + self.N + vectors * width


def of_row(row: dict[str, Any]) -> Layer:
    """The layer of a results row. What stands as the shortcut follows from the bytes counted."""
    layer = Layer(
        row["rows"],
        row["features"],
        row["out_features"],
        row["order"],
        row["norm"],
        row["activation"],
        row["dtype"],
    )
    passes = 3 if row["mode"] == STEP else 1
    moved = layer.product().bytes + layer.M * layer.N * layer.b
    return replace(layer, residual=row["bytes"] >= passes * moved)


def eager_forward(layer: Layer) -> Iterator[Kernel]:
    """One kernel a stage. norm and act read and write a tensor, add reads two and writes one; batch
    norm's statistics take one more reading.
    """
    for stage in layer.spec.stages:
        if stage == "linear":
            yield layer.product()
        else:
            three = stage == "add" or (stage == "norm" and layer.spec.batch_stats)
            yield Kernel(0, (3 if three else 2) * layer.tensor(stage))


def eager_backward(layer: Layer) -> Iterator[Kernel]:
    """act and norm read dh and what was saved and write a gradient; a norm's column sums read both
    again; linear sums dz down for the bias and has two products; add hands dy on, and where both
    its sides come from x, their gradients are added.
    """
    for stage in reversed(layer.spec.stages):
        tensor = layer.tensor(stage)
        if stage == "linear":
            yield Kernel(0, layer.M * layer.N * layer.b)
            yield from (layer.product(), layer.product())
        elif stage == "add":
            if not layer.residual:
                yield Kernel(0, 3 * layer.M * layer.K * layer.b)
        else:
            yield Kernel(0, 3 * tensor)
            if stage == "norm":
                yield Kernel(0, 2 * tensor)


def fused_forward(layer: Layer, device: str) -> Iterator[Kernel]:
    """GPU: one kernel; x, weight and what stands for the shortcut are read, y is written, x once
    for both its uses. CPU: the product, and a pass over rows on either side of it that has stages.
    """
    product, shortcut = layer.product(), "add" in layer.spec.stages
    if device == "cuda":
        other = layer.M * layer.N * layer.b if shortcut and layer.residual else 0
        yield Kernel(product.flops, product.bytes + other)
        return
    if layer.spec.batch_stats:
        yield Kernel(0, layer.tensor("norm"))  # the statistics
    if layer.spec.prologue:
        yield Kernel(0, 2 * layer.M * layer.K * layer.b)
    yield product
    if layer.spec.epilogue:
        yield Kernel(0, (2 + shortcut) * layer.M * layer.N * layer.b)


def fused_backward(layer: Layer, device: str) -> Iterator[Kernel]:
    """A pass dy, z -> dz where backward needs z, the two products, and a pass for dx where stages
    stand before linear or, on a CPU, where the shortcut's gradient is added; GPUs add it in the
    product. Batch norm on a CPU reads dy and its tensor once more, for the sums.
    """
    rows_in, rows_out = layer.M * layer.K * layer.b, layer.M * layer.N * layer.b
    added = "add" in layer.spec.stages and not layer.residual
    if layer.spec.batch_stats and device == "cpu":
        yield Kernel(0, 2 * layer.tensor("norm"))
    if layer.spec.saves_z:
        yield Kernel(0, 3 * rows_out)
    dx = layer.product()
    if device == "cuda" and added:
        dx = Kernel(dx.flops, dx.bytes + rows_out)
    yield from (dx, layer.product())
    if layer.spec.prologue or (added and device == "cpu"):
        yield Kernel(0, (3 + (added and bool(layer.spec.prologue))) * rows_in)


def kernels(layer: Layer, contender: str, mode: str, device: str) -> list[Kernel]:
    """Of one call; `mode` as in the results file."""
    layer = replace(layer, training=mode != INFERENCE)
    if contender == "eager":
        found = list(eager_forward(layer))
        return found + list(eager_backward(layer)) if mode == STEP else found
    found = list(fused_forward(layer, device))
    return found + list(fused_backward(layer, device)) if mode == STEP else found


@dataclass(frozen=True)
class Machine:
    """Ceilings in FLOP/s and bytes/s, overheads in seconds; `source` says how they are known."""

    device: str
    name: str
    copy: float
    matmul: dict[str, float]
    launch: float  # of one kernel
    source: str
    host: dict[tuple[str, str], float]  # of a call, by contender and mode, where measured
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
    width = spec.width("norm", layer.K, layer.N)
    if contender == "fused":
        rows = 2 * M if device == "cuda" and spec.norm in ("layer", "rms") else 0
        vectors = 2 * width if spec.batch_stats else rows
        return spec.saves_z * M * layer.N * layer.b + vectors * EXACT
    kept, more = set(), 0  # tensors, numbered by the stages before them: 0 is x, the last is y
    statistic = EXACT if device == "cuda" else layer.b
    for i, stage in enumerate(spec.stages):
        if (stage, spec.norm, device) == ("norm", "rms", "cpu"):
            statistic = EXACT
            more += M * width * EXACT  # the normalised rows
            if layer.b < EXACT:
                more += M * width * EXACT  # the input in fp32
                continue
        if stage in ("norm", "linear"):
            kept.add(i)
        if stage == "act":
            kept.add(i + (spec.activation in FROM_OUTPUT))
    kept -= {0, len(spec.stages)}
    linear = spec.stages.index("linear")
    tensors = sum(M * (layer.N if i > linear else layer.K) * layer.b for i in kept)
    return tensors + more + _statistics(spec.norm, M, width) * statistic


def _statistics(norm: str | None, rows: int, width: int) -> int:
    """How many numbers mean and rstd are; RMSNorm has no mean."""
    return {None: 0, "layer": 2 * rows, "rms": rows, "batch": 2 * width}[norm]


def depth_bytes(layer: Layer, contender: str, depth: int, device: str) -> int:
    """Activations of `depth` square layers at the end of forward: x of the first, y of each (the
    next one's x), and what each one saves.
    """
    one = layer.M * layer.N * layer.b
    return one + depth * (one + saved_bytes(layer, contender, device))
