"""The goals: what rows have to reach, as data; judge.py holds measurements against them.

On a GPU the yardstick T is the bare product by cuBLAS on the same tensors: x @ weight.T for the
forward pass, dy @ weight and dy.T @ x for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .cases import (
    BACKWARD_GRAPH,
    GRAPH,
    INFERENCE,
    MODELS,
    RECORD,
    RECORD_GRAPH,
    STEP,
    TINY,
    Task,
    square,
)

TALL, SHORT = 65536, 256  # rows
OF_PRODUCT, OF_EAGER, OF_LINEAR = "fused / matmul", "eager / fused", "fused / linear"
SAVED, PEAK = "saved, fused / eager", "peak, fused / eager"
LOST = "rows lost"  # of all that were measured, so such a goal has no tasks


@dataclass(frozen=True)
class Goal:
    """For each of `tasks` what `pair` tells is at most `bound`; with `least`, at least. `pair`: one
    of the constants above, "A / B" of a row's contenders, or one contender, for us.
    `beyond` would be better still. `fast`: for machines alone whose product in the tasks' dtype
    is no slower than half of the one in fp32, or with False slower.
    """

    what: str
    pair: str
    bound: float
    tasks: tuple[Task, ...] = ()
    least: bool = False
    beyond: float | None = None
    fast: bool | None = None

    def reaches(self, value: float, bound: float) -> bool:
        """To two digits, which is what a measurement is worth."""
        value = round(value, 2)
        return value >= bound if self.least else value <= bound


def wide(mode: str, *features: int, rows: int = TALL) -> tuple[Task, ...]:
    return tuple(Task(square(rows, n), "bf16", mode) for n in features)


NARROW = (256, 128, 64)
SMALL = (1024, 512, 256, 128, 64)
BATCH = Task(square(4096, 1024, norm="batch"), "bf16", RECORD_GRAPH)
MEMORY = Task(square(TALL, 1024), "bf16", STEP)
HOSTS = tuple(Task(TINY, "fp32", mode) for mode in (RECORD, STEP))
ON_GPU = (
    Goal("forward / T", OF_PRODUCT, 1.05, wide(GRAPH, 4096)),
    Goal("forward / T", OF_PRODUCT, 1.07, wide(GRAPH, 2048)),
    Goal("forward / T", OF_PRODUCT, 1.12, wide(GRAPH, 1024)),
    Goal("forward / T", OF_PRODUCT, 1.20, wide(GRAPH, 512)),
    Goal("forward / T", OF_PRODUCT, 1.15, wide(GRAPH, *NARROW)),
    Goal("eager / forward", OF_EAGER, 2.8, wide(GRAPH, 512), least=True),
    Goal("eager / forward", OF_EAGER, 3.8, wide(GRAPH, *NARROW), least=True),
    Goal("copy / forward", "copy / fused", 0.85, wide(GRAPH, *NARROW), least=True),
    Goal("forward / T", OF_PRODUCT, 1.3, wide(GRAPH, *SMALL, rows=SHORT)),
    Goal("eager / forward", OF_EAGER, 3.0, wide(GRAPH, *SMALL, rows=SHORT), least=True),
    Goal("erf / tanh GELU", "fused / gelu_tanh", 1.03, wide(GRAPH, 1024, 512)),
    Goal("training / inference", "training / fused", 1.05, wide(GRAPH, 4096, 2048, 1024)),
    Goal("backward / T", OF_PRODUCT, 1.12, wide(BACKWARD_GRAPH, 4096)),
    Goal("backward / T", OF_PRODUCT, 1.20, wide(BACKWARD_GRAPH, 2048)),
    Goal("backward / T", OF_PRODUCT, 1.40, wide(BACKWARD_GRAPH, 1024)),
    Goal("eager / backward", OF_EAGER, 3.0, wide(BACKWARD_GRAPH, 128, 64), least=True),
    Goal("eager / backward", OF_EAGER, 2.2, wide(BACKWARD_GRAPH, 256), least=True),
    Goal("eager / backward", OF_EAGER, 2.0, wide(BACKWARD_GRAPH, 512), least=True),
    Goal("eager / batch norm training", OF_EAGER, 2.0, (BATCH,), least=True),
    Goal("host time, forward", "fused / eager", 0.6, HOSTS[:1]),
    Goal("host time, both", "fused / eager", 0.55, HOSTS[1:]),
    Goal("activation memory", SAVED, 0.5, (MEMORY,)),
)


def layers(mode: str, rows: int, *features: int, dtype: str = "fp32") -> tuple[Task, ...]:
    """In order note with layer norm; in fp32 with ReLU too."""
    activations = ("gelu", "relu") if dtype == "fp32" else ("gelu",)
    cases = [square(rows, n, activation=name) for n in features for name in activations]
    return tuple(Task(case, dtype, mode) for case in cases)


def shapes(dtype: str, *modes: str) -> tuple[Task, ...]:
    """Where the product counts, and where memory does."""
    found = ((SHORT, 64, 128, 256, 512), (4096, 64), (16384, 128))
    return tuple(t for mode in modes for each in found for t in layers(mode, *each, dtype=dtype))


def faster(
    what: str, tasks: tuple[Task, ...], bound: float, beyond: float | None = None, **when: bool
) -> Goal:
    return Goal(what, OF_EAGER, bound, tasks, True, beyond, **when)


BATCHED = [case for case in MODELS if case.norm == "batch"]
BATCH_STEPS = tuple(Task(case, dtype, STEP) for dtype in ("fp32", "bf16") for case in BATCHED)
MODEL_STEPS = tuple(Task(case, "fp32", STEP) for case in MODELS if "fp32" in case.dtypes)
BF16, FP16 = (shapes(dtype, INFERENCE, STEP) for dtype in ("bf16", "fp16"))
ON_CPU = (
    faster("forward, 256 x 64", layers(INFERENCE, SHORT, 64), 1.8, 2.0),
    faster("forward, 4096 x 64", layers(INFERENCE, 4096, 64), 1.4, 1.8),
    faster("forward, 256 x 128", layers(INFERENCE, SHORT, 128), 1.35),
    faster("forward, 256 x 256", layers(INFERENCE, SHORT, 256), 1.2),
    faster("forward, 256 x 512", layers(INFERENCE, SHORT, 512), 1.12),
    Goal("beyond: as F.linear alone", OF_LINEAR, 1.0, layers(INFERENCE, SHORT, 128, 256, 512)),
    faster("step, 256 x 64", layers(STEP, SHORT, 64), 1.5, 2.0),
    faster("step, 256 x 128", layers(STEP, SHORT, 128), 1.3, 1.5),
    faster("step, 256 x 256", layers(STEP, SHORT, 256), 1.15, 1.25),
    faster("step, 256 x 512", layers(STEP, SHORT, 512), 1.08, 1.15),
    faster("forward, 16384 x 128", layers(INFERENCE, 16384, 128), 1.6, 2.0),
    faster("step, 16384 x 128", layers(STEP, 16384, 128), 1.4, 1.7),
    faster("bf16, torch's product slow", BF16, 3.0, fast=False),
    faster("bf16, torch's product fast", BF16, 1.3, 1.6, fast=True),
    faster("fp16, torch's product slow", FP16, 3.0, fast=False),
    faster("batch norm, training", BATCH_STEPS, 1.0, 1.2),
    Goal("rows that lose to eager or torch.compile", LOST, 0),
    Goal("peak memory of a step, of eager's", PEAK, 1.0, MODEL_STEPS, beyond=0.7),
)
GOALS = {"cpu": ON_CPU, "cuda": ON_GPU}


@cache
def asked(task: Task) -> frozenset[str]:
    """The contenders that goals compare in a row."""
    pairs = [g.pair for goals in GOALS.values() for g in goals if task in g.tasks]
    return frozenset(name for pair in pairs for name in pair.split(" / "))
