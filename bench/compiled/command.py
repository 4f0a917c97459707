"""`python -m bench gpu-model`: what the Triton kernels compile to and what that predicts, without a
GPU: the goals, then the tiles shipped for bf16 and fp32 one by one. --write puts it into
bench/gpu-model.md, and the predictions into bench/gpu-model.json for gpu-check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fusedres.backends import plan as planner
from fusedres.spec import Spec, make_spec

from ..measure.cases import BACKWARD_GRAPH, GRAPH, RECORD_GRAPH, Task
from ..measure.goals import OF_EAGER, OF_PRODUCT, ON_GPU, Goal
from ..measure.results_file import ROOT
from ..report.tables import digits, table
from ..scaling.model import Layer
from . import aot, cost
from .sass import look

PAGE, PREDICTIONS = ROOT / "bench" / "gpu-model.md", ROOT / "bench" / "gpu-model.json"
ORDERS = {"prologue": "preact", "prebatch": "preact", "algebraic": "prenorm"}
FP32 = torch.backends.cuda.matmul
BATCH = ("columns", "batch", "prebatch")
MODES = (GRAPH, RECORD_GRAPH, BACKWARD_GRAPH)
INTRODUCTION = """# The Triton kernels by counting

Made by `python -m bench gpu-model --write`; nothing here was measured. bench/compiled/cost.py says
how seconds follow from instructions. Goals are those of bench/measure/goals.py, for the Triton
kernels also where `auto` takes the CUDA ones."""

TILES = """Instructions of a warp for a step of the product, then of a thread for each element of z,
outside of loops and in the finish of wide rows; registers, programs that a multiprocessor holds,
what they have on its way from memory, bytes of stack."""


def shipped(sm: int, dtype: torch.dtype) -> Iterator[tuple[str, planner.Tile]]:
    """Family and tile of every plain list of forward tiles for bf16 or fp32."""
    for family in planner.FAMILIES:
        if family == "algebraic" and dtype == torch.float32:
            continue  # of 16-bit types only
        for tile in planner.tiles_of(family, False, dtype.itemsize, aot.device(sm)):
            yield family, tile


def tile_row(sm: int, dtype: torch.dtype, family: str, tile: planner.Tile) -> list[str]:
    norm = "batch" if family in BATCH else None if family == "tile" else "layer"
    spec = make_spec(ORDERS.get(family, "note"), norm, "gelu", training=True)
    M = tile.BLOCK_M if family == "columns" else 65536
    N = tile.BLOCK_N if family == "rows" else 1024
    was = planner.choose_tile, planner.APART_FROM, FP32.fp32_precision
    planner.choose_tile, planner.APART_FROM, FP32.fp32_precision = lambda *_: tile, N, "tf32"
    try:
        (found,) = aot.compiled(sm, aot.forward, spec, dtype, M, N, 1024, look=look)
    finally:
        planner.choose_tile, planner.APART_FROM, FP32.fp32_precision = was
    product, finish = cost.loops(found)
    elements = tile.BLOCK_M * tile.BLOCK_N / (32 * found["warps"])
    numbers = (
        f"{product.instructions if product else 0}",
        f"{found['straight'] / elements:.0f}",
        f"{finish.instructions / 4096 * 32 * found['warps']:.0f}" if finish else "",
        str(found["registers"]),
        str(cost.resident(found, cost.GPUS[sm])),
        f"{cost.in_flight(found, cost.GPUS[sm]) / 1024:.0f}",
        str(found["stack"]),
    )
    sizes = " x ".join(map(str, tile[:3]))
    return [family, f"{sizes}, {tile.num_warps}, {tile.num_stages}", *numbers]


def tile_table(sm: int, dtype: torch.dtype) -> str:
    head = ["family", "tile, warps, stages", "a step", "an element", "and finish"]
    head += ["registers", "programs", "KiB in flight", "stack"]
    return table(head, [tile_row(sm, dtype, *row) for row in shipped(sm, dtype)], left=2)


def predict(sm: int, task: Task, pair: str) -> float | None:
    """A goal's ratio; None where this model knows nothing of it."""
    case, save = task.case, task.mode != GRAPH
    if task.mode not in MODES:
        return None
    spec = make_spec(case.order, case.norm, case.activation, training=save)
    layer = Layer(case.rows, case.features, case.features, case.order, case.norm, "gelu", "bf16")
    layer, back = replace(layer, training=save), task.mode == BACKWARD_GRAPH
    ours = cost.backward(spec, layer, sm) if back else cost.forward(spec, layer, sm, save)
    if pair == OF_PRODUCT:
        return ours / cost.products(layer, sm, back)
    if pair == OF_EAGER:
        return cost.of_eager(layer, sm, back) / ours
    if pair == "copy / fused":
        return (layer.product.bytes / cost.GPUS[sm].copy + cost.GPUS[sm].launch) / ours
    other: Spec = replace(spec, activation="gelu_tanh") if "tanh" in pair else spec
    time = cost.forward(other, layer, sm, "training" in pair)
    return ours / time if "tanh" in pair else time / ours


def goals(sm: int) -> list[dict[str, Any]]:
    """Each goal for each of its rows that this model knows."""
    found = []
    for goal, task in ((one, task) for one in ON_GPU for task in one.tasks):
        value = predict(sm, task, goal.pair)
        if value is not None:
            found.append(_verdict(goal, task, value))
    return found


def _verdict(goal: Goal, task: Task, value: float) -> dict[str, Any]:
    bound = f"{'>=' if goal.least else '<='} {goal.bound:g}"
    verdict = {"goal": goal.what, "row": str(task), "bound": bound}
    return verdict | {"value": round(value, 2), "met": goal.reaches(value, goal.bound)}


def goal_table(found: list[dict[str, Any]]) -> str:
    body = [
        [g["goal"], g["row"], g["bound"], digits(g["value"]), "" if g["met"] else "MISSED"]
        for g in found
    ]
    return table(["goal", "row", "bound", "predicted", ""], body, left=3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-model", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into bench/gpu-model.md and .json")
    parser.add_argument("--sm", type=int, choices=sorted(cost.GPUS), help="only this architecture")
    parser.add_argument("--goals", action="store_true", help="without the table of tiles")
    chosen = parser.parse_args(arguments)
    parts, told = [INTRODUCTION], {}
    for sm in [chosen.sm] if chosen.sm else sorted(cost.GPUS, reverse=True):
        found = goals(sm)
        told[f"sm_{sm}"] = found
        parts += [f"## sm_{sm}, {cost.GPUS[sm].name}: goals", goal_table(found)]
        if not chosen.goals:
            parts += [f"## sm_{sm}: tiles", TILES, tile_table(sm, torch.bfloat16)]
            parts += [f"### fp32 as TF32, sm_{sm}", tile_table(sm, torch.float32)]
    page = "\n\n".join(parts) + "\n"
    if chosen.write:
        PAGE.write_text(page)
        PREDICTIONS.write_text(json.dumps(told, indent=1) + "\n")
    print(page)
