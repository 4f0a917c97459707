"""What a layer costs by arithmetic: FLOPs and bytes of its kernels, seconds by a roofline, memory,
and what p GPUs exchange. Rows M, features K in and N out, b bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from fusedres.spec import Spec, make_spec

from ..measure.cases import DTYPES, INFERENCE, STEP

EXACT = 4  # bytes of a statistic in fp32
FROM_OUTPUT = ("relu", "tanh", "sigmoid")  # their derivative needs h alone, so eager keeps h


class Kernel(NamedTuple):
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

    @cached_property
    def b(self) -> int:
        return DTYPES[self.dtype].itemsize

    @cached_property
    def x(self) -> int:  # bytes of (M, K)
        return self.M * self.K * self.b

    @cached_property
    def y(self) -> int:  # bytes of (M, N)
        return self.M * self.N * self.b

    @cached_property
    def width(self) -> int:
        """Of the norm's tensor."""
        return self.spec.width("norm", self.K, self.N)

    @cached_property
    def product(self) -> Kernel:
        """M x K by K x N: 2 M N K FLOPs; each of the three matrices moves once."""
        return Kernel(2 * self.M * self.N * self.K, self.x + self.N * self.K * self.b + self.y)

    @cached_property
    def parameters(self) -> int:
        """weight (N, K), bias (N) and the norm's gamma and beta."""
        vectors = {None: 0, "rms": 1}.get(self.spec.norm, 2)
        return self.N * self.K + self.N + vectors * self.width

    def move(self, times: int, stage: str = "linear") -> Kernel:
        """A pass that reads and writes so often the tensor on which a stage acts; of linear: z."""
        wide = stage != "linear" and self.spec.width(stage, self.K, self.N) == self.K
        return Kernel(0, times * (self.x if wide else self.y))


def of_row(row: dict[str, Any]) -> Layer:
    """The layer of a results row. What stands as the shortcut follows from the bytes counted."""
    sizes = row["rows"], row["features"], row["out_features"]
    layer = Layer(*sizes, row["order"], row["norm"], row["activation"], row["dtype"])
    passes = 3 if row["mode"] == STEP else 1
    return replace(layer, residual=row["bytes"] >= passes * (layer.product.bytes + layer.y))


def eager(layer: Layer, backward: bool) -> list[Kernel]:
    """One kernel a stage. norm and act read and write a tensor, add reads two and writes one; batch
    norm's statistics take one more reading.

    Backward: act and norm read dh and what was saved and write a gradient; a norm's column sums
    read both again; linear sums dz down for the bias and has two products; add hands dy on, and
    where both its sides come from x, their gradients are added.
    """
    there, back, spec = [], [], layer.spec
    for stage in spec.stages:
        if stage == "linear":
            there.append(layer.product)
            back += [layer.move(1), layer.product, layer.product]
        elif stage == "add":
            there.append(layer.move(3, stage))
            back += [] if layer.residual else [Kernel(0, 3 * layer.x)]
        else:
            there.append(layer.move(3 if stage == "norm" and spec.batch_stats else 2, stage))
            back += [layer.move(n, stage) for n in ((3, 2) if stage == "norm" else (3,))]
    return there + back * backward


def fused_forward(layer: Layer, gpu: bool) -> list[Kernel]:
    """GPU: one kernel; x, weight and what stands for the shortcut are read, y is written, x once
    for both its uses. CPU: the product, and a pass over rows on either side of it that has stages.
    """
    product, spec, shortcut = layer.product, layer.spec, "add" in layer.spec.stages
    if gpu:
        return [Kernel(product.flops, product.bytes + (shortcut and layer.residual) * layer.y)]
    statistics = [layer.move(1, "norm")] if spec.batch_stats else []
    before = [Kernel(0, 2 * layer.x)] if spec.prologue else []
    after = [layer.move(2 + shortcut)] if spec.epilogue else []
    return [*statistics, *before, product, *after]


def fused_backward(layer: Layer, gpu: bool) -> list[Kernel]:
    """A pass dy, z -> dz where backward needs z, the two products, and a pass for dx where stages
    stand before linear or, on a CPU, where the shortcut's gradient is added; GPUs add it in the
    product. Batch norm on a CPU reads dy and its tensor once more, for the sums.
    """
    product, spec = layer.product, layer.spec
    added = "add" in spec.stages and not layer.residual
    sums = [layer.move(2, "norm")] if spec.batch_stats and not gpu else []
    dz = [layer.move(3)] if spec.saves_z else []
    products = [Kernel(product.flops, product.bytes + (gpu and added) * layer.y), product]
    passes = 3 + (added and bool(spec.prologue))
    dx = [Kernel(0, passes * layer.x)] if spec.prologue or (added and not gpu) else []
    return [*sums, *dz, *products, *dx]


def kernels(layer: Layer, contender: str, mode: str, device: str) -> list[Kernel]:
    """Of one call; `mode` as in the results file."""
    layer, gpu = replace(layer, training=mode != INFERENCE), device == "cuda"
    if contender == "eager":
        return eager(layer, mode == STEP)
    return fused_forward(layer, gpu) + (fused_backward(layer, gpu) if mode == STEP else [])


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
        stand_in = layer.residual and not spec.saves_residual  # of the residual: one element
        return spec.saves_z * layer.y + vectors * EXACT + stand_in * layer.b
    composed = spec.norm == "rms" and device == "cpu"
    twice = composed and layer.b < EXACT  # its input is kept in fp32, not as it is
    shifts = {"norm": () if twice else (0,), "linear": (0,)}
    shifts["act"] = (int(spec.activation in FROM_OUTPUT),)
    # Tensors, numbered by the stages before them: 0 is x, the last is y.
    kept = {i + n for i, stage in enumerate(spec.stages) for n in shifts.get(stage, ())}
    linear = spec.stages.index("linear")
    tensors = sum(layer.y if i > linear else layer.x for i in kept - {0, len(spec.stages)})
    exact = composed * (1 + twice) * M * layer.width * EXACT
    numbers = {None: 0, "layer": 2 * M, "rms": M, "batch": 2 * layer.width}[spec.norm]
    return tensors + exact + numbers * (EXACT if device == "cuda" or composed else layer.b)


def depth_bytes(layer: Layer, contender: str, depth: int, device: str) -> int:
    """Activations of `depth` square layers at the end of forward: x of the first, y of each (the
    next one's x), and what each one saves.
    """
    return layer.y + depth * (layer.y + saved_bytes(layer, contender, device))


def all_reduce(volume: float, p: int, machine: Machine) -> float:
    """Seconds to add up `volume` bytes over p GPUs in a ring: each sends 2 (p - 1) / p of it."""
    return 2 * (p - 1) / p * volume / machine.link + machine.latency


def all_gather(volume: float, p: int, machine: Machine) -> float:
    """Seconds until everyone has all `volume` bytes; of a reduce-scatter too. (p - 1) / p of it."""
    return (p - 1) / p * volume / machine.link + machine.latency


def data_parallel(layer: Layer, p: int, machine: Machine) -> float:
    """Seconds of a step's exchange with the batch or the sequence cut: gradients are added up; rows
    are independent, but for batch norm, which needs everyone's mean, M2 and count.
    """
    gradients = all_reduce(layer.parameters * layer.b, p, machine)
    if layer.spec.norm != "batch":
        return gradients
    statistics = all_gather(p * (2 * layer.width + 1) * EXACT, p, machine)
    return gradients + statistics + all_reduce(2 * layer.width * EXACT, p, machine)


def tensor_parallel(layer: Layer, p: int, machine: Machine) -> float:
    """Seconds of a step's exchange with weight cut by outputs: each GPU has x, makes N / p of z.

    forward: (mean, M2) of each row for a row norm, y gathered; backward: the norm's two row sums,
    dx, a sum over the cuts, reduced and scattered.
    """
    time = all_gather(layer.y, p, machine) + all_gather(layer.x, p, machine)
    if layer.spec.norm in ("layer", "rms") and "norm" in layer.spec.epilogue:
        time += all_gather(p * 2 * layer.M * EXACT, p, machine)
        time += all_reduce(2 * layer.M * EXACT, p, machine)
    return time
