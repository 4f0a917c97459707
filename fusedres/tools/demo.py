"""The degradation experiment on real digits: deep plain nets do not train, deep residual nets do.

Each net is a stem (64 -> 64), a `FusedResidualStack` of `depth` layers, and a head (64 -> 10). A
plain net's layer is the same without `add`. A deep plain net could copy a shallow one and fill the
rest with identity layers; that is shown exactly, and still training does not find it.
Source: He et al., "Deep Residual Learning for Image Recognition" (2015), without convolutions.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from statistics import median_low
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import FusedResidualStack, Residual
from . import console, interrupted
from .timing import interleave

WIDTH = 64
DEPTHS = (4, 20, 56, 110, 200)
QUICK = (4, 56)  # enough to see it
PADDED = 200  # layers of the shallow net with identity layers
EPOCHS, BATCH, LEARNING_RATE, WARMUP_STEPS = 20, 128, 1e-3, 20
TRAINED = 98  # percent of the training digits
GATE_LEARNING_RATE = 1e-2  # a zero gate has to open within a few hundred steps
NETS: dict[str, dict[str, Any]] = {
    "plain": {"order": "linear-act", "norm": None},
    "plain, LayerNorm": {"order": "linear-norm-act", "norm": "layer"},
    "residual, BatchNorm": {"order": "note", "norm": "batch"},
    "residual, LayerNorm": {"order": "note", "norm": "layer"},
    "residual, pre-activation": {"order": "preact", "norm": "layer"},
    "residual, ReZero gate": {"order": "note", "norm": None, "gate": "scalar"},
}

Accuracy = tuple[float, float]  # train and test, in percent
Results = dict[tuple[str, int], list[Accuracy]]  # by net and depth, of each seed


class Net(nn.Module):
    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        settings = NETS[kind]
        normed_residual = kind.startswith("residual") and settings["norm"] is not None
        self.stem = nn.Linear(64, WIDTH)
        layers = FusedResidualStack(WIDTH, depth, **settings)
        self.norm = nn.LayerNorm(WIDTH) if normed_residual else nn.Identity()
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            for weight in layers.weight:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            layers.get_parameter("bias").zero_()
        self.layers: nn.Module = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.stem(x))))

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


def train(kind: str, depth: int, seed: int = 0) -> Net:
    torch.manual_seed(depth + 1000 * seed)
    x, _, labels, _ = digits()
    net = Net(kind, depth)
    gates = [p for name, p in net.named_parameters() if name.endswith("gate")]
    others = [p for name, p in net.named_parameters() if not name.endswith("gate")]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": gates, "lr": GATE_LEARNING_RATE}]
    optimizer = torch.optim.Adam(groups, LEARNING_RATE, foreach=True)
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


def train_and_score(kind: str, depth: int, seed: int = 0) -> Accuracy:
    x, x_test, labels, labels_test = digits()
    net = train(kind, depth, seed)
    return net.accuracy(x, labels), net.accuracy(x_test, labels_test)


def run_grid(depths: Sequence[int], seeds: int = 1) -> Results:
    """Train every net at every depth, one process a core with one thread each, deepest first."""
    start, done, layers = perf_counter(), 0, 0
    results: Results = {(kind, depth): [] for kind in NETS for depth in depths}
    total_layers = seeds * len(NETS) * sum(depths)
    workers = min(os.cpu_count() or 1, seeds * len(results))
    spawn = multiprocessing.get_context("spawn")
    with (
        console.progress(total_layers, "training") as show,
        ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        with interrupted.held_back():
            tasks = {
                pool.submit(train_and_score, kind, depth, seed): (kind, depth)
                for depth in sorted(depths, reverse=True)
                for kind in NETS
                for seed in range(seeds)
            }
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                results[tasks[task]].append(task.result())
                layers += tasks[task][1]
                show(layers, f"{done} of {len(tasks)} nets, {perf_counter() - start:.0f} s")
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return results


def middle(scores: Sequence[Accuracy]) -> Accuracy:
    """The median seed by accuracy in training, and that seed's test."""
    return median_low(scores)


def print_table(results: Results, depths: Sequence[int]) -> None:
    seeds = len(results[next(iter(NETS)), depths[0]])
    of = f", the median of {seeds} seeds" * (seeds > 1)
    console.out(f"\nAccuracy on the digits, train / test %{of}:\n")
    rows: list[list[console.Cell]] = []
    for kind in NETS:
        scores = [middle(results[kind, depth]) for depth in depths]
        styles = ["good" if score[0] > TRAINED else "bad" for score in scores]
        cells = ["{:.0f} / {:.0f}".format(*score) for score in scores]
        rows.append([kind, *zip(cells, styles, strict=True)])
    console.table(("layers", *map(str, depths)), rows)


def identity_padding_difference() -> float:
    """Largest difference in logits after a trained plain net is padded with identity layers.

    A padded layer has W = I and b = 0, and relu(h) = h since h comes out of a relu.
    """
    torch.set_num_threads(1)  # as the nets of the grid were trained
    x = digits()[1]
    net = train("plain", DEPTHS[0]).eval()
    with torch.no_grad():
        shallow = net(x)
        more = FusedResidualStack(WIDTH, PADDED - DEPTHS[0], **NETS["plain"])
        more.weight.copy_(torch.eye(WIDTH))
        more.get_parameter("bias").zero_()
        net.layers = nn.Sequential(net.layers, more)
        return (net(x) - shallow).abs().max().item()


def step_times(depth: int) -> tuple[float, float]:
    """Milliseconds of a training step of the residual net with LayerNorm: its stack's, and of the
    same layers by torch's own modules one after another.
    """
    x, _, labels, _ = digits()
    kind = "residual, LayerNorm"
    nets = {"fused": Net(kind, depth), "eager": Net(kind, depth)}
    nets["eager"].layers = nn.Sequential(*(Residual(WIDTH, **NETS[kind]) for _ in range(depth)))

    def step(net: Net) -> None:
        F.cross_entropy(net(x[:BATCH]), labels[:BATCH]).backward()
        net.zero_grad()

    calls: dict[str, Callable[[], None]] = {name: partial(step, net) for name, net in nets.items()}
    rounds, _ = interleave(calls, torch.device("cpu"), 2.0)
    fused, eager = (1e3 * median_low(each[name] for each in rounds) for name in nets)
    return fused, eager


def check(results: Results, difference: float) -> list[str]:
    """What differs from the finding, whatever the seed; with margin, as accuracies of plain deep
    nets are chaotic.
    """
    wrong = [] if difference == 0 else [f"identity layers changed the logits by {difference}"]
    trained = ([train for train, _ in results["plain, LayerNorm", depth]] for depth in QUICK)
    shallow, deep = min(next(trained)), max(next(trained))
    if shallow <= 97:
        wrong.append(f"a plain net of {QUICK[0]} layers should train, got {shallow:.1f} %")
    if deep >= 60:
        wrong.append(f"a plain net of {QUICK[1]} layers should fail to train, got {deep:.1f} %")
    for (kind, depth), scores in results.items():
        for train_accuracy, test_accuracy in scores if kind.startswith("residual") else ():
            if not (train_accuracy > TRAINED and test_accuracy > 93):
                got = f"{train_accuracy:.1f} / {test_accuracy:.1f} %"
                wrong.append(f"{kind} at {depth} layers should train, got {got}")
    return wrong


def draw(results: Results, depths: Sequence[int], picture: Path) -> None:
    """Lines through the medians of the seeds, and bands from the worst to the best."""
    from matplotlib.figure import Figure

    colours = ("#d62728", "#ff7f0e", "#1f77b4", "#17becf", "#2ca02c", "#9467bd")
    figure = Figure(figsize=(10, 4.2), facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, part, title in zip(axes, (0, 1), ("training digits", "test digits"), strict=True):
        for kind, colour in zip(NETS, colours, strict=True):
            each = [[score[part] for score in results[kind, depth]] for depth in depths]
            axis.fill_between(depths, [*map(min, each)], [*map(max, each)], color=colour, alpha=0.2)
            axis.plot(
                depths,
                [*map(median_low, each)],
                "o-" if kind.startswith("residual") else "s--",
                color=colour,
                label=kind,
            )
        axis.axhline(10, color="#808080", linestyle=":", label="guessing")
        axis.set_xscale("log")
        axis.set_xticks(depths, map(str, depths))
        axis.minorticks_off()
        axis.set(title=title, xlabel="layers", ylim=(0, 104))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower left")
    seeds = len(results[next(iter(NETS)), depths[0]])
    if seeds > 1:
        figure.suptitle(f"lines: median of {seeds} seeds; bands: worst to best", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


def lacks(module: str) -> str | None:
    """Why it cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken one is as good as none
        return f"{type(error).__name__}: {error}"
    return None


def run(picture: Path, depths: Sequence[int] = DEPTHS, seeds: int = 1) -> list[str]:
    """Trains, prints, draws; returns what differs from the finding."""
    of = f", each from {seeds} seeds," * (seeds > 1)
    console.out(
        f"Training {len(NETS)} kinds of net at {len(depths)} depths{of} on scikit-learn's digits"
    )
    results = run_grid(depths, seeds)
    print_table(results, depths)
    difference = identity_padding_difference()
    console.out(
        f"\nA trained plain net of {DEPTHS[0]} layers, padded with identity layers to {PADDED}:"
        f" logits differ by {difference}.\nSo the deep plain net contains the shallow one's"
        " solution, and training does not find it."
    )
    fused, eager = step_times(max(depths))
    console.out(
        f"\nA training step of {max(depths)} residual layers on one thread, without the optimiser: "
        f"{fused:.3g} ms, by torch's own modules {eager:.3g} ms."
    )
    if reason := lacks("matplotlib"):
        console.out(f"\nNo picture ({reason}); get it with: pip install matplotlib", "note")
    else:
        draw(results, depths, picture)
        console.out(f"\nPicture: {picture}")
    wrong = check(results, difference)
    for line in wrong:
        console.error(f"WRONG: {line}")
    return wrong
