"""The model of `python -m bench gpu-model`: loops of a listing, seconds against counts by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from bench.compiled import command, cost
from bench.compiled.cost import GPUS, Work, in_flight, resident, seconds
from bench.compiled.sass import Loop, loops_of
from bench.gpu.__main__ import PREDICTIONS, predictions
from bench.measure.goals import ON_GPU

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/                   LDGSTS.E [R2+0x10], desc[UR4][R4.64] ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
MORE
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   STG.E [R2.64], R4 ;
        /*00a0*/              @!P1 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
""".replace(
    "MORE",
    "\n".join(
        f"        /*{n:04x}*/                   IADD3 R1, R1, 0x1, RZ ;" for n in range(64, 72)
    ),
)
PRODUCT, FINISH = Loop(140, 6144, True, False), Loop(400, 4096, False, True)
KERNEL = {
    "loops": [PRODUCT, FINISH],
    "straight": 1000,
    "registers": 200,
    "warps": 8,
    "stages": 3,
    "shared": 100 << 10,
    "wgmma": 4,
    "programs": 132 * 16,
}


def test_loops_are_found_in_a_listing() -> None:
    loops, outside = loops_of(LISTING)
    assert loops == [Loop(12, 32 * 16 + 32 * 4, True, False)]  # a short one waits for somebody
    assert outside == 2 + 2


def test_programs_of_a_multiprocessor() -> None:
    assert resident(KERNEL, GPUS[90]) == 1
    assert resident({**KERNEL, "registers": 128}, GPUS[90]) == 2
    assert resident({**KERNEL, "registers": 128, "shared": 120 << 10}, GPUS[90]) == 1
    assert in_flight({**KERNEL, "registers": 128}, GPUS[90]) == 2 * 6144 * 8 * 2


def test_seconds_are_the_longest_of_what_a_kernel_waits_for() -> None:
    free = replace(GPUS[90], clock=1e9, launch=0.0)
    original, GPUS[90] = GPUS[90], free
    try:
        bare = {**KERNEL, "loops": []}
        # One at a time: 16 times 1000 instructions of two warps a scheduler, and a wait.
        assert seconds(bare, Work(), 0, 90) == pytest.approx(16 * (2000 + 800) * 1e-9)
        # Two at a time wait while the other works.
        both = {**bare, "registers": 128}
        assert seconds(both, Work(), 0, 90) == pytest.approx(16 * 2000 * 1e-9)
        assert seconds(bare, Work(), free.copy, 90) == pytest.approx(1.0)
        issue = 16 * (2 * 140 * 100 + 2000 + 800) * 1e-9
        l2 = 16 * 6144 * 8 * 100 / cost.FROM_L2 * 1e-9
        assert seconds(KERNEL, Work(100), 0, 90) == pytest.approx(max(issue, l2))
        flops = 1e9
        slow = seconds({**bare, "wgmma": 0}, Work(flops=flops), 0, 90)
        fast = seconds(bare, Work(flops=flops), 0, 90)
        rest = 16 * (2000 + 800) * 1e-9
        assert fast - rest == pytest.approx(16 * flops * 132 / free.library)
        assert slow - rest == pytest.approx(2 * (fast - rest))
    finally:
        GPUS[90] = original


def test_every_goal_of_the_kernels_is_predicted_and_gpu_check_knows() -> None:
    """What is written down is of the goals as they are; of host and memory nothing is predicted."""
    asked = [
        (goal.what, str(task), goal)
        for goal in ON_GPU
        for task in goal.tasks
        if task.mode in command.MODES
    ]
    for name, gpu in (("sm_90", "NVIDIA H200"), ("sm_80", "NVIDIA A100-SXM4-80GB")):
        found = json.loads(PREDICTIONS.read_text())[name]
        assert [(g["goal"], g["row"]) for g in found] == [pair[:2] for pair in asked]
        for told, (_, _, goal) in zip(found, asked, strict=True):
            assert told["met"] == goal.reaches(told["value"], goal.bound) and told["value"] > 0
        assert len(predictions(gpu)) == len({pair[:2] for pair in asked})
    assert not predictions("AMD")


def test_the_page_tells_of_every_shipped_tile() -> None:
    text = command.PAGE.read_text()
    titles = ((torch.bfloat16, "## sm_{}: tiles", 2), (torch.float32, "### fp32 as TF32, sm_{}", 1))
    for sm, (dtype, title, part) in product(GPUS, titles):
        rows = text.split(title.format(sm))[1].split("\n\n")[part].rstrip()
        assert rows.count("\n") == 1 + len(list(command.shipped(sm, dtype)))
        for family, tile in command.shipped(sm, dtype):
            sizes = " x ".join(map(str, tile[:3]))
            assert f"{sizes}, {tile.num_warps}, {tile.num_stages}" in rows, family
