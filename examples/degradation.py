"""The degradation experiment on real digits: deep plain nets do not train, deep residual nets do.

Each net is a stem (64 -> 64), `depth` blocks of one `FusedResidual` each, and a head (64 -> 10).
A plain net's layer is the same without `add`. A deep plain net could copy a shallow one and fill
the rest with identity layers; that is shown exactly, and still training does not find it.
Source: He et al., "Deep Residual Learning for Image Recognition" (2015), without convolutions.

Run: python examples/degradation.py
"""

import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_vs_eager
import fusedres

WIDTH = 64
DEPTHS = (4, 20, 56, 110, 200)
EPOCHS, BATCH, LEARNING_RATE, WARMUP_STEPS = 20, 128, 1e-3, 20
GATE_LEARNING_RATE = 1e-2  # a zero gate has to open within a few hundred steps
NETS = {
    "plain": {"order": "linear-act", "norm": None},
    "plain, LayerNorm": {"order": "linear-norm-act", "norm": "layer"},
    "residual, BatchNorm": {"order": "note", "norm": "batch"},
    "residual, LayerNorm": {"order": "note", "norm": "layer"},
    "residual, pre-activation": {"order": "preact", "norm": "layer"},
    "residual, ReZero gate": {"order": "note", "norm": None, "gate": "scalar"},
}
PICTURE = Path(__file__).with_name("degradation.png")

Accuracy = tuple[float, float]  # train and test, in percent
Results = dict[tuple[str, int], Accuracy]  # by net and depth


class Net(nn.Module):
    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        settings = NETS[kind]
        normed_residual = kind.startswith("residual") and settings["norm"] is not None
        self.stem = nn.Linear(64, WIDTH)
        self.blocks = nn.Sequential(
            *(fusedres.FusedResidual(WIDTH, **settings) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(WIDTH) if normed_residual else nn.Identity()
        self.head = nn.Linear(WIDTH, 10)
        for block in self.blocks:
            nn.init.kaiming_normal_(block.linear.weight, nonlinearity="relu")
            nn.init.zeros_(block.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        return 100 * (self.eval()(x).argmax(1) == labels).float().mean().item()


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised pixels (1297, 64) and (500, 64), then their labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    split = train_test_split(*load_digits(return_X_y=True), test_size=500, random_state=0)
    x, x_test, labels, labels_test = (torch.from_numpy(part) for part in split)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-3)  # some pixels are always blank
    return ((x - mean) / std).float(), ((x_test - mean) / std).float(), labels, labels_test


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def train(kind: str, depth: int) -> Net:
    torch.manual_seed(depth)
    x, _, labels, _ = digits()
    net = Net(kind, depth)
    gates = [block.gate for block in net.blocks if block.gate is not None]
    others = [p for name, p in net.named_parameters() if not name.endswith("gate")]
    optimizer = torch.optim.Adam(
        [{"params": others}, {"params": gates, "lr": GATE_LEARNING_RATE}],
        LEARNING_RATE,
        foreach=True,
    )
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), labels[rows]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net


def train_and_score(kind: str, depth: int) -> Accuracy:
    x, x_test, labels, labels_test = digits()
    net = train(kind, depth)
    return net.accuracy(x, labels), net.accuracy(x_test, labels_test)


def show_progress(done: float, text: str) -> None:
    """One line that redraws itself on a terminal; elsewhere a plain line per call."""
    bar = "#" * round(30 * done)
    start, end = ("\r", "\n" if done == 1 else "") if sys.stdout.isatty() else ("", "\n")
    print(f"{start}[{bar:<30}] {done:4.0%}  {text}", end=end, flush=True)


def run_grid() -> Results:
    """Train every net at every depth, one process a core with one thread each, deepest first."""
    start, results = time.perf_counter(), {}
    layers, total_layers = 0, len(NETS) * sum(DEPTHS)
    workers = min(os.cpu_count() or 1, len(NETS) * len(DEPTHS))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        tasks = {
            pool.submit(train_and_score, kind, depth): (kind, depth)
            for depth in reversed(DEPTHS)
            for kind in NETS
        }
        for task in as_completed(tasks):
            results[tasks[task]] = task.result()
            layers += tasks[task][1]
            text = f"{len(results)} of {len(tasks)} nets, {time.perf_counter() - start:.0f} s"
            show_progress(layers / total_layers, text)
    return results


def print_table(results: Results) -> None:
    print("\nAccuracy on the digits, train / test %:\n")
    print(f"{'layers':>24}" + "".join(f"{depth:>12}" for depth in DEPTHS))
    for kind in NETS:
        cells = ("{:.0f} / {:.0f}".format(*results[kind, depth]) for depth in DEPTHS)
        print(f"{kind:>24}" + "".join(f"{cell:>12}" for cell in cells))


def identity_padding_difference() -> float:
    """Largest difference in logits after a trained plain net is padded with identity layers.

    A padded layer has W = I and b = 0, and relu(h) = h since h comes out of a relu.
    """
    torch.set_num_threads(1)  # as the nets of the grid were trained
    x = digits()[1]
    net = train("plain", DEPTHS[0]).eval()
    with torch.no_grad():
        shallow = net(x)
        for _ in range(DEPTHS[-1] - DEPTHS[0]):
            layer = fusedres.FusedResidual(WIDTH, **NETS["plain"])
            nn.init.eye_(layer.linear.weight)
            nn.init.zeros_(layer.linear.bias)
            net.blocks.append(layer)
        return (net(x) - shallow).abs().max().item()


def check(results: Results) -> None:
    """The finding, with margin: exact accuracies of plain deep nets are chaotic."""
    shallow, deep = (results["plain, LayerNorm", depth][0] for depth in (4, 56))
    assert shallow > 97, f"a plain net of 4 layers should train, got {shallow:.1f} %"
    assert deep < 60, f"a plain net of 56 layers should fail to train, got {deep:.1f} %"
    for (kind, depth), (train_accuracy, test_accuracy) in results.items():
        if kind.startswith("residual"):
            got = f"{kind} at {depth} layers: {train_accuracy:.1f} / {test_accuracy:.1f} %"
            assert train_accuracy > 98 and test_accuracy > 93, got


def draw(results: Results) -> None:
    import matplotlib.pyplot as plt

    colours = ("#d62728", "#ff7f0e", "#1f77b4", "#17becf", "#2ca02c", "#9467bd")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, facecolor="white")
    for axis, part, title in zip(axes, (0, 1), ("training digits", "test digits"), strict=True):
        for kind, colour in zip(NETS, colours, strict=True):
            axis.plot(
                DEPTHS,
                [results[kind, depth][part] for depth in DEPTHS],
                "o-" if kind.startswith("residual") else "s--",
                color=colour,
                label=kind,
            )
        axis.axhline(10, color="#808080", linestyle=":", label="guessing")
        axis.set_xscale("log")
        axis.set_xticks(DEPTHS, map(str, DEPTHS))
        axis.minorticks_off()
        axis.set(title=title, xlabel="layers", ylim=(0, 104))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    print(f"Training {len(NETS)} kinds of net at {len(DEPTHS)} depths on scikit-learn's digits")
    results = run_grid()
    print_table(results)

    difference = identity_padding_difference()
    print(
        f"\nA trained plain net of {DEPTHS[0]} layers, padded with identity layers to {DEPTHS[-1]}:"
        f" logits differ by {difference}.\nSo the deep plain net contains the shallow one's"
        " solution, and training does not find it."
    )
    assert difference == 0
    check(results)
    draw(results)
    fused_vs_eager.main()
    print(f"\nPictures: {PICTURE}\n          {fused_vs_eager.PICTURE}")


if __name__ == "__main__":
    main()
