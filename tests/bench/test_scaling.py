"""The formulas of model.py against counts done by hand, limits and real layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import counts
from bench.measure.cases import HOST, INFERENCE, STEP, Case, Job
from bench.measure.results_file import RESULTS, load, newest
from bench.report.section import replace_part
from bench.scaling import command as scaling
from bench.scaling import model
from bench.scaling.model import Layer, Machine, kernels, seconds
from fusedres.tools.bench import saved_bytes
from results_sample import sample

CPU = torch.device("cpu")
M, K, N = 37, 53, 29
FP32 = 4  # bytes
IDEAL = Machine("cuda", "ideal", "made up", 1e12, {"fp32": 1e14}, 0.0, link=1e11)
ORDERS = ("note", "resnet-v1", "preact", "prenorm", "postnorm", "bert-output", "linear-norm-add")


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("order", ORDERS)
def test_saved_bytes_are_those_of_real_layers(order: str, norm: str) -> None:
    for activation in ("relu", "gelu", None):
        for dtype in ("fp32", "bf16"):
            job = Job(Case("saved", M, K, order, norm, activation, residual=True), dtype, CPU)
            layer = Layer(M, K, K, order, norm, activation, dtype, residual=True)
            eager = saved_bytes(job.eager, *job.inputs)
            assert model.saved_bytes(layer, "eager", "cpu") == eager, (activation, dtype)
            if job.backend != "reference":
                fused = saved_bytes(job.fused, *job.inputs)
                assert model.saved_bytes(layer, "fused", "cpu") == fused, (activation, dtype)


def test_activations_of_a_deep_net_are_those_of_real_layers() -> None:
    """All that lives after forward: x, each layer's output, what each saves; each storage once."""
    depth, kept = 5, {}
    jobs = [Job(Case("deep", M, K), "fp32", CPU) for _ in range(depth)]

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    y = jobs[0].inputs[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for job in jobs:
            y = job.eager(y)
    kept[y.untyped_storage().data_ptr()] = y.untyped_storage()
    for p in (p for job in jobs for p in job.eager.parameters()):
        kept.pop(p.untyped_storage().data_ptr(), None)
    found = sum(storage.nbytes() for storage in kept.values())
    assert model.depth_bytes(Layer(M, K, K), "eager", depth, "cpu") == found


def test_eager_forward_by_hand() -> None:
    """note: z, norm(z), act(h) and the sum; M N elements are read or written 1 + 2 + 2 + 3 times
    beside x and weight."""
    found = kernels(Layer(M, K, N, residual=True), "eager", INFERENCE, "cpu")
    assert len(found) == 4
    assert sum(k.flops for k in found) == 2 * M * N * K
    assert sum(k.bytes for k in found) == (M * K + N * K + 8 * M * N) * FP32


def test_the_statistics_of_batch_norm_are_a_pass_in_training_only() -> None:
    layer = Layer(M, N, N, norm="batch")
    for contender, count in (("fused", 3), ("eager", 4)):  # kernels of a step's forward pass
        step = kernels(layer, contender, STEP, "cpu")[:count]
        forward = kernels(layer, contender, INFERENCE, "cpu")
        assert sum(k.bytes for k in step) - sum(k.bytes for k in forward) == M * N * FP32


def test_fused_on_a_gpu_is_one_launch_and_at_most_three_back() -> None:
    layer = Layer(M, N, N)
    (forward,) = kernels(layer, "fused", INFERENCE, "cuda")
    assert forward == (2 * M * N * N, (2 * M * N + N * N) * FP32)
    (other,) = kernels(replace(layer, residual=True), "fused", INFERENCE, "cuda")
    assert other.bytes - forward.bytes == M * N * FP32
    for order in ORDERS:
        step = kernels(Layer(M, N, N, order), "fused", STEP, "cuda")
        assert 3 <= len(step) <= 4 + (order in ("preact", "prenorm"))


def test_flops_and_bytes_of_a_row_are_those_of_the_results() -> None:
    for row in sample()["rows"]:
        if row["group"] == HOST:
            continue
        layer = scaling.of_row(row)
        assert sum(k.flops for k in kernels(layer, "fused", row["mode"], "cpu")) == row["flops"]
    row = sample()["rows"][-2] | {"bytes": 10**12}  # more than x, weight and y: another residual
    assert not scaling.of_row(sample()["rows"][-2]).residual
    assert scaling.of_row(row).residual


def test_launches_are_those_that_the_profiler_counts() -> None:
    for order in ("note", "postnorm", "preact"):
        job = Job(Case("launches", M, N, order, residual=True), "fp32", CPU)
        layer = Layer(M, N, N, order, residual=True)
        found = counts.launches(job.call(job.eager, INFERENCE), CPU)
        assert len(kernels(layer, "eager", INFERENCE, "cpu")) == found


def test_time_is_the_slower_of_arithmetic_and_traffic_plus_launches() -> None:
    layer, inf = Layer(M, N, N), float("inf")
    work = kernels(layer, "eager", STEP, "cuda")
    for machine, expected in (
        (replace(IDEAL, copy=inf), 3 * 2 * M * N * N / 1e14),
        (replace(IDEAL, matmul={"fp32": inf}), sum(k.bytes for k in work) / 1e12),
        (replace(IDEAL, copy=inf, matmul={"fp32": inf}, launch=2e-6), len(work) * 2e-6),
        (replace(IDEAL, copy=inf, matmul={"fp32": inf}, host={("eager", STEP): 9e-6}), 9e-6),
    ):
        assert seconds(layer, "eager", STEP, machine) == pytest.approx(expected)


def test_narrow_layers_gain_what_traffic_says_and_wide_ones_nothing() -> None:
    """note on a GPU: 9 tensors of M N against 2, or a product beside which 7 more are little."""
    narrow, wide = Layer(2**20, 16, 16), Layer(2**16, 2**16, 2**16)
    ratios = [
        seconds(layer, "eager", INFERENCE, IDEAL) / seconds(layer, "fused", INFERENCE, IDEAL)
        for layer in (narrow, wide)
    ]
    little = 7 * FP32 / 1e12 / (2 * 2**16 / 1e14)
    assert ratios == [pytest.approx(4.5, rel=1e-3), pytest.approx(1 + little)]


def test_exchanges_by_hand() -> None:
    """Two GPUs send half of what they gather, and all of what they add up; one sends nothing."""
    assert model.all_gather(1e11, 2, IDEAL) == pytest.approx(0.5)
    assert model.all_reduce(1e11, 2, IDEAL) == pytest.approx(1.0)
    assert model.all_reduce(1e11, 1000, IDEAL) == pytest.approx(2, rel=0.01)
    layer = Layer(M, K, N, norm="layer", dtype="bf16")
    gradients = (N * K + N + 2 * N) * 2
    assert model.data_parallel(layer, 2, IDEAL) == pytest.approx(gradients / 1e11)
    more = (2 * N + 1) * FP32 + 2 * N * FP32  # half of both GPUs' statistics; all sums of backward
    batch = model.data_parallel(replace(layer, norm="batch"), 2, IDEAL)
    assert batch == pytest.approx((gradients + more) / 1e11)
    rows = (M * N + M * K) * 2 / 2 + 2 * M * FP32 + 2 * M * FP32
    assert model.tensor_parallel(layer, 2, IDEAL) == pytest.approx(rows / 1e11)
    no_norm = model.tensor_parallel(replace(layer, norm=None), 2, IDEAL)
    assert no_norm == pytest.approx((M * N + M * K) / 1e11)
    for function in (model.data_parallel, model.tensor_parallel):
        assert function(layer, 1, replace(IDEAL, latency=0.0)) == 0
        times = [function(layer, p, IDEAL) for p in (2, 4, 8)]
        assert times == sorted(set(times))


def as_predicted() -> dict[str, Any]:
    """A results file whose times are exactly the model's."""
    results = sample()
    machine = scaling.measured(results)
    for row in results["rows"]:
        if row["group"] != HOST:
            times = {
                n: 1e6 * seconds(scaling.of_row(row), n, row["mode"], machine)
                for n in ("fused", "eager")
            }
            row["times_us"] = {name: {"median": t} for name, t in times.items()}
            row["ratios"]["eager"]["median"] = times["eager"] / times["fused"]
    return results


def test_predictions_that_come_true_have_no_error() -> None:
    table = scaling.error_table(as_predicted()).splitlines()[2:]
    assert len(table) == 4  # two modes, two dtypes
    assert all(line.count("1.00 (1.00 to 1.00)") == 3 for line in table)


def test_an_error_is_shown() -> None:
    results = as_predicted()
    for row in results["rows"]:
        if row["group"] != HOST:
            row["times_us"]["fused"]["median"] *= 2
    assert "| 0.50 (0.50 to 0.50) | 1.00 (1.00 to 1.00) |" in scaling.error_table(results)


def test_what_is_not_measured_is_called_so() -> None:
    text = scaling.render({})
    assert text.count("Not measured yet.") == 2
    assert scaling.ASSUMED.source.startswith("assumed")
    assert scaling.ASSUMED.source in text
    text = scaling.render({"cpu": sample("cpu"), "cuda": sample("cuda")})
    assert "Not measured yet." not in text
    assert "| Example GPU" in text
    assert text.count("digits") == 4  # two modes on each device


def test_write_replaces_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "scaling.md"
    monkeypatch.setattr(scaling, "PAGE", page)
    begin, end = scaling.MARKERS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert scaling.main(["--write"]) == 0
    once = page.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert scaling.main(["--write"]) == 0
    assert page.read_text() == once
    page.write_text("no markers")
    with pytest.raises(SystemExit, match=r"scaling\.md has no <!-- bench scaling: begin -->"):
        scaling.main(["--write"])


def test_the_page_agrees_with_the_newest_results() -> None:
    found = {device: load(path) for device, path in newest(RESULTS).items()}
    fresh = replace_part(scaling.PAGE, scaling.MARKERS, f"\n{scaling.render(found)}\n")
    assert scaling.PAGE.read_text() == fresh, "stale: run `python -m bench scaling --write`"
