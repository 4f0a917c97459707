"""`make gpu-check` without a GPU: its clock, its processes, what it reads from logs, its report,
and the rows of a GPU on CPU tensors with a clock that is not one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu_check
from bench.gpu import steps as gpu_steps
from bench.measure import contenders, graphs, results_file
from bench.measure import row as measure
from bench.measure.cases import (
    GRAPH,
    GRAPHS,
    INFERENCE,
    MLP,
    RECORD_GRAPH,
    STEP,
    Case,
    Job,
    Task,
    square,
)
from bench.measure.goals import HOSTS, ON_GPU
from bench.measure.results_file import check_results
from fusedres import backends
from fusedres.spec import Spec
from results_sample import task_row as row

CPU = torch.device("cpu")
LOGIC = ("and", "or", "not")
ROOT = gpu_steps.ROOT


def make_check(folder: Path, *steps: str, total: float = 100.0) -> gpu_steps.Check:
    return gpu_steps.Check(folder, folder, list(steps), total, lambda found: None)


# Arguments.


def test_steps_run_in_their_own_order() -> None:
    assert gpu_check.parse([]).steps == list(gpu_steps.SECONDS)
    assert gpu_check.parse(["--steps", "benchmark", "build"]).steps == ["build", "benchmark"]
    assert gpu_check.parse([]).seconds == gpu_check.TOTAL <= 9 * 60 - 2 * gpu_steps.GRACE


@pytest.mark.parametrize("wrong", [["--steps", "bild"], ["--seconds", "0"], ["--seconds", "-1"]])
def test_wrong_arguments_are_told(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.parse(wrong)
    assert error.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_results_go_where_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.results_file, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("OUT", str(tmp_path / "env"))
    assert gpu_check.folder(tmp_path / "asked", "any") == tmp_path / "asked"
    assert gpu_check.folder(None, "any") == tmp_path / "env"
    monkeypatch.delenv("OUT")
    found = gpu_check.folder(None, "NVIDIA H100 80GB HBM3")
    assert found.is_dir() and found.name.startswith("gpu-nvidia-h100-80gb-hbm3-20")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU == 2
    assert "no GPU" in done.stderr and torch.__version__ in done.stderr
    assert not (tmp_path / "out").exists()


# Time.


def test_what_a_step_leaves_over_goes_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(gpu_steps, "perf_counter", lambda: now)
    steps = ["build", "sanitizer", "benchmark"]
    whole = sum(gpu_steps.SECONDS[step] for step in steps)
    check = make_check(tmp_path, *steps, total=2 * whole)
    assert check.left("build") == 2 * gpu_steps.SECONDS["build"]
    now += 10
    left = 2 * (gpu_steps.SECONDS["build"] + gpu_steps.SECONDS["sanitizer"]) - 10
    assert check.left("sanitizer") == left
    now += left + 5
    assert check.left("sanitizer") == -5, "a step that overran"
    assert check.left("benchmark") == 2 * gpu_steps.SECONDS["benchmark"] - 5


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_s_code_and_output_are_kept(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['MORE'], os.environ['TRITON_INTERPRET']); sys.exit(3)"
    outcome = gpu_steps.execute(python(code), tmp_path / "log", 60, MORE="more")
    assert outcome.code == 3 and "more 0\n" in outcome.log
    assert outcome.log == (tmp_path / "log").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_process_that_takes_too_long_is_ended(
    stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its children; by SIGKILL if it does not listen."""
    monkeypatch.setattr(gpu_steps, "GRACE", 1.0)
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); " if stubborn else ""
    child = f"{ignore}print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import os, signal, subprocess, sys, time; {ignore}child = {child!r}; "
    code += "subprocess.Popen([sys.executable, '-c', 'import os, signal, time; ' + child]); "
    code += child
    began = time.perf_counter()
    outcome = gpu_steps.execute(python(code), tmp_path / "log", 4.0)
    assert outcome.code is None and time.perf_counter() - began < 8
    pids = [int(line) for line in outcome.log.splitlines() if line.isdigit()]
    assert len(pids) == 2
    for pid in pids:
        assert not alive(pid)


def alive(pid: int) -> bool:
    """A zombie does not count."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
        except (OSError, IndexError):
            return False
        time.sleep(0.1)
    return True


def test_a_process_without_time_is_not_begun(tmp_path: Path) -> None:
    outcome = gpu_steps.execute(python("raise SystemExit(0)"), tmp_path / "log", -3.0)
    assert outcome.code is None and "no time" in outcome.log


# Steps.


def test_a_step_that_raises_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(check: gpu_steps.Check) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(gpu_steps.Check, "build", fail)
    monkeypatch.setattr(gpu_steps, "find_sanitizer", lambda: None)
    found = make_check(tmp_path, "build", "sanitizer").run()
    assert [(step["step"], step["ok"]) for step in found] == [("build", False), ("sanitizer", None)]
    assert "no compiler" in found[0]["told"] and "CUDA_HOME" in found[1]["told"]


HOPPER, LEFT_OUT = '{"cuda": "13.0", "hopper": "built"}', '{"cuda": "13.0", "hopper": "left out"}'


@pytest.mark.parametrize(
    "gpu, built, loads, ok",
    [
        ("9.0a", 0, (0, HOPPER), True),
        ("9.0a", 0, (0, LEFT_OUT), None),
        ("10.0", 0, (0, LEFT_OUT), True),
        ("9.0a", 0, (1, "ImportError: undefined symbol"), False),
        ("9.0a", 1, (0, HOPPER), False),
        ("9.0a", None, (0, HOPPER), False),
    ],
)
def test_the_build_says_what_it_built(
    gpu: str,
    built: int | None,
    loads: tuple[int, str],
    ok: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = iter([gpu_steps.Outcome(built, 1.0, "..."), gpu_steps.Outcome(loads[0], 1.0, loads[1])])
    monkeypatch.setattr(gpu_steps, "execute", lambda *given, **more: next(ends))
    monkeypatch.setattr(gpu_steps, "architecture", lambda: gpu)
    (found,) = make_check(tmp_path, "build").run()
    assert found["ok"] is ok and "setuptools " in found["told"]
    if built == 0:
        told = {HOPPER: "Hopper's kernels built", LEFT_OUT: "Hopper's kernels left out"}
        assert told.get(loads[1], loads[1]) in found["told"]
        assert ("CUTLASS" in found["told"]) == (ok is None)


def test_what_is_asked_of_the_build(native: str, tmp_path: Path) -> None:
    outcome = gpu_steps.execute(python(gpu_steps.ASK_BUILD), tmp_path / "log", 60)
    assert {"cuda", "hopper"} <= json.loads(outcome.log.splitlines()[-1]).keys()


TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a, b", "c"])
def test_passes(name): pass

def test_fails(): assert 1 == 2

@pytest.mark.skip(reason="none")
def test_is_skipped(): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_are_counted_and_failures_named(workers: int, tmp_path: Path) -> None:
    if workers and not find_spec("xdist"):
        pytest.skip("needs pytest-xdist")
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    check = make_check(tmp_path, "gpu-tests")
    files = {"some": str(file), "good": f"{file}::test_passes"}
    more = ["-c", os.devnull, *(gpu_steps.workers(workers) if workers else [])]
    check.pytest("gpu-tests", {name: [f, *more] for name, f in files.items()}, 60.0)
    found, good = check.found
    assert good["ok"] is True and good["counts"] == {"PASSED": 2}
    assert good["step"] == "gpu-tests: good"
    assert found["counts"] == {"PASSED": 2, "FAILED": 1, "SKIPPED": 1} and found["ok"] is False
    assert len(found["failed"]) == 1 and found["failed"][0].endswith("::test_fails")
    assert 'failures="1"' in (tmp_path / "some.xml").read_text()


def test_workers_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "find_spec", lambda name: object())
    assert gpu_steps.workers(3)[:2] == ["-n", "3"]
    monkeypatch.setattr(gpu_steps, "find_spec", lambda name: None)
    assert gpu_steps.workers(3) == []


def test_a_broken_file_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "test_none.py"
    file.write_text("import no_such_module")
    check = make_check(tmp_path, "gpu-tests")
    check.pytest("gpu-tests", {"none": [str(file), "-c", os.devnull]}, 60.0)
    assert check.found[0]["ok"] is False
    assert [Path(name).name for name in check.found[0]["failed"]] == ["test_none.py"]


BROKE = "ERROR tests/test_a.py\n"
LINE = "tests/test_a.py::test {} [100%]\n"
PASSED, FAILED, SKIPPED = map(LINE.format, ("PASSED", "FAILED", "SKIPPED"))


@pytest.mark.parametrize(
    "code, log, owed, ok",
    [
        (0, PASSED, True, True),
        (0, SKIPPED, True, None),
        (1, PASSED + FAILED, False, False),
        (5, "", True, False),
        (5, "", False, None),
        (2, BROKE, False, False),
        (None, PASSED, True, False),
        (None, PASSED, False, None),
        (None, FAILED, False, False),
        (-11, PASSED, False, False),
    ],
)
def test_the_verdict_on_tests(
    code: int | None,
    log: str,
    owed: bool,
    ok: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5: no test was there to run. What has only been skipped says nothing."""
    monkeypatch.setattr(
        gpu_steps, "execute", lambda *given, **more: gpu_steps.Outcome(code, 1.0, log)
    )
    check = make_check(tmp_path, "gpu-tests")
    check.pytest("gpu-tests", {"some": []}, 60.0, owed)
    assert check.found[0]["ok"] is ok


def test_what_runs_when_time_is_out() -> None:
    """As pytest-xdist prints it."""
    began = [f"tests/test_a.py::test[{name}]" for name in ("a, b", "c", "d", "e")]
    ends = [f"[gw1] [ 25%] PASSED {began[0]} ", f"[gw0] [ 50%] FAILED {began[2]} "]
    counts, failed, running = gpu_steps.outcomes("\n".join([*(f"{b} " for b in began), *ends]))
    assert counts == {"PASSED": 1, "FAILED": 1} and failed == [began[2]]
    assert running == [began[1], began[3]]


HANGS = """
import time

def test_passes(): pass

def test_hangs(): time.sleep(600)
"""


@pytest.mark.parametrize("owed, ok", [(True, False), (False, None)])
def test_a_test_that_hangs_is_named(
    owed: bool, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 10.0)  # a busy machine
    file = tmp_path / "test_slow.py"
    file.write_text(HANGS)
    check = make_check(tmp_path, "gpu-tests")
    check.pytest("gpu-tests", {"slow": [str(file), "-c", os.devnull]}, 30.0, owed)
    (found,) = check.found
    assert found["ok"] is ok and found["counts"] == {"PASSED": 1}
    assert found["told"].startswith("1 passed, out of time, still running: ")
    assert found["told"].endswith("::test_hangs")
    assert (tmp_path / "slow.xml").exists(), "what was run until then is reported"


def test_every_gpu_test_runs_in_one_place() -> None:
    command = [sys.executable, "-m", "pytest", gpu_steps.GPU_TESTS, "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line.split("::", 1)[1] for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 150

    def matches(expression: str, test: str) -> bool:
        """As pytest's -k."""
        words = re.sub(r"\w+", lambda w: w[0] if w[0] in LOGIC else str(w[0] in test), expression)
        return bool(eval(words))

    shards = gpu_steps.SHARDS
    for test in tests:
        places = [name for name, which in shards.items() if matches(which, test)]
        assert len(places) + matches(gpu_steps.ALONE, test) == 1, f"{test} runs in {places}"
        (place,) = places or [gpu_steps.ALONE]
        assert place.startswith("hopper-") == ("hopper" in test)
        if "-cuda" in place:
            assert "triton" not in test.partition("[")[2], f"{test} runs among those of CUDA C++"
    for which in (*shards.values(), gpu_steps.ALONE, *gpu_steps.SANITIZED.split(" or ")):
        assert any(matches(which, test) for test in tests), f"nothing matches {which}"


def test_shards_run_side_by_side_and_the_largest_tests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the large ones may run out of time."""
    seen: list[tuple[set[str], bool]] = []

    def record(check: Any, step: str, runs: Any, limit: float, owed: bool = True) -> None:
        seen.append((set(runs), owed))

    monkeypatch.setattr(gpu_steps.Check, "pytest", record)
    make_check(tmp_path, "gpu-tests", "other-tests").run()
    others = {file.stem for file in gpu_steps.files_with_gpu_tests()}
    assert seen == [(set(gpu_steps.SHARDS), True), ({"many-elements"}, False), (others, False)]


def test_other_files_with_gpu_tests_are_found() -> None:
    assert [file.name for file in gpu_steps.files_with_gpu_tests()] == [
        "test_register_activation.py",
        "test_triton.py",
        "test_triton_chain.py",
        "test_triton_grid.py",
        "test_triton_loop.py",
        "test_triton_mixed.py",
        "test_tune.py",
    ]


def test_compute_sanitizer_is_found_on_path_and_under_cuda_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = gpu_steps.find_sanitizer()
    assert before is None or before.startswith("/usr/local/cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert gpu_steps.find_sanitizer() == str(program)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(program.parent))
    assert gpu_steps.find_sanitizer() == str(program)


@pytest.mark.parametrize("filter_option", ["--kernel-name", "--kernel-regex"])
def test_compute_sanitizer_s_options(filter_option: str) -> None:
    known = f"--target-processes arg ... --report-api-errors arg ... {filter_option} arg"
    assert gpu_steps.sanitizer_options("memcheck", known)[4:] == [
        "--target-processes",
        "application-only",
        "--report-api-errors",
        "no",
        filter_option,
        "kns=residual_",
    ]
    assert filter_option not in gpu_steps.sanitizer_options("initcheck", known)
    assert gpu_steps.sanitizer_options("racecheck", "") == [
        "--tool",
        "racecheck",
        "--error-exitcode",
        "99",
    ]


def fake_sanitizer(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("errors, ok", [(0, True), (2, False)])
def test_compute_sanitizer_s_verdict(
    errors: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'[ "$1" = --help ] && exit 0; echo "========= ERROR SUMMARY: {errors} errors"'
    program = fake_sanitizer(tmp_path / "sanitizer", f"{script}; exit {99 * (errors > 0)}")
    monkeypatch.setattr(gpu_steps, "find_sanitizer", lambda: program)
    found = make_check(tmp_path, "sanitizer").run()
    assert [(step["step"], step["ok"], step["told"]) for step in found] == [
        (f"sanitizer: {tool}", ok, f"{errors} errors") for tool in gpu_steps.SANITIZER_TOOLS
    ]


INVALID = "Invalid __global__ read of size 2 bytes"
RACE = "Error: Race reported between Write access at f and Read access at g [8 hazards]"
HAZARD = "ERROR: Potential WAR hazard detected at __shared__ 0x0 in block (0, 0, 0)"
UNINITIALIZED = "Uninitialized __global__ memory read of size 4 bytes"
ENDED = "Error: process didn't terminate successfully"
RACES = "RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"


@pytest.mark.parametrize(
    "code, line, ok, told",
    [
        (0, "ERROR SUMMARY: 0 errors", True, "0 errors"),
        (1, "ERROR SUMMARY: 0 errors", False, "0 errors, exit code 1"),  # a test failed
        (99, RACES.format(3, 3), False, "3 hazards displayed (3 errors, 0 warnings)"),
        (0, RACES.format(0, 0), True, "0 hazards displayed (0 errors, 0 warnings)"),
        (None, "COMPUTE-SANITIZER", None, "out of time"),
        (None, ENDED, None, "out of time"),  # by us
        (None, "ERROR SUMMARY: 2 errors", False, "2 errors, out of time"),
        *((None, line, False, f"{line}, out of time") for line in (INVALID, RACE, HAZARD)),
        (None, UNINITIALIZED, False, f"{UNINITIALIZED}, out of time"),
        (None, f"    at f in {INVALID}", None, "out of time"),
    ],
)
def test_what_compute_sanitizer_found_counts_when_time_is_out(
    code: int | None, line: str, ok: bool | None, told: str
) -> None:
    log = f"tests/test_gpu.py::test[some] ========= {line}\nPASSED\n"
    assert gpu_steps.sanitizer_verdict(gpu_steps.Outcome(code, 1.0, log)) == (ok, told)


# Rows, on CPU tensors.

TIMES = {
    "matmul": 1.0,
    "fused": 1.25,
    "eager": 5.0,
    "training": 1.5,
    "copy": 1.0,
    "gelu_tanh": 1.2,
    "compile": 2.5,
}
CEILINGS = {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": {"fp32": 50.0, "bf16": 700.0}}
OPTIONS = measure.Options(CPU, 0.0, CEILINGS, ("compile",), "left out")


class FakeClock:
    """Runs each contender once; says what TIMES says, in the second round twice that."""

    def __call__(self, contenders: Any, device: torch.device, seconds: float) -> Any:
        self.seen = list(contenders)
        for call in contenders.values():
            call()
        return [{n: f * TIMES[n] for n in contenders} for f in (1.0, 2.0, 1.0)], True


@pytest.mark.parametrize("mode", GRAPHS)
def test_a_row_holds_ratios_within_rounds(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **how: layer)
    monkeypatch.setattr(contenders, "asked", lambda task: {"gelu_tanh"} if mode == GRAPH else set())
    task, clock = Task(square(33, 64), "bf16", mode), FakeClock()
    found, rounds = measure.measure(task, OPTIONS, clock)
    names = {"matmul", "eager", "compile"} | (
        {"training", "copy", "gelu_tanh"} if mode == GRAPH else set()
    )
    ratios = {name: TIMES[name] / TIMES["fused"] for name in names}
    assert {n: r["median"] for n, r in found["ratios"].items()} == pytest.approx(ratios)
    assert found["failed"] == {"compile-max": "left out"}
    assert found["times_us"].keys() == set(clock.seen) == {*names, "fused"}
    calls = found["calls"]
    assert found["times_us"]["fused"]["median"] == pytest.approx(1e6 * TIMES["fused"] / calls)
    assert found["rounds"] == len(rounds) == 3 and calls == graphs.calls(task, 1) > 1
    assert "launches" not in found and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("order", ["prenorm", "preact"])
def test_other_orders_are_checked_and_timed(order: str) -> None:
    task = Task(square(33, 64, order), "bf16", GRAPH)
    found, _ = measure.measure(task, OPTIONS._replace(compiled=()), FakeClock())
    assert found["order"] == order and "eager" in found["ratios"]


def test_batch_norm_in_training_is_timed() -> None:
    task = Task(square(33, 64, norm="batch"), "bf16", RECORD_GRAPH)
    found, _ = measure.measure(task, OPTIONS._replace(compiled=()), FakeClock())
    assert found["norm"] == "batch" and found["ratios"]["eager"]["median"] == 4


def test_a_contender_that_fails_is_told_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Any:
        raise RuntimeError("cannot be captured")

    def some(job: Any, task: Task, compiled: Any) -> Any:
        return {"matmul": lambda: lambda: None, "fused": lambda: lambda: None, "eager": fail}

    monkeypatch.setattr(measure, "makers", some)
    task = Task(square(9, 16), "bf16", GRAPH)
    found, _ = measure.measure(task, OPTIONS, FakeClock())
    assert found["failed"]["eager"] == "RuntimeError: cannot be captured"
    assert set(found["ratios"]) == {"matmul"}
    monkeypatch.setattr(measure, "makers", lambda *_: {"fused": fail})
    with pytest.raises(RuntimeError, match="cannot be captured"):
        measure.measure(task, OPTIONS, FakeClock())


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "wrong", lambda *task: "y has RMS error 1")
    clock = FakeClock()
    with pytest.raises(ArithmeticError, match="y has RMS error 1"):
        measure.measure(Task(square(9, 16), "bf16", GRAPH), OPTIONS, clock)
    assert not hasattr(clock, "seen")


def test_a_graph_holds_so_many_calls() -> None:
    calls = []
    loop = graphs.repeated(lambda: lambda: calls.append(1), 7, None)
    warm = len(calls)
    loop()
    assert len(calls) - warm == 7

    def in_graph(rows: int, features: int, copies: int) -> int:
        return graphs.calls(Task(square(rows, features), "bf16", GRAPH), copies)

    assert in_graph(256, 64, 1) == graphs.MOST_CALLS and in_graph(65536, 4096, 1) == 1
    assert in_graph(65536, 4096, 3) == 3, "each set of inputs once"


def test_inputs_exceed_L2(monkeypatch: pytest.MonkeyPatch) -> None:
    L2, gpu = 50 * 2**20, torch.device("cuda")
    told = SimpleNamespace(L2_cache_size=L2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    for rows, features in ((65536, 64), (4096, 1024), (65536, 4096)):
        task = Task(square(rows, features), "bf16", GRAPH)
        copies = graphs.copies(task, gpu)
        assert copies * measure.traffic(task) >= 2 * L2
        assert (copies == 1) == (features == 4096) and graphs.copies(task, CPU) == 1
    assert graphs.copies(Task(square(256, 64), "bf16", GRAPH), gpu) == graphs.MOST_CALLS
    assert graphs.copies(HOSTS[0], gpu) == 1


def test_a_job_s_backend_is_that_of_its_size_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(
        backend: str, recipe: str, dtype: Any, device: Any, N: int, K: int, small: bool
    ) -> str:
        return "cuda+triton" if small and not Spec.parse(recipe).batch_stats else "triton"

    def taken(rows: int, norm: str, mode: str, hidden: int | None = None) -> str:
        order = MLP if hidden else "note"
        job = Job(Case("some", rows, 16, order, norm, hidden=hidden), "fp32", CPU)
        contenders.makers(job, Task(job.case, "fp32", mode), ())
        assert contenders.others(job) == ["cpu", "triton" if "+" in job.backend else "cuda"]
        return job.backend

    monkeypatch.setattr(backends, "is_small", lambda device, dtype, M, N, K: M <= 512)
    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(backends, "why_not", lambda *layer: None)
    assert taken(512, "layer", STEP) == taken(512, "layer", GRAPH) == "cuda+triton"
    assert taken(512, "layer", STEP, hidden=24) == "cuda+triton"
    assert taken(513, "layer", STEP) == "triton"
    assert taken(512, "batch", STEP) == taken(512, "batch", RECORD_GRAPH) == "triton"
    assert taken(512, "batch", INFERENCE) == taken(512, "batch", GRAPH) == "cuda+triton"


@pytest.mark.parametrize("mode, backend", [(GRAPH, "cpu"), (RECORD_GRAPH, "reference")])
def test_a_row_names_the_backend_of_its_mode(
    mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = property(lambda job: "reference" if job.norm.training else "cpu")
    monkeypatch.setattr(Job, "backend", taken)
    monkeypatch.setattr(contenders, "others", lambda job: [])
    task = Task(square(33, 64, norm="batch"), "bf16", mode)
    found, _ = measure.measure(task, OPTIONS._replace(compiled=()), FakeClock())
    assert found["backend"] == backend


# The driver.


class FakeNvml(ModuleType):
    NVMLError, NVML_CLOCK_SM = OSError, 1
    nvmlInit = staticmethod(lambda: None)
    nvmlSystemGetDriverVersion = staticmethod(lambda: b"580.1")
    nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)
    nvmlDeviceGetClockInfo = staticmethod(lambda handle, kind: 1980)
    nvmlDeviceGetMaxClockInfo = staticmethod(lambda handle, kind: 2000)
    nvmlDeviceGetPowerUsage = staticmethod(lambda handle: 345_000)
    nvmlDeviceGetEnforcedPowerLimit = staticmethod(lambda handle: 700_000)


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    total_memory=80 * 2**30,
    multi_processor_count=132,
    major=9,
    minor=0,
    uuid="ab-cd",
    L2_cache_size=2**20,
)


def test_clocks_and_power_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    monkeypatch.setitem(sys.modules, "pynvml", nvml := FakeNvml("pynvml"))
    assert results_file.clocks(gpu, "before") == {"sm_mhz_before": 1980}
    assert results_file.clocks(gpu, "after") == {
        "sm_mhz_after": 1980,
        "max_sm_mhz": 2000,
        "power_w": 345.0,
        "power_limit_w": 700.0,
    }
    told = results_file.gpu(gpu)
    assert told["driver"] == "580.1" and told["capability"] == "9.0" and told["memory_gib"] == 80

    def refuse(uuid: str) -> Any:
        raise OSError("Insufficient Permissions")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", refuse)
    assert results_file.clocks(gpu, "after") == {"unread": "Insufficient Permissions"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in results_file.clocks(gpu, "after")["unread"]
    assert "driver" not in results_file.gpu(gpu)


# The whole.


def test_the_benchmark_is_the_common_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the time that is left, and writes where the report looks."""
    seen: list[list[str]] = []

    def execute(command: list[str], log: Path, limit: float) -> gpu_steps.Outcome:
        seen.append(command)
        output = next(word for word in command if word.startswith("--output="))
        rows = [row(Task(square(256, 64), "bf16", GRAPH))]
        Path(output.split("=")[1]).write_text(json.dumps({"rows": rows, "not_measured": [1, 2]}))
        return gpu_steps.Outcome(codes[len(seen) - 1], 1.0, "")

    monkeypatch.setattr(gpu_steps, "execute", execute)
    codes = (0, 1, None)
    for ok in (True, False, False):
        (found,) = make_check(tmp_path, "benchmark").run()
        assert found["ok"] is ok and found["told"].startswith("1 rows, 2 not measured")
    assert seen[0][1:4] == ["-m", "bench", "--device=cuda"]
    (limit,) = (word for word in seen[0] if word.startswith("--limit="))
    assert 70 <= float(limit.split("=")[1]) <= 100 - 2 * gpu_steps.GRACE


def test_whole_networks_tell_their_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goals = [{"goal": "deep, ms", "value": 7.5, "bound": "<= 8"}, {"goal": "other", "value": None}]

    def execute(command: list[str], log: Path, limit: float) -> gpu_steps.Outcome:
        assert command[1:5] == ["-m", "bench", "stacks", "--device=cuda"]
        if codes[0] is not None:
            Path(command[-1].removeprefix("--output=")).write_text(json.dumps({"goals": goals}))
        return gpu_steps.Outcome(codes.pop(0), 1.0, "")

    monkeypatch.setattr(gpu_steps, "execute", execute)
    codes: list[int | None] = [None, 0, 1]
    for ok, told in (
        (False, "no row, out of time"),
        (True, "deep, ms: 7.5 (<= 8)"),
        (False, "deep, ms: 7.5 (<= 8), exit code 1"),
    ):
        (found,) = make_check(tmp_path, "stacks").run()
        assert (found["ok"], found["told"]) == (ok, told)


EMPTY: dict[str, Any] = {
    "device": "cuda",
    "date": "2030-01-02",
    "commit": "none",
    "not_measured": [],
    "machine": {"cpu": "some", "gpu": "NVIDIA H100", "driver": "580"},
    "clocks": {"power_w": 345.0},
    "versions": {"torch": "2"},
    "protocol": {"ratios": "so"},
    "rows": [],
}


def test_the_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    steps = [
        {"step": "build", "ok": True, "told": "exit code 0", "seconds": 9.0},
        {
            "step": "gpu-tests: gpu",
            "ok": False,
            "told": "1 failed",
            "seconds": 99.0,
            "failed": ["t"],
        },
    ]
    rows = [row(Task(square(65536, 4096), "bf16", GRAPH), matmul=1 / 1.2, eager=0.9)]
    results = EMPTY | {"rows": rows}

    def run(check: gpu_steps.Check) -> list[dict[str, Any]]:
        check.results.write_text(json.dumps(results))
        return steps

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100")
    monkeypatch.setattr(gpu_steps.Check, "run", run)
    assert gpu_check.main([f"--out={tmp_path}", "--commit=abc"]) == 1, "a step failed"
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["commit"] == "abc" and found["steps"] == steps
    assert len(found["goals"]) == sum(len(goal.tasks) for goal in ON_GPU)
    assert {k: found[k] for k in results if k != "commit"} == {
        k: v for k, v in results.items() if k != "commit"
    }
    printed = capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text().strip() in printed
    assert "NVIDIA H100 (cpu some, driver 580, power_w 345.0)" in printed
    assert "MISSED" in printed and "not measured" in printed and "* t" in printed
    assert "eager takes 0.90 of fused's time" in printed
    steps[1]["ok"] = None
    assert gpu_check.main([f"--out={tmp_path}"]) == 0, "a missed goal is no failure"


def test_a_run_leaves_four_files_and_each_step_writes_them_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, seen = tmp_path / "out", []

    def build(check: gpu_steps.Check) -> None:
        assert not list(out.iterdir()), "nothing of an earlier run"
        (check.work / "build.log").write_text("built")
        (check.work / "build.xml").write_text("<xml/>")
        check.note("build", True, "exit code 0", 1.0)

    def benchmark(check: gpu_steps.Check) -> None:
        found = json.loads((out / "gpu-check.json").read_text())
        assert [step["step"] for step in found["steps"]] == ["build"]
        assert "exit code 0" in (out / "summary.md").read_text()
        with tarfile.open(out / "logs.tar.gz") as archive:
            assert archive.getnames() == ["logs/build.log", "logs/build.xml"]
        rows = [row(Task(square(256, 64), "bf16", GRAPH))]
        check.results.write_text(json.dumps(EMPTY | {"rows": rows}))
        (check.work / "benchmark.log").write_text("measured")
        seen.append(check.work)
        raise OSError("and then it broke")

    monkeypatch.setattr(gpu_steps.Check, "build", build)
    monkeypatch.setattr(gpu_steps.Check, "benchmark", benchmark)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: PROPERTIES)
    out.mkdir()
    for name in (gpu_steps.RESULTS_FILE, "gpu-check.json"):
        (out / name).write_text("{}")
    assert gpu_check.main([f"--out={out}", "--steps", "build", "benchmark"]) == 1
    names = ["benchmark.json", "gpu-check.json", "logs.tar.gz", "summary.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    found = json.loads((out / "gpu-check.json").read_text())
    assert [step["ok"] for step in found["steps"]] == [True, False] and len(found["rows"]) == 1
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert "logs/benchmark.log" in archive.getnames()
    assert not seen[0].exists() and "no report" not in capsys.readouterr().out


def test_a_report_that_fails_stops_no_step(tmp_path: Path, capsys: Any) -> None:
    def fail(found: gpu_steps.Found) -> None:
        raise OSError("disk full")

    check = gpu_steps.Check(tmp_path, tmp_path, ["build"], 100.0, fail)
    check.note("build", True, "exit code 0", 1.0)
    assert check.found and "no report: OSError: disk full" in capsys.readouterr().out


def test_steps_without_a_benchmark_have_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: PROPERTIES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100")
    found = gpu_check.combine(tmp_path, [], "abc")
    assert found["commit"] == "abc" and found["machine"]["gpu"] == "NVIDIA H100"
    assert not found["rows"] and all(goal["met"] is None for goal in found["goals"])
    assert "triton" in found["versions"] and "NVIDIA H100" in gpu_check.text(found)
    assert all("ceilings" in line for line in check_results(found)), "but for what was not measured"


def test_make_help_lists_it() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert "make gpu-check" in done.stdout
