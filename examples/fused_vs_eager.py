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

Pair = tuple[float, float]  # eager, fused


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
    """What the layer keeps for its backward, beside x and its parameters, which live anyway."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(size for pointer, size in saved.items() if pointer not in known)


def measure(width: int) -> dict[str, Pair]:
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
        "forward + backward, ms": tuple(
            interleaved_medians(lambda: step(eager), lambda: step(fused))
        ),
        "forward, ms": tuple(interleaved_medians(lambda: infer(eager), lambda: infer(fused))),
        "saved for backward, MB": (saved_bytes(eager, x) / 1e6, saved_bytes(fused, x) / 1e6),
    }


def draw(rows: dict[int, dict[str, Pair]]) -> None:
    import matplotlib.pyplot as plt

    names = list(next(iter(rows.values())))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3.8), facecolor="white")
    for axis, name in zip(axes, names, strict=True):
        for index, (pair, (label, colour)) in enumerate(
            zip(
                zip(*(row[name] for row in rows.values()), strict=True),
                (("eager", "#b0b0b0"), ("fused", "#1f77b4")),
                strict=True,
            )
        ):
            places = [place + 0.4 * index - 0.2 for place in range(len(rows))]
            bars = axis.bar(places, pair, 0.4, color=colour, label=label)
            if label == "fused":
                ratios = [f"{row[name][0] / row[name][1]:.1f}x" for row in rows.values()]
                axis.bar_label(bars, ratios, fontsize=8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(rows)), map(str, rows))
        axis.set(title=name, xlabel="width")
    axes[0].legend()
    figure.suptitle(f"linear, LayerNorm, GELU, add; {ROWS} rows, float32, CPU")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    rows = {width: measure(width) for width in WIDTHS}
    names = list(rows[WIDTHS[0]])
    print(f"\nOne layer, {ROWS} rows, eager -> fused:\n")
    print(f"{'width':>6}" + "".join(f"{name:>28}" for name in names))
    for width, row in rows.items():
        cells = ("{:.3g} -> {:.3g}".format(*row[name]) for name in names)
        print(f"{width:>6}" + "".join(f"{cell:>28}" for cell in cells))
    draw(rows)


if __name__ == "__main__":
    main()
    print(f"\nPicture: {PICTURE}")
