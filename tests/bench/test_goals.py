"""Goals: each has its rows and contenders, is judged as it says, and stands in the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import agenda
from bench.measure.cases import GRAPH, GRAPHS, INFERENCE, MODES, STEP, Case, Job, Task, square
from bench.measure.contenders import makers
from bench.measure.goals import (
    GOALS,
    HOSTS,
    LOST,
    MEMORY,
    ON_CPU,
    ON_GPU,
    PEAK,
    SAVED,
    Goal,
    asked,
    layers,
)
from bench.measure.judge import BYTES, judge, losses, value
from bench.report.goals import goal_table
from results_sample import spread, task_row

Results = dict[str, Any]
DEVICES = ("cpu", "cuda")
CEILINGS = {"matmul_tflop_per_s": {"fp32": 0.2, "bf16": 0.4, "fp16": 0.003}}
FORWARD, STEPS = (layers(mode, 256, 64) for mode in (INFERENCE, STEP))


def judged(*rows: dict[str, Any], device: str = "cpu", ceilings: Any = CEILINGS) -> list[Any]:
    return judge({"device": device, "rows": list(rows), "ceilings": ceilings})


def of(found: list[Any], goal: str, task: Task | None = None) -> Any:
    """The verdict of a goal, in the row of a task."""
    [one] = [g for g in found if g["goal"] == goal and (task is None or g["row"] == str(task))]
    return one


@pytest.mark.parametrize("device", DEVICES)
def test_each_goal_has_rows_and_each_row_comes_once_and_first(device: str) -> None:
    told, every = agenda.telling(device), agenda.agenda(device)
    assert len(set(told)) == len(set(map(str, told))) == len(told) > 30
    assert {task for goal in GOALS[device] for task in goal.tasks} <= set(told)
    assert every[: len(told)] == told, "and then all others"
    assert not set(told) & set(every[len(told) :]) and len(every) > 2 * len(told)
    assert all(goal.tasks or goal.pair == LOST for goal in GOALS[device])


def test_a_gpu_s_goals_span_widths_orders_and_modes() -> None:
    told = agenda.telling("cuda")
    widths = {t.case.features for t in told if t.mode == GRAPH and t.case.rows == 65536}
    assert widths == {64, 128, 256, 512, 1024, 2048, 4096}
    assert {task.case.order for task in told} >= {"note", "prenorm", "preact"}
    assert {*GRAPHS, STEP} <= {task.mode for task in told}


def test_a_cpu_has_rows_under_autocast_with_one_thread_and_in_16_bits() -> None:
    told = agenda.telling("cpu")
    shapes = {(task.case.rows, task.case.features) for task in told if task.case.group == "square"}
    assert shapes == {(256, 64), (256, 128), (256, 256), (256, 512), (4096, 64), (16384, 128)}
    of_squares = {task[1:] for task in told if task.case.group == "square"}
    pair = (INFERENCE, STEP)
    assert of_squares == {
        *((dtype, mode) for dtype in ("fp32", "bf16", "fp16", "autocast") for mode in pair),
        *(("fp32", mode) for mode in MODES if mode.endswith("one thread")),
    }
    assert all(agenda.why_not(task, "cpu", 1.0) is None for task in told)


@pytest.mark.parametrize("device", DEVICES)
def test_each_goal_s_pair_is_timed_in_each_of_its_rows(device: str) -> None:
    for goal in GOALS[device]:
        for task in goal.tasks:
            case = task.case
            small = Case("small", 9, 16, case.order, case.norm, hidden=case.hidden)
            made = makers(Job(small, "fp32", torch.device("cpu")), task, ())
            assert goal.pair in BYTES or set(goal.pair.split(" / ")) <= made.keys()


def test_linear_alone_is_no_layer() -> None:
    """It is x @ weight.T + bias; with gradients in a step."""
    [task] = [t for t in layers(INFERENCE, 256, 128) if t.case.activation == "gelu"]
    assert "linear" in asked(task) and "linear" not in asked(FORWARD[0])
    job, seen = Job(Case("small", 9, 16), "fp32", torch.device("cpu")), []
    job.first.linear.register_forward_hook(lambda module, inputs, y: seen.append(y))
    makers(job, task, ())["linear"]()()
    x = job.inputs[0]
    expected = torch.nn.functional.linear(x, job.first.linear.weight, job.first.linear.bias)
    torch.testing.assert_close(seen, [expected])


def test_goals_are_met_missed_or_not_measured() -> None:
    wide, narrow = (Task(square(65536, n), "bf16", GRAPH) for n in (4096, 128))
    found = judged(
        task_row(wide, matmul=1 / 1.06, training=1.0),
        task_row(narrow, matmul=1 / 1.15, eager=3.9, copy=0.80),
        device="cuda",
    )
    met = {(goal["goal"], goal["row"], goal["bound"]): goal["met"] for goal in found}
    assert met["forward / T", str(wide), "<= 1.05"] is False
    assert met["training / inference", str(wide), "<= 1.05"] is True
    assert met["forward / T", str(narrow), "<= 1.15"] is True
    assert met["eager / forward", str(narrow), ">= 3.8"] is True
    assert met["copy / forward", str(narrow), ">= 0.85"] is False
    assert met["forward / T", str(Task(square(65536, 2048), "bf16", GRAPH)), "<= 1.07"] is None
    assert len(found) == sum(len(goal.tasks) for goal in ON_GPU)


def test_what_is_better_than_a_goal_is_told() -> None:
    gelu, relu = FORWARD
    found = judged(task_row(gelu, eager=2.1), task_row(relu, eager=1.9))
    for task, passed in ((gelu, True), (relu, False)):
        one = of(found, "forward, 256 x 64", task)
        assert (one["bound"], one["beyond"]) == (">= 1.8", ">= 2")
        assert (one["met"], one["passed"]) == (True, passed)
    one = of(found, "forward, 256 x 128", layers(INFERENCE, 256, 128)[0])
    assert one["beyond"] is one["passed"] is None


def test_a_disturbed_row_is_not_judged_but_for_its_bytes() -> None:
    task = next(goal for goal in ON_CPU if goal.pair == PEAK).tasks[0]
    uneasy = {"calm": False, "peak_bytes": {"fused": 90, "eager": 100}}
    found = judged(task_row(task, eager=2.0) | uneasy, task_row(STEPS[0], eager=3.0) | uneasy)
    one = of(found, "step, 256 x 64", STEPS[0])
    assert (one["value"], one["met"], one["passed"]) == (3.0, None, None)
    one = of(found, "peak memory of a step, of eager's", task)
    assert (one["value"], one["met"], one["passed"]) == (0.9, True, False)


@pytest.mark.parametrize("bf16, fp16", [(0.4, 0.003), (0.05, 0.25), (0.1, 0.09)])
def test_goals_of_other_machines_are_left_out(bf16: float, fp16: float) -> None:
    rates = {"fp32": 0.2, "bf16": bf16, "fp16": fp16}
    found = {g["goal"] for g in judged(ceilings={"matmul_tflop_per_s": rates})}
    assert ("bf16, torch's product fast" in found) == (bf16 >= 0.1)
    assert ("bf16, torch's product slow" in found) == (bf16 < 0.1)
    assert ("fp16, torch's product slow" in found) == (fp16 < 0.1)


def test_lost_rows_are_counted_once_and_where_they_are_calm() -> None:
    lost = task_row(FORWARD[0], eager=0.9, compile=0.8)
    host = task_row(HOSTS[0], functional=0.7) | {"slower_than": ["functional"]}
    rows = lost, host, task_row(FORWARD[1], eager=1.5), task_row(STEPS[0], eager=0.9)
    rows[-1].update(calm=False, slower_than=[])
    one = of(judged(*rows), "rows that lose to eager or torch.compile")
    assert (one["value"], one["row"], one["met"]) == (1, "of 3 rows", False)
    assert of(judged(*rows[1:]), one["goal"])["met"] is True
    assert of(judged(), one["goal"])["met"] is None
    assert len(losses([lost])) == 2


def test_goals_are_compared_to_two_digits() -> None:
    most, least = Goal("", "", 1.05), Goal("", "", 2.0, least=True)
    assert most.reaches(1.0549, most.bound) and not most.reaches(1.056, most.bound)
    assert least.reaches(1.996, least.bound) and not least.reaches(1.99, least.bound)


def test_values_are_ratios_either_way_round_bytes_or_microseconds() -> None:
    row = task_row(MEMORY, eager=2.0, matmul=0.5)
    assert value(row, "eager / fused") == pytest.approx({"median": 2.0, "q1": 1.94, "q3": 2.06})
    turned = {"median": 2.0, "q1": 1 / 0.515, "q3": 1 / 0.485}
    assert value(row, "fused / matmul") == pytest.approx(turned)
    assert value(row, "fused / linear") is value(row, SAVED) is None
    saved = row | {"saved_bytes": {"fused": 49.0, "eager": 100.0}}
    assert value(saved, SAVED) == {"median": 0.49, "q1": 0.49, "q3": 0.49}
    assert value(row | {"times_us": {"fused": spread(3.0)}}, "fused") == spread(3.0)


def test_memory_and_host_are_goals_of_a_gpu() -> None:
    (memory,) = (goal for goal in ON_GPU if goal.tasks == (MEMORY,))
    assert memory.bound == 0.5 and memory.pair == SAVED
    hosts = [goal for goal in ON_GPU if {*goal.tasks} & {*HOSTS}]
    assert [(goal.bound, goal.tasks) for goal in hosts] == [(0.6, HOSTS[:1]), (0.55, HOSTS[1:])]


def test_the_table_has_the_worst_row_of_each_goal() -> None:
    gelu, relu = FORWARD
    uneasy = task_row(STEPS[0], eager=1.0) | {"calm": False}
    found = judged(task_row(gelu, eager=2.1), task_row(relu, eager=1.7), uneasy)
    lines = {line[0]: line[1:] for line in goal_table(found).body}
    told = [str(relu), ">= 1.8", ">= 2", "1.70", "1.65-1.75", "1 of 2", "1 of 2"]
    assert lines["forward, 256 x 64"] == told
    assert lines["step, 256 x 64"] == ["disturbed", ">= 1.5", ">= 2", "-", "-", "-", "-"]
    assert lines["step, 256 x 128"][0] == "not measured"
    assert lines["rows that lose to eager or torch.compile"][3:6] == ["0", "0", "1 of 1"]
    every = {tuple(line[:2]): line[4:] for line in goal_table(found, full=True).body}
    assert len(every) == len(found)
    assert every["forward, 256 x 64", str(relu)] == ["-", "1.70", "1.65-1.75", "MISSED"]
    assert every["forward, 256 x 64", str(gelu)] == ["-", "2.10", "2.04-2.16", "met"]
    assert every["step, 256 x 64", str(STEPS[0])] == ["-", "1.00", "0.97-1.03", "disturbed"]
    assert every["step, 256 x 64", str(STEPS[1])] == ["-", "-", "-", "not measured"]


def test_of_what_is_to_be_small_the_largest_is_the_worst() -> None:
    tasks = layers(INFERENCE, 256, 128)
    rows = [task_row(task, linear=1 / n) for task, n in zip(tasks, (1.1, 0.9), strict=True)]
    lines = {line[0]: line[1:] for line in goal_table(judged(*rows)).body}
    assert lines["beyond: as F.linear alone"][:4] == [str(tasks[0]), "<= 1", "-", "1.10"]
