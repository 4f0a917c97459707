"""Which rows are measured, in which order, and why others are not.

The most telling rows come first, those of the goals: a run has a limit of time, and what it does
not reach is told.
"""

from __future__ import annotations

import torch

from fusedres.tools.timing import MIN_ROUNDS, WARM_UP_CALLS

from . import cases
from .cases import (
    AUTOCAST,
    BACKWARD_GRAPH,
    GRAPH,
    INFERENCE,
    ONE_THREAD,
    STEP,
    STEP_ONE_THREAD,
    TINY,
    Case,
    Task,
    product_dtype,
    square,
)
from .counts import flops, traffic
from .goals import BATCH, GOALS, HOSTS, MEMORY, SHORT, TALL, asked, shapes, wide
from .row import CHECKED_ROWS, Row

LONGEST = 8.0  # seconds for a square's row on a CPU, except with --full
CALLS = WARM_UP_CALLS + 3 + MIN_ROUNDS + 6  # of a contender at least: warm-up, rounds, counts
START = {"cpu": 0.1, "cuda": 2.0}  # seconds to begin a row: tensors, and Triton's kernels
COMPILE = {INFERENCE: 2.0, STEP: 5.0}  # seconds on two cores; on a GPU a little more
COMPILE_MAX = 20.0
FIRST_COMPILE = 25.0  # imports, and headers that are compiled in advance
COMPILED_WIDTHS = (1024, 256)  # squares that torch.compile takes part in on a GPU
SLOW_COMPILER = "compiling takes seconds a row: not here, --full times it"


def telling(device: str) -> list[Task]:
    """Every row once, the most telling first: when time runs out, the last ones are left out."""
    of_goals = [task for goal in GOALS[device] for task in goal.tasks]
    if device == "cpu":
        alone = shapes("fp32", ONE_THREAD, STEP_ONE_THREAD)
        rest = [*alone, *shapes(AUTOCAST, INFERENCE, STEP)]
        return list(dict.fromkeys([*_rows(False, (TINY,), ("fp32",)), *of_goals, *rest]))
    first = [*wide(GRAPH, 1024), *wide(BACKWARD_GRAPH, 1024), *HOSTS, MEMORY, BATCH]
    orders = [
        Task(square(rows, 1024, order), "bf16", mode)
        for order in ("prenorm", "preact")
        for mode, rows in ((GRAPH, TALL), (BACKWARD_GRAPH, TALL), (GRAPH, SHORT))
    ]
    rest = wide(BACKWARD_GRAPH, 1024, 256, rows=SHORT)
    return list(dict.fromkeys([*first, *of_goals, *orders, *rest]))


def agenda(device: str) -> list[Task]:
    gpu = device == "cuda"
    dtypes = ("bf16", "fp32", "fp16") if gpu else tuple(cases.DTYPES)
    groups = [(cases.TINY, *cases.MODELS), *((case,) for case in cases.SQUARES)]
    rows = telling(device)
    rows += [row for group in groups for row in _rows(gpu, group, dtypes[:2])]
    return list(dict.fromkeys([*rows, *_rows(gpu, cases.CASES, dtypes)]))


def _rows(gpu: bool, group: tuple[Case, ...], dtypes: tuple[str, ...]) -> list[Task]:
    return [
        Task(case, dtype, mode)
        for dtype in dtypes
        for case in group
        if dtype in case.dtypes
        for mode in (*case.modes, *([GRAPH] if gpu and case.group != cases.HOST else []))
    ]


def chosen(tasks: list[Task], only: str) -> list[Task]:
    """Those with `only` in 'NAME DTYPE'; ValueError if there is none."""
    found = [task for task in tasks if only in f"{task.case.name} {task.dtype}"]
    if not found:
        names = ", ".join(dict.fromkeys(task.case.name for task in tasks))
        raise ValueError(f"--only {only!r} leaves no case; cases: {names}")
    return found


def compiled(task: Task, device: str, full: bool) -> tuple[str, ...]:
    """Which of torch.compile's contenders a row has."""
    if full:
        return "compile", "compile-max"
    some = task.case.group != cases.SQUARE
    if device == "cuda":
        some |= task.case.features in COMPILED_WIDTHS
    else:
        some |= task.dtype == "fp32" and bool(asked(task))
        some &= (task.dtype, task.mode) != ("bf16", STEP)
    return ("compile",) if some else ()


def estimate(task: Task, names: tuple[str, ...], limits: Row, rounds: float, device: str) -> float:
    """Seconds that a row takes with the `names` of torch.compile's contenders and the ceilings
    `limits`; `rounds` of them for its rounds if its calls are short.
    """
    rate = 1e12 * limits["matmul_tflop_per_s"][product_dtype(task.dtype)]
    double = 1e12 * limits["matmul_tflop_per_s"]["fp32"] / 2
    once = 1.5 * flops(task) / rate + 3 * traffic(task) / limits["copy_gb_per_s"] / 1e9
    once *= torch.get_num_threads() if task.mode in (ONE_THREAD, STEP_ONE_THREAD) else 1
    part = min(1.0, CHECKED_ROWS[device] / task.case.rows)
    check = 3 * part * flops(task._replace(mode=STEP)) / min(rate, double)
    compiling = COMPILE.get(task.mode, COMPILE[STEP]) * ("compile" in names)
    compiling += COMPILE_MAX * ("compile-max" in names)
    return START[device] + rounds + check + (4 + len(names)) * CALLS * once + compiling


def why_not(task: Task, device: str, seconds: float) -> str | None:
    """Why a row that takes `seconds` is not measured except with --full."""
    if device == "cpu" and task.dtype == "fp16" and not asked(task):
        return "fp16 is slow on a CPU: only where a goal asks for it, --full for all"
    if device == "cpu" and task.case.group == cases.SQUARE and seconds > LONGEST:
        return f"it takes about {seconds:.0f} s on this CPU: --full"
    return None
