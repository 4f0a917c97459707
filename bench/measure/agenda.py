"""Which rows are measured, in which order, and why others are not.

The most telling rows come first: a run has a limit of time, and what it does not reach is told.
"""

from __future__ import annotations

from typing import Any

from fusedres.tools.timing import MIN_ROUNDS, WARM_UP_CALLS

from . import cases, goals
from .cases import DTYPES, INFERENCE, STEP, Case, Task
from .counts import flops, traffic
from .row import CHECKED_ROWS

FP16_ON_CPU = ("rtdl-466", "square-256x256")  # torch's product takes 10 to 100 times as long there
LONGEST = 8.0  # seconds for a square's row on a CPU, except with --full
CALLS = WARM_UP_CALLS + 3 + MIN_ROUNDS + 6  # of a contender at least: warm-up, rounds, counts
START = {"cpu": 0.1, "cuda": 2.0}  # seconds to begin a row: tensors, and Triton's kernels
COMPILE = {INFERENCE: 2.0, STEP: 5.0}  # seconds on two cores; on a GPU a little more
COMPILE_MAX = 20.0
FIRST_COMPILE = 25.0  # imports, and headers that are compiled in advance
COMPILED_WIDTHS = (1024, 256)  # squares that torch.compile takes part in on a GPU
SLOW_COMPILER = "compiling takes seconds a row: not here, --full times it"


def agenda(device: str) -> list[Task]:
    gpu = device == "cuda"
    dtypes = ("bf16", "fp32", "fp16") if gpu else tuple(DTYPES)
    groups = [(cases.TINY, *cases.MODELS), *((case,) for case in cases.SQUARES)]
    rows = goals.tasks() if gpu else []
    rows += [row for group in groups for row in _rows(gpu, group, dtypes[:2])]
    return list(dict.fromkeys([*rows, *_rows(gpu, cases.CASES, dtypes)]))


def _rows(gpu: bool, group: tuple[Case, ...], dtypes: tuple[str, ...]) -> list[Task]:
    return [
        Task(case, dtype, mode)
        for dtype in dtypes
        for case in group
        if dtype in case.dtypes
        for mode in (*case.modes, *([cases.GRAPH] if gpu and case.group != cases.HOST else []))
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
        some &= (task.dtype, task.mode) != ("bf16", STEP)
    return ("compile",) if some else ()


def estimate(
    task: Task, compiled: tuple[str, ...], ceilings: dict[str, Any], rounds: float, device: str
) -> float:
    """Seconds that a row takes, of which `rounds` for its rounds if its calls are short."""
    rate = 1e12 * ceilings["matmul_tflop_per_s"][task.dtype]
    double = 1e12 * ceilings["matmul_tflop_per_s"]["fp32"] / 2
    once = 1.5 * flops(task) / rate + 3 * traffic(task) / ceilings["copy_gb_per_s"] / 1e9
    part = min(1.0, CHECKED_ROWS[device] / task.case.rows)
    check = 3 * part * flops(task._replace(mode=STEP)) / min(rate, double)
    compiling = COMPILE.get(task.mode, COMPILE[STEP]) * ("compile" in compiled)
    compiling += COMPILE_MAX * ("compile-max" in compiled)
    return START[device] + rounds + check + (3 + len(compiled)) * CALLS * once + compiling


def why_not(task: Task, device: str, seconds: float) -> str | None:
    """Why a row that takes `seconds` is not measured except with --full."""
    if device == "cpu" and task.dtype == "fp16" and task.case.name not in FP16_ON_CPU:
        return f"fp16 is slow on a CPU: here only {' and '.join(FP16_ON_CPU)}, --full for all"
    if device == "cpu" and task.case.group == cases.SQUARE and seconds > LONGEST:
        return f"it takes about {seconds:.0f} s on this CPU: --full"
    return None
