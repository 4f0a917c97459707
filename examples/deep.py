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
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import FusedResidualStack
from fusedres.tools import console, demo
from fusedres.tools.bench import saved_bytes
from fusedres.tools.timing import interleave

WIDTH, BATCH, BLOCK = 256, 512, 4
DEPTHS, QUICK = (4, 16, 64, 256, 1000), (4, 16)
STEPS, LEARNING_RATE, WARMUP = 60, 3e-4, 10
SECONDS = 3.0  # for the rounds of steps that take turns
COMPILED = 64  # layers: torch.compile needs a second for each
WAYS = {"eager": "#d62728", "compiled": "#ff7f0e", "fused": "#1f77b4", "recompute": "#17becf"}
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "deep.png"
Found = dict[str, dict[str, Any]]  # by depth


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


class Training:
    """A net and one step of its training."""

    def __init__(self, depth: int, way: str) -> None:
        self.net = make(depth, way)
        self.adam = torch.optim.Adam(self.net.parameters(), LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: min(1, (step + 1) / WARMUP)
        )
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        x, _, labels, _ = demo.digits()
        rows = torch.randperm(len(x), generator=self.generator)[:BATCH]
        F.cross_entropy(self.net(x[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()


def time_steps(depth: int) -> dict[str, Any]:
    """Milliseconds a step and bytes kept for backward, by way; the ways take turns."""
    ways = [way for way in WAYS if way != "compiled" or depth <= COMPILED]
    each = {way: Training(depth, way) for way in ways}
    calls = {way: training.step for way, training in each.items()}
    rounds, _ = interleave(calls, torch.device("cpu"), SECONDS)
    x = torch.randn(BATCH, WIDTH)
    kept = {way: saved_bytes(each[way].net[1], x) for way in ways if way != "compiled"}
    return {"ms": {way: 1e3 * median(r[way] for r in rounds) for way in ways}, "kept": kept}


def train(depth: int, show: Callable[[int], None]) -> dict[str, float]:
    """Accuracy in percent."""
    x, x_test, labels, labels_test = demo.digits()
    training = Training(depth, "fused")
    for step in range(STEPS):
        training.step()
        show(step + 1)
    net, found = training.net.eval(), {}
    with torch.no_grad():
        for name, digits, expected in (("train", x, labels), ("test", x_test, labels_test)):
            found[name] = 100 * (net(digits).argmax(1) == expected).float().mean().item()
    return found


def run(depths: tuple[int, ...], state: Path) -> Found:
    """Every depth; what `state` has of an earlier run is not done again."""
    found: Found = json.loads(state.read_text()) if state.exists() else {}
    todo = [depth for depth in depths if str(depth) not in found]
    done, total = 0, 2 * STEPS * sum(todo)
    with console.progress(max(total, 1), "training") as show:
        for depth in todo:
            text = f"{depth} layers"
            show(done, f"{text}, timed")
            entry = time_steps(depth)
            done += STEPS * depth
            entry |= train(depth, lambda i, at=done, d=depth, t=text: show(at + d * i, t))
            done += STEPS * depth
            found[str(depth)] = entry
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(found, indent=1))
    return found


def print_table(found: Found, depths: tuple[int, ...]) -> None:
    console.out(f"\nWidth {WIDTH}, batch {BATCH}, {BLOCK} layers a block, {STEPS} steps of Adam:\n")
    head = ["layers", *(f"{way}, ms" for way in WAYS), "kept, fused / eager", "train / test %"]
    rows = []
    for depth in depths:
        entry = found[str(depth)]
        ms = [f"{entry['ms'][way]:.3g}" if way in entry["ms"] else "" for way in WAYS]
        kept = entry["kept"]["fused"] / entry["kept"]["eager"]
        scores = f"{entry['train']:.0f} / {entry['test']:.0f}"
        rows.append([str(depth), *ms, f"{kept:.2f}", scores])
    console.table(head, rows)


def draw(found: Found, depths: tuple[int, ...], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), facecolor="white")
    times, memory, accuracy = figure.subplots(1, 3)
    for way, colour in WAYS.items():
        ms = [(d, found[str(d)]["ms"].get(way)) for d in depths]
        points = [(d, v / d) for d, v in ms if v]
        times.plot(*zip(*points, strict=True), "o-", color=colour, label=way)
        if way != "compiled":
            kept = [found[str(d)]["kept"][way] / 2**20 for d in depths]
            memory.plot(depths, kept, "o-", color=colour, label=way)
    for part, style in (("train", "s--"), ("test", "o-")):
        scores = [found[str(d)][part] for d in depths]
        accuracy.plot(depths, scores, style, color=WAYS["fused"], label=part)
    titles = "ms a layer and training step", "MiB kept for backward", "accuracy, %"
    for axis, title in zip((times, memory, accuracy), titles, strict=True):
        axis.set_xscale("log")
        axis.set_xticks(depths, map(str, depths))
        axis.minorticks_off()
        axis.set(title=title, xlabel="layers")
        axis.grid(alpha=0.3)
        axis.legend()
    times.set_ylim(bottom=0)
    memory.set_yscale("log")
    accuracy.set_ylim(0, 104)
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
    wrong = [depth for depth in depths if found[str(depth)]["train"] < 95]
    if reason := demo.lacks("matplotlib"):
        console.out(f"\nNo picture ({reason}); get it with: pip install matplotlib", "note")
    else:
        draw(found, depths, args.out)
        console.out(f"\nPicture: {args.out}")
    for depth in wrong:
        console.error(f"WRONG: {depth} layers should train")


if __name__ == "__main__":
    main()
