"""One residual layer, fused against eager, on this machine's CPU: time and memory.

Run: python examples/fused_vs_eager.py
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import fusedres

ROWS = 1024
WIDTHS = (64, 128, 256, 339, 512, 1024)
SECONDS = 1.0  # per width and measurement
PICTURE = Path(__file__).with_name("fused_vs_eager.png")


def interleaved_medians(*calls: Callable[[], object]) -> list[float]:
    """Median milliseconds of each call; they take turns, so that a slow moment hits all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS or len(samples[0]) < 10:
        for call, times in zip(calls, samples, strict=True):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return [median(times) for times in samples]


def saved_bytes(layer: fusedres.Residual, x: Tensor) -> int:
    """What the layer keeps for its backward, beside what lives anyway: x, y and the parameters."""
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    for t in (x, y, *layer.parameters()):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def measure(width: int) -> dict[str, list[float]]:
    """Eager's and fused's value by name of the measurement."""
    torch.manual_seed(0)
    x, dy = torch.randn(ROWS, width, requires_grad=True), torch.randn(ROWS, width)
    eager = fusedres.Residual(width, activation="gelu")
    fused = fusedres.FusedResidual(width, activation="gelu")
    fused.load_state_dict(eager.state_dict())

    def step(layer: fusedres.Residual) -> None:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)

    def infer(layer: fusedres.Residual) -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward + backward, ms": interleaved_medians(lambda: step(eager), lambda: step(fused)),
        "forward, ms": interleaved_medians(lambda: infer(eager), lambda: infer(fused)),
        "saved for backward, MB": [saved_bytes(layer, x) / 1e6 for layer in (eager, fused)],
    }


def draw(rows: dict[int, dict[str, list[float]]]) -> None:
    import matplotlib.pyplot as plt

    names = list(rows[WIDTHS[0]])
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.9), sharey=True, facecolor="white")
    for axis, name in zip(axes, names, strict=True):
        ratios = [row[name][1] / row[name][0] for row in rows.values()]
        labels = [f"{width}\n{row[name][0]:.3g}" for width, row in rows.items()]
        axis.bar_label(axis.bar(labels, ratios, color="#1f77b4"), fmt="%.2f")
        axis.axhline(1, color="#d62728", linestyle="--", label="eager")
        unit = name.rsplit(" ", 1)[1]
        axis.set(title=name.rsplit(",", 1)[0], xlabel=f"width, and below it eager's {unit}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="fused / eager (lower is better)", ylim=(0, 1.2))
    axes[0].legend(loc="upper right")
    figure.suptitle(f"fused: linear, LayerNorm, GELU, add; {ROWS} rows, float32, CPU")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    print(f"\nOne layer, {ROWS} rows, eager -> fused:\n")
    rows = {width: measure(width) for width in WIDTHS}
    names = list(rows[WIDTHS[0]])
    print(f"{'width':>6}" + "".join(f"{name:>28}" for name in names))
    for width, row in rows.items():
        cells = ("{:.3g} -> {:.3g}".format(*row[name]) for name in names)
        print(f"{width:>6}" + "".join(f"{cell:>28}" for cell in cells))
    draw(rows)


if __name__ == "__main__":
    main()
    print(f"\nPicture: {PICTURE}")
