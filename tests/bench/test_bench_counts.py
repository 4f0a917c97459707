"""What the benchmark counts, against counts by hand; its contenders are what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.measure import contenders
from bench.measure.cases import (
    AUTOCAST,
    FORMULAS,
    GRAPH,
    INFERENCE,
    MLP,
    ONE_THREAD,
    STEP,
    STEP_ONE_THREAD,
    TINY,
    Case,
    Job,
    Task,
)
from bench.measure.counts import flops, launches, peak_bytes, traffic
from bench.measure.row import Options, measure, wrong
from fusedres.tools.bench import check, saved_bytes

CPU = torch.device("cpu")
FP32 = 4  # bytes
CEILINGS = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"fp32": 0.1, "bf16": 0.2, "fp16": 0.001}}
M, K = 37, 53
COUNTED = Case("counted", M, K)
BLOCK = Case("block", M, K, MLP, hidden=71)


def test_flops_and_bytes_against_a_count_by_hand() -> None:
    forward, step = Task(COUNTED, "fp32", INFERENCE), Task(COUNTED, "fp32", STEP)
    assert flops(forward) == 2 * M * K * K and flops(step) == 6 * M * K * K
    x = y = M * K
    parameters = K * K + K + 2 * K  # weight, bias, gamma, beta
    assert traffic(forward) == FP32 * (x + y + parameters)
    assert traffic(step._replace(dtype="bf16")) == 3 * 2 * (x + y + parameters)
    other = Case("other", M, K, "bert-output", residual=True, activation=None)
    assert traffic(Task(other, "bf16", INFERENCE)) == 2 * (x + x + y + parameters)
    rms = Case("rms", M, K, norm="rms")
    assert traffic(Task(rms, "fp32", INFERENCE)) == FP32 * (x + y + parameters - K)
    block, h = Task(BLOCK, "fp32", INFERENCE), M * 71
    assert flops(block) == 2 * 2 * M * K * 71
    assert traffic(block) == FP32 * (x + y + 2 * h + 2 * 71 * K + 71 + K + 2 * K)


@pytest.mark.parametrize("case", [COUNTED, BLOCK, Case("rms", M, K, norm="rms"), TINY])
def test_parameters_are_all_counted(case: Case) -> None:
    """bytes(M rows) - bytes(0 rows of x) is what the parameters take."""
    parameters = sum(p.numel() for p in Job(case, "fp32", CPU).parameters)
    empty = Case("empty", 0, case.features, case.order, case.norm, hidden=case.hidden)
    assert traffic(Task(empty, "fp32", INFERENCE)) == FP32 * parameters


def test_saved_bytes_of_eager_and_fused() -> None:
    """note + layer norm + GELU: eager saves z, mean, rstd and h = norm(z); fused at most half."""
    job = Job(COUNTED, "fp32", CPU)
    z, vector = M * K * FP32, M * FP32
    eager = 2 * z + 2 * vector
    assert saved_bytes(job.eager, *job.inputs) == eager
    fused = saved_bytes(job.fused, *job.inputs)
    assert fused == eager if job.backend == "reference" else 0 < fused <= eager / 2


def test_peak_bytes_against_a_count_by_hand() -> None:
    def call() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(700)
        del b, c

    assert peak_bytes(call, CPU) == 1500 * FP32


def test_peak_bytes_of_eager_s_forward() -> None:
    """Under no_grad z = f(x), h = n(z), a(h), then the sum: two of (M, N) live at a time, and in
    the norm mean and rstd too.
    """
    job = Job(COUNTED, "fp32", CPU)
    found = peak_bytes(job.call(job.eager, INFERENCE), CPU)
    assert found == (2 * M * K + 2 * M) * FP32


def test_a_fused_layer_is_one_op_where_eager_is_four(native: str) -> None:
    job = Job(COUNTED, "fp32", CPU)
    assert launches(job.call(job.eager, INFERENCE), CPU) == 4  # linear, norm, gelu, add
    assert launches(job.call(job.fused, INFERENCE), CPU) == 1
    assert launches(job.call(job.fused, STEP), CPU) == 2
    block = Job(BLOCK, "fp32", CPU)
    assert launches(block.call(block.fused, INFERENCE), CPU) == 1  # it is narrow
    block.fused.parts = lambda: None
    assert launches(block.call(block.fused, INFERENCE), CPU) == 2


@pytest.mark.parametrize("case, products", [(COUNTED, 1), (BLOCK, 2)])
def test_the_bare_product_is_as_many_products(case: Case, products: int) -> None:
    job = Job(case, "fp32", CPU)
    for mode, each in ((INFERENCE, 1), (STEP, 3)):
        call = contenders.makers(job, Task(case, "fp32", mode), ())["matmul"]()
        assert launches(call, CPU) == products * each


# Layers and contenders.


@pytest.mark.parametrize("order", FORMULAS)
def test_the_hand_written_baseline_is_the_layer(order: str) -> None:
    hidden = 29 if order == MLP else None
    case = Case("small", 33, 17, order, residual=not hidden, hidden=hidden)
    assert check(Job(case, "fp32", CPU)) is None


def test_the_check_finds_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(COUNTED, "fp32", CPU)
    job.fused.register_forward_hook(lambda _module, _inputs, y: y * 1.001)
    assert str(check(job)).startswith("y has RMS error")
    monkeypatch.setattr("bench.measure.row.wrong", lambda *task: "y has RMS error 1")
    with pytest.raises(ArithmeticError, match=r"nothing is timed: y has RMS error 1"):
        measure(Task(COUNTED, "fp32", INFERENCE), Options(CPU, 0.0, CEILINGS))


def test_calls_take_turns_on_the_sets_of_inputs() -> None:
    job, seen = Job(COUNTED, "fp32", CPU, copies=3), []
    call = job.call(lambda x: seen.append(x) or x, INFERENCE)
    for _ in range(4):
        call()
    expected = [job.sets[i].inputs[0] for i in (0, 1, 2, 0)]
    assert [*map(id, seen)] == [*map(id, expected)]


def test_the_product_and_the_copy_take_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    job, seen = Job(COUNTED, "fp32", CPU, copies=2), []
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(a.data_ptr()))
    found = contenders.makers(job, Task(COUNTED, "fp32", GRAPH), ())
    product, copy = found["matmul"](), found["copy"]()
    product(), product(), product()
    assert seen == [job.sets[i].inputs[0].data_ptr() for i in (0, 1, 0)]
    copy()
    torch.testing.assert_close(copy(), job.sets[1].inputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", [INFERENCE, STEP])
def test_under_autocast_every_contender_multiplies_in_bf16(mode: str) -> None:
    job, products = Job(COUNTED, AUTOCAST, CPU), []
    for linear in job.linears:
        linear.register_forward_hook(lambda module, inputs, z: products.append(z.dtype))
    job.call(job.eager, mode)()
    assert products == [torch.bfloat16]
    assert {p.dtype for p in job.parameters} == {job.inputs[0].dtype} == {torch.float32}
    row, _ = measure(Task(COUNTED, AUTOCAST, mode), Options(CPU, 0.0, CEILINGS))
    assert row["matmul_share"] == pytest.approx(row["tflop_per_s"] / 0.2), "of bf16's ceiling"
    assert row["backend"] == Job(COUNTED, "fp32", CPU).backend
    assert {"eager", "matmul"} == row["ratios"].keys()


def test_the_check_knows_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.row.check", lambda job: torch.is_autocast_enabled("cpu"))
    assert wrong.__wrapped__(COUNTED, AUTOCAST, CPU) is True
    assert wrong.__wrapped__(COUNTED, "fp32", CPU) is False


@pytest.mark.parametrize("mode", [ONE_THREAD, STEP_ONE_THREAD, INFERENCE])
def test_one_thread_is_one_and_only_for_its_row(mode: str) -> None:
    threads, seen = torch.get_num_threads(), []

    def clock(calls: Any, device: torch.device, seconds: float) -> Any:
        seen.append(torch.get_num_threads())
        return [dict.fromkeys(calls, 1.0)], True

    torch.set_num_threads(3)
    try:
        row, _ = measure(Task(COUNTED, "fp32", mode), Options(CPU, 0.0, CEILINGS), clock)
        assert seen == [3 if mode == INFERENCE else 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert ("peak_bytes" in row) == ("backward" in mode)
    assert row["flops"] == flops(Task(COUNTED, "fp32", STEP if "backward" in mode else INFERENCE))


def test_a_named_backend_runs_the_same_parameters() -> None:
    for case in (COUNTED, BLOCK):
        job = Job(case, "fp32", CPU)
        twin = contenders.with_backend(job.fused, "reference")
        layers = [twin.fc1, twin.fc2] if case.hidden else [twin]
        assert [layer.backend for layer in layers] == ["reference"] * len(layers)
        own = job.fused.fc1 if case.hidden else job.fused
        assert own.backend == "auto"
        assert {*map(id, twin.parameters())} == {*map(id, job.parameters)}
        torch.testing.assert_close(twin(*job.inputs), job.fused(*job.inputs))


def test_a_contender_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: nn.Module, **settings: Any) -> Any:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    options = Options(CPU, 0.0, CEILINGS, ("compile",), "left out")
    row, rounds = measure(Task(COUNTED, "fp32", INFERENCE), options)
    assert row["failed"] == {"compile": "RuntimeError: no compiler", "compile-max": "left out"}
    assert set(row["ratios"]) == {"eager", "matmul"} and len(rounds) == row["rounds"]
