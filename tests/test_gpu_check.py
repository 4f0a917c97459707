"""`make gpu-check` without a GPU: its clock, its processes, what it reads from logs, its goals, its
report, and each benchmark row on CPU tensors with a clock that is not one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_goals, gpu_measure, gpu_steps
from bench.gpu_goals import GOALS, HOST, MEMORY, Goal, Work, judge, slower, works

CPU = torch.device("cpu")
LOGIC = ("and", "or", "not")
ROOT = gpu_steps.ROOT


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
    monkeypatch.setattr(gpu_check.report, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("OUT", str(tmp_path / "env"))
    assert gpu_check.folder(tmp_path / "asked", "any") == tmp_path / "asked"
    assert gpu_check.folder(None, "any") == tmp_path / "env"
    monkeypatch.delenv("OUT")
    found = gpu_check.folder(None, "NVIDIA H100 80GB HBM3")
    assert found.is_dir() and found.name.startswith("gpu-nvidia-h100-80gb-hbm3-20")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_check", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU == 2
    assert "no GPU" in done.stderr and torch.__version__ in done.stderr
    assert not (tmp_path / "out").exists()


# Time.


def test_what_a_step_leaves_over_goes_to_the_next() -> None:
    now = 100.0
    steps = ["build", "sanitizer", "benchmark"]
    whole = sum(gpu_steps.SECONDS[step] for step in steps)
    budget = gpu_steps.Budget(steps, 2 * whole, lambda: now)
    assert budget.left("build") == 2 * gpu_steps.SECONDS["build"]
    now += 10
    left = 2 * (gpu_steps.SECONDS["build"] + gpu_steps.SECONDS["sanitizer"]) - 10
    assert budget.left("sanitizer") == left
    now += left + 5
    assert budget.left("sanitizer") == -5, "a step that overran"
    assert budget.left("benchmark") == 2 * gpu_steps.SECONDS["benchmark"] - 5


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_s_code_and_output_are_kept(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['MORE'], os.environ['TRITON_INTERPRET']); sys.exit(3)"
    outcome = gpu_steps.execute(python(code), tmp_path / "log", 60, {"MORE": "more"})
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
    found = gpu_steps.Check(tmp_path, ["build", "sanitizer"], 100.0).run()
    assert [(step["step"], step["ok"]) for step in found] == [("build", False), ("sanitizer", None)]
    assert "no compiler" in found[0]["told"] and "CUDA_HOME" in found[1]["told"]


TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a, b", "c"])
def test_passes(name): pass

def test_fails(): assert 1 == 2

@pytest.mark.skip(reason="none")
def test_is_skipped(): pass
"""


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    check = gpu_steps.Check(tmp_path, ["gpu-tests"], 100.0)
    files = {"some": str(file), "good": f"{file}::test_passes"}
    check.pytest("gpu-tests", {n: [f, "-c", os.devnull] for n, f in files.items()}, 60.0)
    found, good = check.found
    assert good["ok"] is True and good["counts"] == {"PASSED": 2}
    assert good["step"] == "gpu-tests: good"
    assert found["counts"] == {"PASSED": 2, "FAILED": 1, "SKIPPED": 1} and found["ok"] is False
    assert len(found["failed"]) == 1 and found["failed"][0].endswith("::test_fails")
    assert 'failures="1"' in (tmp_path / "some.xml").read_text()


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "test_none.py"
    file.write_text("import no_such_module")
    check = gpu_steps.Check(tmp_path, ["gpu-tests"], 100.0)
    check.pytest("gpu-tests", {"none": [str(file), "-c", os.devnull]}, 60.0)
    assert check.found[0]["ok"] is False
    assert [Path(name).name for name in check.found[0]["failed"]] == ["test_none.py"]


HANGS = """
import time

def test_passes(): pass

def test_hangs(): time.sleep(600)
"""


@pytest.mark.parametrize("must_end, ok", [(True, False), (False, None)])
def test_a_test_that_hangs_is_named(
    must_end: bool, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 10.0)  # a busy machine
    file = tmp_path / "test_slow.py"
    file.write_text(HANGS)
    check = gpu_steps.Check(tmp_path, ["gpu-tests"], 100.0)
    check.pytest("gpu-tests", {"slow": [str(file), "-c", os.devnull]}, 30.0, must_end)
    (found,) = check.found
    assert found["ok"] is ok and found["counts"] == {"PASSED": 1}
    assert "1 passed, out of time" in found["told"] and "::test_hangs" in found["told"]
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

    for test in tests:
        places = [name for name, which in gpu_steps.SHARDS.items() if matches(which, test)]
        assert len(places) + matches(gpu_steps.ALONE, test) == 1, f"{test} runs in {places}"
    for which in (*gpu_steps.SHARDS.values(), gpu_steps.ALONE, gpu_steps.SANITIZED):
        assert any(matches(which, test) for test in tests), f"nothing matches {which}"


def test_other_files_with_gpu_tests_are_found() -> None:
    names = [file.name for file in gpu_steps.files_with_gpu_tests()]
    assert "test_triton.py" in names
    assert Path(gpu_steps.GPU_TESTS).name not in names and Path(__file__).name not in names


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
    known = f"--target-processes arg ... {filter_option} arg"
    assert gpu_steps.sanitizer_options("memcheck", known)[-2:] == [filter_option, "kns=residual_"]
    assert filter_option not in gpu_steps.sanitizer_options("initcheck", known)
    assert gpu_steps.sanitizer_options("racecheck", "") == [
        "--tool", "racecheck", "--error-exitcode", "99",
    ]  # fmt: skip


def fake_sanitizer(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("errors, ok", [(0, True), (2, False)])
def test_compute_sanitizer_s_verdict(
    errors: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'[ "$1" = --help ] && exit 0; echo "ERROR SUMMARY: {errors} errors"'
    program = fake_sanitizer(tmp_path / "sanitizer", f"{script}; exit {99 * (errors > 0)}")
    monkeypatch.setattr(gpu_steps, "find_sanitizer", lambda: program)
    found = gpu_steps.Check(tmp_path, ["sanitizer"], 100.0).run()
    assert [(step["step"], step["ok"], step["told"]) for step in found] == [
        (f"sanitizer: {tool}", ok, f"{errors} errors") for tool in gpu_steps.SANITIZER_TOOLS
    ]


# Goals.


def row(work: Work, **ratios: float) -> dict[str, Any]:
    pairs = {pair: {"median": ratio} for pair, ratio in ratios.items()}
    return {"name": work.name, **vars(work), "ratios": pairs, "failed": {}}


def test_each_goal_has_rows_and_each_row_comes_once() -> None:
    every = works()
    assert len({work.name for work in every}) == len(every) > 30
    assert {work for goal in GOALS for work in goal.works} <= set(every)
    widths = {work.features for work in every if work.what == "forward" and work.rows == 65536}
    assert widths == {64, 128, 256, 512, 1024, 2048, 4096}
    assert {work.order for work in every} >= {"note", "prenorm", "preact"}
    known = {*gpu_measure.CONTENDERS, "host", "memory"}
    assert {work.what for work in every} == known


def test_goals_are_met_missed_or_not_measured() -> None:
    wide, narrow = Work("forward", 65536, 4096), Work("forward", 65536, 128)
    ratios = {"fused / product": 1.06, "training / fused": 1.0}
    fast = {"fused / product": 1.15, "eager / fused": 3.9, "copy / fused": 0.80}
    judged = judge([row(wide, **ratios), row(narrow, **fast)])
    met = {(goal["goal"], goal["row"], goal["bound"]): goal["met"] for goal in judged}
    assert met["forward / T", wide.name, "<= 1.05"] is False
    assert met["training / inference", wide.name, "<= 1.05"] is True
    assert met["forward / T", narrow.name, "<= 1.15"] is True
    assert met["eager / forward", narrow.name, ">= 3.8"] is True
    assert met["copy / forward", narrow.name, ">= 0.85"] is False
    assert met["forward / T", Work("forward", 65536, 2048).name, "<= 1.07"] is None
    assert len(judged) == sum(len(goal.works) for goal in GOALS)


def test_goals_are_compared_to_two_digits() -> None:
    assert Goal("", "", 1.05, ()).met(1.0549) and not Goal("", "", 1.05, ()).met(1.056)
    assert Goal("", "", 2.0, (), least=True).met(1.996)
    assert not Goal("", "", 2.0, (), least=True).met(1.99)


def test_slower_lists_eager_and_compile_beyond_noise() -> None:
    rows = [
        row(Work("forward", 256, 64), **{"eager / fused": 0.97}),
        row(Work("forward", 256, 128), **{"eager / fused": 0.99, "fused / product": 0.5}),
        row(Work("compiled forward"), **{"compile / fused": 0.9}),
    ]
    assert [line.rsplit(": ", 1)[1] for line in slower(rows)] == [
        "eager / fused = 0.97", "compile / fused = 0.90",
    ]  # fmt: skip


# Rows, on CPU tensors.

TIMES = {
    "product": 1.0, "fused": 1.25, "eager": 5.0, "training": 1.5, "copy": 1.0, "erf": 1.1,
    "tanh": 1.0, "compile": 2.5,
}  # fmt: skip


class FakeClock:
    """Runs each contender once; says what TIMES says, in the second round twice that."""

    def __call__(self, contenders: Any, device: torch.device, seconds: float) -> Any:
        self.seen = list(contenders)
        for call in contenders.values():
            call()
        return [{n: f * TIMES[n] for n in contenders} for f in (1.0, 2.0, 1.0)], True


EXPECTED = {
    "forward": {"fused / product": 1.25, "eager / fused": 4, "training / fused": 1.2},
    "backward": {"fused / product": 1.25, "eager / fused": 4},
    "training": {"eager / fused": 4},
    "gelu": {"erf / tanh": 1.1},
    "compiled forward": {"compile / fused": 2},
    "compiled backward": {"compile / fused": 2},
}


@pytest.mark.parametrize("what", gpu_measure.CONTENDERS)
def test_a_row_holds_ratios_within_rounds(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **how: layer)
    work, clock = Work(what, 33, 64), FakeClock()
    found = gpu_measure.measure_work(work, CPU, 0.0, clock)
    expected = EXPECTED[what] | ({"copy / fused": 0.8} if what == "forward" else {})
    assert not found["failed"]
    assert {pair: ratio["median"] for pair, ratio in found["ratios"].items()} == pytest.approx(
        expected
    )
    assert found["times_us"].keys() == set(clock.seen)
    name = clock.seen[0]
    assert found["times_us"][name]["median"] == pytest.approx(1e6 * TIMES[name] / work.calls)
    assert found["rounds"] == 3 and found["calls"] == work.calls > 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("order", ["prenorm", "preact"])
def test_other_orders_are_checked_and_timed(order: str) -> None:
    found = gpu_measure.measure_work(Work("forward", 33, 64, order=order), CPU, 0.0, FakeClock())
    assert found["order"] == order and not found["failed"] and "eager / fused" in found["ratios"]


def test_a_contender_that_fails_is_told_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def contenders(work: Work, job: Any) -> Any:
        def fail() -> Any:
            raise RuntimeError("cannot be captured")

        return {"product": lambda: lambda: None, "fused": lambda: lambda: None, "eager": fail}

    monkeypatch.setitem(gpu_measure.CONTENDERS, "forward", contenders)
    found = gpu_measure.measure_work(Work("forward", 9, 16), CPU, 0.0, FakeClock())
    assert found["failed"] == {"eager": "RuntimeError: cannot be captured"}
    assert set(found["ratios"]) == {"fused / product"}


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "wrong", lambda work, device: ["y has RMS error 1"])
    clock = FakeClock()
    found = gpu_measure.measure_work(Work("forward", 9, 16), CPU, 0.0, clock)
    assert "y has RMS error 1" in found["failed"]["fused"] and not found["ratios"]
    assert not hasattr(clock, "seen")


def test_a_graph_holds_so_many_calls() -> None:
    calls = []
    loop = gpu_measure.repeated(lambda: lambda: calls.append(1), 7, None)
    warm = len(calls)
    loop()
    assert len(calls) - warm == 7
    assert Work("forward", 256, 64).calls == gpu_goals.MOST_CALLS
    assert Work("forward", 65536, 4096).calls == 1


def test_memory_counts_what_is_saved() -> None:
    """Fused keeps z; eager keeps z and norm(z). Both keep vectors too."""
    found = gpu_measure.measure_work(Work("memory", 64, 256), CPU, 0.0)
    ratio = found["ratios"]["saved, fused / eager"]["median"]
    assert found["bytes"]["eager"]["saved"] >= 2 * 64 * 256 * 2
    assert ratio == found["bytes"]["fused"]["saved"] / found["bytes"]["eager"]["saved"] < 0.55


def test_host_time_is_fused_over_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {"median": 2.0, "q1": 1.6, "q3": 2.5}
    modes = (gpu_measure.RECORD, gpu_measure.STEP)
    rows = [{"mode": mode, "ratios": {"eager": spread}} for mode in modes]
    monkeypatch.setattr(gpu_measure.measure, "measure", lambda *args: rows)
    found = gpu_measure.measure_work(HOST, CPU, 0.0)
    goals = [goal for goal in GOALS if goal.works == (HOST,)]
    assert set(found["ratios"]) == {goal.pair for goal in goals}
    assert found["ratios"][goals[0].pair] == pytest.approx({"median": 0.5, "q1": 0.4, "q3": 0.625})


def test_the_file_is_written_after_each_row_until_time_is_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, now, seen = tmp_path / "goals.json", 0.0, []

    def measured(work: Work, device: torch.device, seconds: float) -> dict[str, Any]:
        nonlocal now
        seen.append(json.loads(path.read_text())["rows"] if path.exists() else [])
        now += 1.0
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return row(work, **{"fused / product": 1.0})

    monkeypatch.setattr(gpu_measure, "measure_work", measured)
    monkeypatch.setattr(gpu_measure, "perf_counter", lambda: now)
    chosen = [Work("forward", features=n) for n in (4096, 2048, 1024, 512, 256)]
    rows = gpu_measure.run(chosen, CPU, 0.1, 2.5, path)
    assert len(rows) == 3 and [len(before) for before in seen] == [0, 1, 2]
    assert rows[1]["failed"] == {"row": "RuntimeError: out of memory"}
    assert "2 rows are left out" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["rows"] == rows and results["protocol"] == gpu_measure.PROTOCOL
    assert [goal["met"] for goal in results["goals"]][:4] == [True, None, True, None]


# The whole.


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
    goals = gpu_measure.collect(
        [row(Work("forward", features=4096), **{"fused / product": 1.2, "eager / fused": 0.9})], CPU
    )

    def run(check: gpu_steps.Check) -> list[dict[str, Any]]:
        (check.out / "goals.json").write_text(json.dumps(goals))
        return steps

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "gpu", lambda: {"name": "NVIDIA H100", "driver_version": "580"})
    monkeypatch.setattr(gpu_check.report, "machine", lambda device: {"cpu": "some"})
    monkeypatch.setattr(gpu_steps.Check, "run", run)
    assert gpu_check.main([f"--out={tmp_path}", "--commit=abc"]) == 1, "a step failed"
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert results["gpu"] == {"name": "NVIDIA H100", "driver_version": "580"}
    assert results["commit"] == "abc" and results["steps"] == steps
    assert results["protocol"] == gpu_measure.PROTOCOL and len(results["rows"]) == 1
    assert {"python", "torch", "fusedres", "triton"} <= results["versions"].keys()
    printed = capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text().strip() in printed
    assert "MISSED" in printed and "not measured" in printed and "* t" in printed
    assert "eager / fused = 0.90" in printed
    steps[1]["ok"] = None
    assert gpu_check.main([f"--out={tmp_path}"]) == 0, "a missed goal is no failure"


def test_make_help_lists_it() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert "make gpu-check" in done.stdout


def test_memory_is_a_goal() -> None:
    (goal,) = (goal for goal in GOALS if goal.works == (MEMORY,))
    assert goal.bound == gpu_check.report.SAVED_GOAL
