"""The deepest nets in use, on real digits: time a step, memory and accuracy against depth.

Contrastive reinforcement learning trains nets of up to 1000 layers, in blocks of four with one
skip, x + f(f(f(f(x)))) with f = silu(norm(linear)), width 256, batch 512. Here each depth trains on
scikit-learn's digits as one FusedResidualStack; the same layers one after another, eager and
compiled, are timed beside it.
Source of the net: Wang et al., "1000 layer networks for self-supervised RL",
arxiv.org/abs/2503.14858.

Run: python examples/deep.py          minutes on two cores; stopped, it goes on where it was
     python examples/deep.py --quick  two depths
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import FusedResidualStack
from fusedres.tools import console, demo
from fusedres.tools.bench import saved_bytes

WIDTH, BATCH, BLOCK = 256, 512, 4
DEPTHS, QUICK = (4, 16, 64, 256, 1000), (4, 16)
STEPS, LEARNING_RATE, WARMUP = 60, 3e-4, 10
TIMED = 5  # steps of what is only timed
COMPILED = 64  # layers: torch.compile needs a second for each
WAYS = {"eager": "#d62728", "compiled": "#ff7f0e", "fused": "#1f77b4", "recompute": "#17becf"}
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "deep.png"
Found = dict[str, dict[str, Any]]  # by "depth way"


class Layers(nn.Module):
    """The layers of a stack, as users write them."""

    def __init__(self, stack: FusedResidualStack) -> None:
        super().__init__()
        layers: list[Any] = stack.to_layers()
        self.linears = nn.ModuleList(layer.linear for layer in layers)
        self.norms = nn.ModuleList(layer.norm for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            h = F.silu(norm(linear(h)))
            if i % BLOCK == BLOCK - 1:
                x = h = h + x
        return x


def make(depth: int, way: str) -> nn.Sequential:
    torch.manual_seed(0)
    stack = FusedResidualStack(
        WIDTH, depth, layers_per_block=BLOCK, activation="silu", recompute=way == "recompute"
    )
    layers = stack if way in ("fused", "recompute") else Layers(stack)
    if way == "compiled":
        layers = torch.compile(layers, dynamic=False)  # type: ignore[assignment]
    return nn.Sequential(nn.Linear(64, WIDTH), layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))


def train(depth: int, way: str, steps: int, show: Callable[[int], None]) -> dict[str, Any]:
    """Milliseconds a step, bytes kept for backward and, after all steps, accuracy in percent."""
    x, x_test, labels, labels_test = demo.digits()
    net = make(depth, way)
    adam = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (step + 1) / WARMUP))
    generator, seconds = torch.Generator().manual_seed(0), []
    for step in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        began = perf_counter()
        F.cross_entropy(net(x[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        seconds.append(perf_counter() - began)
        schedule.step()
        show(step + 1)
    found = {
        "ms": 1e3 * median(seconds[1:]),
        "kept": saved_bytes(net[1], torch.randn(BATCH, WIDTH)),
    }
    if steps == STEPS:
        net.eval()
        with torch.no_grad():
            for name, digits, expected in (("train", x, labels), ("test", x_test, labels_test)):
                right = net(digits).argmax(1) == expected
                found[name] = 100 * right.float().mean().item()
    return found


def run(depths: tuple[int, ...], state: Path) -> Found:
    """Every depth in every way; what `state` has of an earlier run is not done again."""
    found: Found = json.loads(state.read_text()) if state.exists() else {}
    todo = [
        (depth, way, STEPS if way == "fused" else TIMED)
        for depth in depths
        for way in WAYS
        if f"{depth} {way}" not in found and (way != "compiled" or depth <= COMPILED)
    ]
    total = sum(depth * steps for depth, _, steps in todo)
    done = 0
    with console.progress(max(total, 1), "training") as show:
        for depth, way, steps in todo:
            text = f"{depth} layers, {way}"
            step = lambda i, at=done, d=depth, t=text: show(at + d * i, t)  # noqa: E731
            found[f"{depth} {way}"] = train(depth, way, steps, step)
            done += depth * steps
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(found, indent=1))
    return found


def print_table(found: Found, depths: tuple[int, ...]) -> None:
    console.out(f"\nWidth {WIDTH}, batch {BATCH}, {BLOCK} layers a block, {STEPS} steps of Adam:\n")
    head = [
        "layers",
        *(f"{way}, ms a step" for way in WAYS),
        "kept, fused / eager",
        "train / test %",
    ]
    rows = []
    for depth in depths:
        each = {way: found.get(f"{depth} {way}") for way in WAYS}
        ms = [f"{e['ms']:.3g}" if e else "" for e in each.values()]
        kept = each["fused"]["kept"] / each["eager"]["kept"]
        rows.append(
            [str(depth), *ms, f"{kept:.2f}", "{train:.0f} / {test:.0f}".format(**each["fused"])]
        )
    console.table(head, rows)


def draw(found: Found, depths: tuple[int, ...], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), facecolor="white")
    panels = {"ms": "ms a training step", "kept": "MiB kept for backward", "test": "accuracy, %"}
    for axis, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for way, colour in WAYS.items():
            each = [(d, found.get(f"{d} {way}", {}).get(key)) for d in depths]
            if key == "kept":
                each = [(d, v and v / 2**20) for d, v in each if way != "compiled"]
            points = [(d, v) for d, v in each if v is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=way)
        axis.set_xscale("log")
        axis.set_xticks(depths, map(str, depths))
        axis.minorticks_off()
        if key == "test":
            axis.set_ylim(0, 104)
        else:
            axis.set_yscale("log")
            axis.legend()
        axis.set(title=title, xlabel="layers")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} layers only")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    parser.add_argument("--state", type=Path, default=Path("build/deep.json"), help="what is done")
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    depths = QUICK if args.quick else DEPTHS
    found = run(depths, args.state)
    print_table(found, depths)
    wrong = [d for d in depths if not math.isfinite(found[f"{d} fused"]["ms"])]
    wrong += [d for d in depths if found[f"{d} fused"]["train"] < 95]
    if reason := demo.lacks("matplotlib"):
        console.out(f"\nNo picture ({reason}); get it with: pip install matplotlib", "note")
    else:
        draw(found, depths, args.out)
        console.out(f"\nPicture: {args.out}")
    for depth in wrong:
        console.error(f"WRONG: {depth} layers should train")


if __name__ == "__main__":
    main()
