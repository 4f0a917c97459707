"""Which rows are measured, in which order, and why others are not.

The most telling rows come first: a run has a limit of time, and what it does not reach is told. On
a GPU they are those of the goals. Their yardstick T is the bare product by cuBLAS on the same
tensors: x @ weight.T for the forward pass, dy @ weight and dy.T @ x for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedres.tools.timing import MIN_ROUNDS, WARM_UP_CALLS

from . import cases
from .cases import BACKWARD_GRAPH, GRAPH, INFERENCE, RECORD, RECORD_GRAPH, STEP, Case, Task, square
from .counts import flops, traffic
from .row import CHECKED_ROWS, Row

FP16_ON_CPU = ("rtdl-466", "square-256x256")  # torch's product takes 10 to 100 times as long there
LONGEST = 8.0  # seconds for a square's row on a CPU, except with --full
CALLS = WARM_UP_CALLS + 3 + MIN_ROUNDS + 6  # of a contender at least: warm-up, rounds, counts
START = {"cpu": 0.1, "cuda": 2.0}  # seconds to begin a row: tensors, and Triton's kernels
COMPILE = {INFERENCE: 2.0, STEP: 5.0}  # seconds on two cores; on a GPU a little more
COMPILE_MAX = 20.0
FIRST_COMPILE = 25.0  # imports, and headers that are compiled in advance
COMPILED_WIDTHS = (1024, 256)  # squares that torch.compile takes part in on a GPU
SLOW_COMPILER = "compiling takes seconds a row: not here, --full times it"
TALL, SHORT = 65536, 256  # rows


@dataclass(frozen=True)
class Goal:
    """For each of `tasks`, the ratio `pair` is at most `bound`; with `least`, at least."""

    what: str
    pair: str
    bound: float
    tasks: tuple[Task, ...]
    least: bool = False

    def met(self, value: float) -> bool:
        """To two digits, which is what a measurement is worth."""
        value = round(value, 2)
        return value >= self.bound if self.least else value <= self.bound


def wide(mode: str, *features: int, rows: int = TALL) -> tuple[Task, ...]:
    return tuple(Task(square(rows, n), "bf16", mode) for n in features)


NARROW = (256, 128, 64)
SMALL = (1024, 512, 256, 128, 64)
BATCH = Task(square(4096, 1024, norm="batch"), "bf16", RECORD_GRAPH)
MEMORY = Task(square(TALL, 1024), "bf16", STEP)
HOSTS = tuple(Task(cases.TINY, "fp32", mode) for mode in (RECORD, STEP))
OF_PRODUCT, OF_EAGER, SAVED = "fused / matmul", "eager / fused", "saved, fused / eager"
GOALS = (
    Goal("forward / T", OF_PRODUCT, 1.05, wide(GRAPH, 4096)),
    Goal("forward / T", OF_PRODUCT, 1.07, wide(GRAPH, 2048)),
    Goal("forward / T", OF_PRODUCT, 1.12, wide(GRAPH, 1024)),
    Goal("forward / T", OF_PRODUCT, 1.20, wide(GRAPH, 512)),
    Goal("forward / T", OF_PRODUCT, 1.15, wide(GRAPH, *NARROW)),
    Goal("eager / forward", OF_EAGER, 2.8, wide(GRAPH, 512), least=True),
    Goal("eager / forward", OF_EAGER, 3.8, wide(GRAPH, *NARROW), least=True),
    Goal("copy / forward", "copy / fused", 0.85, wide(GRAPH, *NARROW), least=True),
    Goal("forward / T", OF_PRODUCT, 1.3, wide(GRAPH, *SMALL, rows=SHORT)),
    Goal("eager / forward", OF_EAGER, 3.0, wide(GRAPH, *SMALL, rows=SHORT), least=True),
    Goal("erf / tanh GELU", "fused / gelu_tanh", 1.03, wide(GRAPH, 1024, 512)),
    Goal("training / inference", "training / fused", 1.05, wide(GRAPH, 4096, 2048, 1024)),
    Goal("backward / T", OF_PRODUCT, 1.12, wide(BACKWARD_GRAPH, 4096)),
    Goal("backward / T", OF_PRODUCT, 1.20, wide(BACKWARD_GRAPH, 2048)),
    Goal("backward / T", OF_PRODUCT, 1.40, wide(BACKWARD_GRAPH, 1024)),
    Goal("eager / backward", OF_EAGER, 3.0, wide(BACKWARD_GRAPH, 128, 64), least=True),
    Goal("eager / backward", OF_EAGER, 2.2, wide(BACKWARD_GRAPH, 256), least=True),
    Goal("eager / backward", OF_EAGER, 2.0, wide(BACKWARD_GRAPH, 512), least=True),
    Goal("eager / batch norm training", OF_EAGER, 2.0, (BATCH,), least=True),
    Goal("host time, forward", "fused / eager", 0.6, HOSTS[:1]),
    Goal("host time, both", "fused / eager", 0.55, HOSTS[1:]),
    Goal("activation memory", SAVED, 0.5, (MEMORY,)),
)


def tasks() -> list[Task]:
    """Every row once, the most telling first: when time runs out, the last ones are left out."""
    first = [*wide(GRAPH, 1024), *wide(BACKWARD_GRAPH, 1024), *HOSTS, MEMORY, BATCH]
    of_goals = [task for goal in GOALS for task in goal.tasks]
    orders = [
        Task(square(rows, 1024, order), "bf16", mode)
        for order in ("prenorm", "preact")
        for mode, rows in ((GRAPH, TALL), (BACKWARD_GRAPH, TALL), (GRAPH, SHORT))
    ]
    rest = wide(BACKWARD_GRAPH, 1024, 256, rows=SHORT)
    return list(dict.fromkeys([*first, *of_goals, *orders, *rest]))


def value(row: Row, pair: str) -> float | None:
    """What `row` tells of a goal's ratio; None if one of the two was not measured."""
    if pair == SAVED:
        found = row.get("saved_bytes")
        return found["fused"] / found["eager"] if found else None
    above, below = pair.split(" / ")
    ratio = row["ratios"].get(above if below == "fused" else below)
    return ratio and (ratio["median"] if below == "fused" else 1 / ratio["median"])


def judge(rows: list[Row]) -> list[Row]:
    """Each goal for each of its rows: the value, and whether it is met; None: not measured."""
    by_task = {(row["case"], row["dtype"], row["mode"]): row for row in rows}
    judged = []
    for goal in GOALS:
        sign = ">=" if goal.least else "<="
        for task in goal.tasks:
            row = by_task.get((task.case.name, task.dtype, task.mode))
            found = row and value(row, goal.pair)
            met = None if found is None else goal.met(found)
            verdict = {"goal": goal.what, "row": str(task), "bound": f"{sign} {goal.bound:g}"}
            judged.append(verdict | {"value": found, "met": met})
    return judged


def agenda(device: str) -> list[Task]:
    gpu = device == "cuda"
    dtypes = ("bf16", "fp32", "fp16") if gpu else tuple(cases.DTYPES)
    groups = [(cases.TINY, *cases.MODELS), *((case,) for case in cases.SQUARES)]
    rows = tasks() if gpu else []
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
        some &= (task.dtype, task.mode) != ("bf16", STEP)
    return ("compile",) if some else ()


def estimate(task: Task, names: tuple[str, ...], limits: Row, rounds: float, device: str) -> float:
    """Seconds that a row takes with the `names` of torch.compile's contenders and the ceilings
    `limits`; `rounds` of them for its rounds if its calls are short.
    """
    rate = 1e12 * limits["matmul_tflop_per_s"][task.dtype]
    double = 1e12 * limits["matmul_tflop_per_s"]["fp32"] / 2
    once = 1.5 * flops(task) / rate + 3 * traffic(task) / limits["copy_gb_per_s"] / 1e9
    part = min(1.0, CHECKED_ROWS[device] / task.case.rows)
    check = 3 * part * flops(task._replace(mode=STEP)) / min(rate, double)
    compiling = COMPILE.get(task.mode, COMPILE[STEP]) * ("compile" in names)
    compiling += COMPILE_MAX * ("compile-max" in names)
    return START[device] + rounds + check + (3 + len(names)) * CALLS * once + compiling


def why_not(task: Task, device: str, seconds: float) -> str | None:
    """Why a row that takes `seconds` is not measured except with --full."""
    if device == "cpu" and task.dtype == "fp16" and task.case.name not in FP16_ON_CPU:
        return f"fp16 is slow on a CPU: here only {' and '.join(FP16_ON_CPU)}, --full for all"
    if device == "cpu" and task.case.group == cases.SQUARE and seconds > LONGEST:
        return f"it takes about {seconds:.0f} s on this CPU: --full"
    return None
