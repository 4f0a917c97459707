"""`python -m fusedres tune`: measures tiles on this GPU and writes down those worth having. Then
crossover.py measures which backend is the best for how many rows.

For each recipe and size it launches the forward (of inference, with batch norm of training) with
the tile of the planner's rule and with every candidate: the tiles of all shipped lists of the
family that can compute the size, with 2, 3 and 4 stages and 4 and 8 warps where shared memory and
registers allow. What shares a key of the planner is measured as one, by the rule for the largest.

    failed   a candidate that does not compile or launch; it is left out
    WRONG    so is one whose y differs from the first one's by more than rounding
    time     CUDA events around launches on the same tensors (L2 stays warm), queued behind a kernel
             that sleeps, so without the host's time; the median of rounds that take all in turn
    chosen   the fastest, if it beats the rule by over 2 %

A size whose rule stands is left out of the file, kernels/configs/<device>.json; what else is in the
file stays. It is written after every size. Only this command tunes: no call of a layer ever does.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import plan as planner
from ..backends.plan import Device, Tile
from ..operands import Operands
from ..spec import Spec

CUDA = torch.device("cuda")
SHAPES = tuple((M, n, n) for M in (256, 4096, 65536) for n in (64, 128, 256, 512, 1024, 2048, 4096))
SECONDS = 600.0
GAIN = 0.02  # of a tile on the rule, to be written down
ROUNDS, SAMPLE_SECONDS, MOST_CALLS = 11, 1e-3, 50  # calls a sample
SLEEP_CYCLES = 400_000  # a call, about 0.2 ms: the host should have queued it by then
LARGEST_PART = 128  # fp32 of a tile in one thread, which has 255 registers
NOTE = "Written by `python -m fusedres tune`. A size that is not here gets the planner's rule."


class Call(NamedTuple):
    """A forward to be measured."""

    spec: Spec
    dtype: torch.dtype
    M: int
    N: int
    K: int

    def key(self) -> str:
        return planner.key_of(self.spec, self.dtype.itemsize, *self[2:])

    def rule(self, device: Device) -> Tile:
        """The planner's tile if nobody had measured on this device."""
        return planner.plan(*self, device._replace(name="any")).tile


def row_of(tile: Tile) -> list[int]:
    return [value for value in tile if value is not None]


def contenders(calls: list[Call], device: Device, quick: bool = False) -> list[Tile]:
    """The rule's tile, then what calls of one key are measured with; `quick`: no variants."""
    first = calls[0]
    size = first.dtype.itemsize
    family, bits = planner.family_of(first.spec, size, *first[2:]), str(8 * size)
    found = [max(calls, key=lambda call: call.M * call.N).rule(device)]
    for path, name in product(sorted(planner.CONFIGS.glob("*.json")), (family, f"{family} random")):
        for row in json.loads(path.read_text()).get("tiles", {}).get(name, {}).get(bits, ()):
            found += _variants(Tile(*row), size, device, quick)
    able = (t for t in found if all(planner.can_compute(family, t, c.M, c.N) for c in calls))
    return list(dict.fromkeys(able))


def _variants(tile: Tile, size: int, device: Device, quick: bool) -> Iterator[Tile]:
    """`tile` with as many of its stages as fit, then with others and with other warps."""
    fewer = (tile._replace(num_stages=n) for n in range(tile.num_stages, 0, -1))
    yield from [t for t in fewer if t.shared(size) <= device.shared][:1]
    for warps, stages in () if quick else product((4, 8), (2, 3, 4)):
        limit = tile.maxnreg if warps == tile.num_warps else None
        other = tile._replace(num_warps=warps, num_stages=stages, maxnreg=limit)
        part = tile.BLOCK_M * tile.BLOCK_N // (32 * warps)
        if part <= LARGEST_PART and other.shared(size) <= device.shared:
            yield other


def random_operands(call: Call, where: torch.device = CUDA) -> Operands:
    """Random ones; None for what the recipe has not."""
    spec, dtype, M, N, K = call
    random = torch.Generator(where).manual_seed(0)
    randn = partial(torch.randn, generator=random, device=where, dtype=dtype)
    scale = randn(spec.width("norm", K, N)) if spec.norm else None
    shift = None if scale is None or spec.norm == "rms" else scale / 2
    width = spec.width("add", K, N) if spec.adds else K
    residual = None if width == K else randn(M, width)
    x, weight, bias = randn(M, K), randn(N, K) * K**-0.5, randn(N)
    return Operands(x, weight, bias, scale, shift, residual=residual)


def prepare(call: Call, device: Device, where: torch.device = CUDA) -> Callable[[Tile], Tensor]:
    """What launches the call with a tile, on random operands and always into the same y."""
    from ..backends import triton as backend

    operands = random_operands(call, where)
    out = operands.empty_outputs(call.spec, False, True)
    out.y.fill_(math.nan)

    def launch(tile: Tile) -> Tensor:
        backend._launch_forward(call.spec, planner.plan(*call, device, tile), operands, out)
        return out.y

    return launch


def seconds_of(run: Callable[[], object], calls: int) -> float:
    """GPU seconds of one of `calls` runs, back to back."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES * calls)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def difference(y: Tensor, first: Tensor, K: int) -> str | None:
    """What is wrong with y beside the first one; None if sums in another order explain it: their
    error grows like sqrt(K) in fp32, and what is rounded on the way may go to a neighbour.
    """
    eps = 4 * torch.finfo(y.dtype).eps + math.sqrt(K) * torch.finfo(torch.float32).eps
    error, allowed = (y - first).abs().max().item(), eps * first.abs().max().item()
    return None if error <= allowed else f"y is off by {error:.3g}, allowed are {allowed:.3g}"


def choose(calls: list[Call], device: Device, quick: bool, end: float) -> tuple[Tile | None, int]:
    """One key's tile, None if the rule stands; how many were wrong. TimeoutError past `end`."""
    launches = [prepare(call, device) for call in calls]

    def run(tile: Tile) -> list[Tensor]:
        if perf_counter() > end:
            raise TimeoutError
        return [launch(tile) for launch in launches]

    tiles = contenders(calls, device, quick)
    good, wrong = _agreeing(run, tiles, [call.K for call in calls])
    if not good:
        return None, wrong
    counts = {t: math.ceil(SAMPLE_SECONDS / seconds_of(partial(run, t), 1)) for t in good}
    times: dict[Tile, list[float]] = {tile: [] for tile in good}
    for _ in range(ROUNDS):
        for tile in good:
            times[tile].append(seconds_of(partial(run, tile), min(MOST_CALLS, counts[tile])))
        good.append(good.pop(0))
    micros = {tile: 1e6 * median(each) for tile, each in times.items()}
    rule, best = tiles[0], min(good, key=micros.__getitem__)
    if rule in good and micros[best] >= (1 - GAIN) * micros[rule]:
        best = rule
    for tile in dict.fromkeys(tile for tile in (rule, best) if tile in good):
        what = "  the rule" * (tile == rule) + "  chosen" * (tile == best)
        print(f"  {micros[tile]:9.2f} us  {row_of(tile)}{what}", flush=True)
    return (None if best == rule else best), wrong


def _agreeing(
    run: Callable[[Tile], list[Tensor]], tiles: list[Tile], Ks: list[int]
) -> tuple[list[Tile], int]:
    """The tiles that run and agree with the first that does; how many do not agree."""
    from triton import TritonError

    good: list[Tile] = []
    bad: list[Tile] = []
    first: list[Tensor] = []
    for tile in tiles:
        try:
            results = run(tile)
            first = first or [y.clone() for y in results]
            told = [*filter(None, map(difference, results, first, Ks))]
        except torch.AcceleratorError:  # nothing runs on this GPU any more
            raise
        except (TritonError, RuntimeError) as error:
            print(f"  failed  {row_of(tile)}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        for y in results:
            y.fill_(math.nan)  # else the next one may leave out what this one wrote
        if told:
            print(f"  WRONG   {row_of(tile)}: {told[0]}")
        (bad if told else good).append(tile)
    return good, len(bad)


def why_not(calls: list[Call]) -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return "it needs a GPU that torch sees; --dry-run lists what it would measure"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    reasons = (backends.why_not("triton", c.spec, c.dtype, CUDA, c.N, c.K) for c in calls)
    return next(filter(None, reasons), None)


def load(path: Path, device: Device) -> dict[str, Any]:
    """The file as it is; ValueError if it cannot be replaced."""
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} is no folder that can be written to")
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("device", device.name) != device.name:
        raise ValueError(f"it is for {found['device']}, this is {device.name}")
    return found


def save(path: Path, device: Device, key: str, tile: Tile | None) -> None:
    """Writes the tile of a size into the file, or takes it out."""
    if tile is None and key not in load(path, device).get("tuned", {}):
        return

    def change(found: dict[str, Any]) -> None:
        tuned = {k: row for k, row in found.get("tuned", {}).items() if k != key}
        found["tuned"] = tuned | ({key: row_of(tile)} if tile else {})

    update(path, device, change)


def update(path: Path, device: Device, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the file anew with what `change` has changed; the planner sees it at once."""
    import triton

    found = {"device": device.name, "note": NOTE, **load(path, device)}
    found |= {"date": str(date.today()), "torch": torch.__version__, "triton": triton.__version__}
    change(found)
    text = json.dumps(found, indent=2) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(re.sub(r"\[[\d\s,]+\]", lambda row: json.dumps(json.loads(row[0])), text))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # interrupted, or no room
    planner.config.cache_clear()
    planner.plan.cache_clear()
    backends.most_rows.cache_clear()


def tune(jobs: dict[str, list[Call]], device: Device, path: Path, quick: bool, limit: float) -> int:
    """Measures the calls of each key, for `limit` seconds; returns how many tiles were wrong."""
    end, wrong = perf_counter() + limit, 0
    for done, (key, calls) in enumerate(jobs.items()):
        print(key, flush=True)
        try:
            tile, disagree = choose(calls, device, quick, end)
        except TimeoutError:
            print(f"time is up: {len(jobs) - done} of {len(jobs)} sizes are left as they were")
            break
        except torch.OutOfMemoryError:
            print("  does not fit the GPU's memory")
            continue
        save(path, device, key, tile)
        wrong += disagree
    return wrong
