"""What p GPUs exchange in one training step of a layer, and how long that takes."""

from __future__ import annotations

from .model import EXACT, Layer, Machine


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
