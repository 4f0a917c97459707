"""python -m fusedres bench: it checks before it times, and its numbers are what it says."""

import json
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import ACTIVATIONS, NORMS, ORDERS, ops
from fusedres.backends import native
from fusedres.tools import bench, bench_report, cli, commands
from fusedres.tools.bench import INFERENCE, STEP, Case, Eager, Job

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ("bench", "--device", "cpu", "--shape", "8x16")
QUICK = (*SMALL, "--seconds", "0.05", "--threads", "1")


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Whatever runs the tests may want colours."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    """Runs the command; exit code, stdout, stderr."""

    def run(*arguments):
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def rounds(monkeypatch):
    """Lets the clock say that eager takes these multiples of fused's 2 us, in so many rounds."""
    seconds = []

    def rounds(*ratios, calm=True):
        def interleave(calls, device, limit):
            assert list(calls) == ["eager", "fused"] and device == CPU
            for call in calls.values():
                call()
            seconds.append(limit)
            return [{"eager": 2e-6 * r, "fused": 2e-6} for r in ratios], calm

        monkeypatch.setattr(bench, "interleave", interleave)
        return seconds

    return rounds


def test_it_measures(run):
    threads = torch.get_num_threads()
    code, out, err = run(*QUICK, "--json")
    found = json.loads(out)
    assert code == 0 and found["wrong"] == found["failed"] == {}
    assert found["threads"] == 1 and torch.get_num_threads() == threads
    assert found["dtype"] == "fp32" and found["device"] == "cpu" and found["machine"]
    assert [row["mode"] for row in found["rows"]] == [INFERENCE, STEP]
    for row in found["rows"]:
        assert row["case"] == "note layer gelu 8x16" and row["calm"] and row["rounds"] >= 7
        for s in (*row["times_us"].values(), *row["ratios"].values()):
            assert 0 < s["q1"] <= s["median"] <= s["q3"]
        assert row["backend"] == ("reference" if native.missing else "cpu")
    assert "note layer gelu 8x16, forward" in err and "100%" in err


def test_numbers(run, rounds):
    rounds(1.0, 2.0, 3.0, 4.0, 5.0)
    _, out, _ = run(*SMALL, "--json")
    for row in json.loads(out)["rows"]:
        assert row["ratios"]["eager"] == pytest.approx({"median": 3, "q1": 1.5, "q3": 4.5})
        assert row["times_us"]["eager"] == pytest.approx({"median": 6, "q1": 3, "q3": 9})
        assert row["times_us"]["fused"]["median"] == pytest.approx(2)
        assert row["rounds"] == 5 and row["slower_than"] == []
    code, out, _ = run(*SMALL)
    assert code == 0 and out.count("3.00 (1.50-4.50)") == 2
    assert "Of 2 rows fused is faster in 2, slower in 0, and within noise (2%) in 0." in out


@pytest.mark.parametrize(
    "ratios, told",
    [
        ((0.5, 0.5, 0.5), "faster in 0, slower in 2, and within noise (2%) in 0"),
        ((0.99, 0.99, 0.99), "faster in 0, slower in 0, and within noise (2%) in 2"),
        ((0.5, 0.9, 1.5), "faster in 0, slower in 0, and within noise (2%) in 2"),
        ((1.5, 1.5, 1.5), "faster in 2, slower in 0, and within noise (2%) in 0"),
        ((1.01, 1.01, 1.01), "faster in 0, slower in 0, and within noise (2%) in 2"),
    ],
)
def test_verdict(run, rounds, ratios, told):
    rounds(*ratios)
    code, out, _ = run(*SMALL)
    assert code == 0 and told in out  # slower is a finding, no failure
    slower = "slower: note layer gelu 8x16, forward + backward: eager takes 0.50 (0.50-0.50)"
    assert (slower in out) == (ratios[0] == ratios[-1] == 0.5)


def test_a_busy_machine_is_not_judged(run, rounds):
    rounds(0.5, 0.5, 0.5, calm=False)
    code, out, _ = run(*SMALL)
    assert code == 0 and out.count("0.50 (0.50-0.50) ?") == 2
    assert "in 2 of 2 rows (marked ?)" in out and "slower" not in out and "--threads 1" in out
    assert json.loads(run(*SMALL, "--json")[1])["rows"][0]["slower_than"] == []


def test_the_time_is_shared(run, rounds, monkeypatch):
    seconds = rounds(1.0, 1.0, 1.0)
    now = [100.0]
    monkeypatch.setattr(bench, "perf_counter", lambda: now[0])
    assert run(*SMALL, "--shape", "4x16", "--shape", "8x16", "--seconds", "8")[0] == 0
    assert seconds == [2, 8 / 3, 4, 8]  # of what is left, to the rows that are left
    seconds.clear()
    monkeypatch.setattr(bench, "check", lambda job: now.__setitem__(0, now[0] + 9))
    assert run(*SMALL, "--seconds", "8")[0] == 0
    assert seconds == [0, 0]


def test_a_wrong_layer_is_not_timed(run, rounds, monkeypatch, native):
    seconds, forward = rounds(1.0, 1.0), ops.FORWARD[native]

    def wrong(*args):
        y, *saved = forward(*args)
        return [y * 1.001, *saved]

    monkeypatch.setitem(ops.FORWARD, native, wrong)
    code, out, _ = run(*SMALL)
    assert code == 1 and "WRONG: note layer gelu 8x16: y has RMS error" in out and not seconds
    code, out, _ = run(*SMALL, "--json")
    found = json.loads(out)
    assert code == 1 and found["rows"] == [] and list(found["wrong"]) == ["note layer gelu 8x16"]


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_gradient_is_found(monkeypatch, native, index):
    backward = ops.BACKWARD[native]

    def wrong(*args):
        grads = backward(*args)
        grads[index] = grads[index] * 1.001
        return grads

    monkeypatch.setitem(ops.BACKWARD, native, wrong)
    assert "has RMS error" in bench.check(Job(Case(64, 16, 16), "fp32", CPU))


def test_what_cannot_run_is_a_failure(run, rounds):
    rounds(1.0, 1.0)
    code, out, _ = run(*SMALL, "--norm", "batch", "--shape", "1x8")
    assert code == 1 and "FAILED: note batch gelu 1x8: ValueError: " in out
    assert "note batch gelu  8x16" in out  # the others are measured


def test_where_nothing_is_fused(run, rounds, monkeypatch):
    rounds(1.0, 1.0)
    monkeypatch.setattr(bench.backends, "choose", lambda *_: "reference")
    code, out, _ = run(*SMALL)
    assert code == 0 and "Nothing is fused here" in out and "backend reference" in out


def test_default_cases():
    for device in ("cpu", "cuda"):
        cases = bench.default_cases(device)
        assert len({*cases}) == len(cases) >= 5
        assert {case.norm for case in cases} == {"layer", "batch"}
        assert {case.order for case in cases} == {"note", "prenorm"}
    for case in bench.default_cases("cpu"):
        small = case._replace(M=8)
        assert bench.check(Job(small, "fp32", CPU)) is None


def test_the_recipe_asked_for_is_measured(run, rounds):
    rounds(1.0, 1.0)
    recipe = ("--order", "linear-act", "--norm", "none", "--activation", "tanh", "--dtype", "bf16")
    _, out, _ = run("bench", "--device", "cpu", "--shape", "8x16x4", *recipe, "--json")
    row = json.loads(out)["rows"][0]
    assert (row["rows"], row["features"], row["out_features"]) == (8, 16, 4)
    assert (row["order"], row["norm"], row["activation"]) == ("linear-act", None, "tanh")
    assert row["dtype"] == "bf16" and row["case"] == "linear-act tanh 8x16x4"


@pytest.mark.parametrize("order", [*ORDERS, "linear", "norm-linear-add", "linear-act"])
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_eager_is_the_layer(order, norm):
    """Against fusedres.Residual, bit for bit, with a linear shortcut too."""
    for N in (6, 8):
        layer = fusedres.Residual(6, N, order=order, norm=norm, activation="silu")
        x = torch.randn(5, 6)
        torch.testing.assert_close(Eager(layer)(x), layer(x), rtol=0, atol=0)


def test_every_activation_passes_the_check():
    for activation, dtype in product(ACTIVATIONS, bench.DTYPES):
        assert bench.check(Job(Case(64, 16, 16, "note", "layer", activation), dtype, CPU)) is None


def test_saved_bytes(native):
    M, N = 64, 48
    job = Job(Case(M, N, N), "fp32", CPU)
    assert bench.saved_bytes(job.fused, *job.inputs) == M * N * 4  # z; x lives anyway
    stats = 2 * M * 4
    assert bench.saved_bytes(job.eager, *job.inputs) == 2 * M * N * 4 + stats  # z and layer_norm(z)
    job = Job(Case(M, N, N, "linear-add", None, None), "fp32", CPU)
    assert bench.saved_bytes(job.eager, *job.inputs) == 0
    assert bench_report.cells(bench.measure(job, "fp32", STEP, 0.0))[-1] == ""  # nothing to divide


def test_full_is_the_benchmark_of_the_repository(run, monkeypatch, tmp_path):
    ran = []

    def record(command, env):
        ran.append(command[1:])
        assert env["PYTHONPATH"].startswith(str(ROOT))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", record)
    assert cli.main(["bench", "--full", "--quick", "--help"]) == cli.main(["bench", "--full"]) == 3
    assert ran == [["-m", "bench", "--quick", "--help"], ["-m", "bench"]]
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    code, _, err = run("bench", "--full")
    assert code == 1 and "source repository" in err and "make bench" in err
