"""The benchmark end to end: a run, the form of its file, what a row says, which rows there are."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from _pytest._io import TerminalWriter

from bench import conftest, test_layers
from bench.__main__ import main
from bench.measure import agenda, ceilings, judge, run
from bench.measure.agenda import chosen, compiled
from bench.measure.cases import (
    CASES,
    DTYPES,
    FORMULAS,
    GRAPH,
    INFERENCE,
    MODES,
    ONE_THREAD,
    RECORD,
    ROWS,
    SQUARES,
    STEP,
    STEP_ONE_THREAD,
    TINY,
    WIDTHS,
    Case,
    Task,
    square,
)
from bench.measure.contenders import RIVALS
from bench.measure.counts import flops, traffic
from bench.measure.results_file import check_results
from bench.measure.row import PROTOCOL, compare, rates
from results_sample import sample

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROOMS = ("measure", "report", "scaling", "gpu")  # inner ones first
CEILINGS = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"fp32": 0.1, "bf16": 0.2, "fp16": 0.001}}

COUNTED = Case("counted", 37, 53)


def bench(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench`, not as a worker of the pytest that runs this."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "FUSEDRES_"))}
    command = [sys.executable, "-m", "bench", "--threads=1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=own | more, capture_output=True, text=True)


# A run.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    ours, theirs = folder / "results.json", folder / "benchmark.json"
    asked = ("--quick", "--only=tiny", "--seconds=0.01", "--device=cpu", f"--output={ours}")
    done = bench(*asked, f"--benchmark-json={theirs}", PYTEST_ADDOPTS="--color=no")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {"results": json.loads(ours.read_text()), "theirs": json.loads(theirs.read_text())}
    return found | {"printed": done.stdout, "left": sorted(folder.iterdir())}


def test_a_run_writes_a_file_of_the_agreed_form(files: Any) -> None:
    results = files["results"]
    assert check_results(results) == []
    assert [row["mode"] for row in results["rows"]] == [INFERENCE, RECORD, STEP]
    for row in results["rows"]:
        assert row["group"] == "host" and row["rounds"] >= 7
        assert set(row["times_us"]) == {"functional", "eager", "fused"}
        assert row["host_us"]["fused"] == row["times_us"]["fused"]["median"]
        assert row["failed"] == {"compile": "--quick", "compile-max": "--quick"}
    assert {"torch", "pytest-benchmark"} <= set(results["versions"])
    assert results["clocks"]["load_at_start"] >= 0
    assert [path.name for path in files["left"]] == ["benchmark.json", "results.json"]


def test_pytest_benchmark_has_the_same_rounds(files: Any) -> None:
    rows = files["results"]["rows"]
    assert len(files["theirs"]["benchmarks"]) == len(rows)
    for row, found in zip(rows, files["theirs"]["benchmarks"], strict=True):
        assert found["extra_info"] == row
        assert found["stats"]["rounds"] == row["rounds"] == len(found["stats"]["data"])
        median = 1e6 * found["stats"]["median"]
        assert median == pytest.approx(row["times_us"]["fused"]["median"], rel=1e-6)


def test_a_run_tells_each_row_and_where_it_loses(files: Any) -> None:
    lines = files["printed"].splitlines()
    for mode in (INFERENCE, RECORD, STEP):
        assert any(f"tiny fp32, {mode}: " in line and "eager" in line for line in lines)
    assert any(line.startswith("Where fused is slower than eager") for line in lines)
    assert "\x1b" not in files["printed"]


def test_it_runs_without_pytest_benchmark() -> None:
    asked = ("--quick", "--only=tiny", "--seconds=0.01", "--device=cpu", "-k", "recording")
    done = bench(*asked, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "tiny fp32, forward, recording" in done.stdout
    assert "Written" not in done.stdout, "--only writes no file of its own accord"


def test_an_unknown_case_is_named_with_the_known_ones() -> None:
    done = bench("--only=nonsense")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--only 'nonsense' leaves no case; cases: tiny, square-256x64, " in done.stderr


def test_pytest_tests_collects_no_benchmark() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings


@pytest.mark.parametrize("room", ROOMS, ids="of-{}".format)  # "gpu" alone is a mark
def test_no_import_runs_up_the_rooms(room: str) -> None:
    """measure knows no other room, report measure alone; gpu and scaling know both."""
    allowed = {room, *ROOMS[: min(ROOMS.index(room), 2)]}
    files = list((ROOT / "bench" / room).glob("*.py"))
    assert files
    for file in files:
        found = re.findall(r"^ *from \.\.(\w+)|\bbench\.(\w+)", file.read_text(), re.M)
        named = {name for pair in found for name in pair if name in ROOMS}
        assert named <= allowed, file


def test_other_commands_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    places = {"report": "report.command", "scaling": "scaling.command", "check": "report.guard"}
    for command, name in places.items():
        module = ModuleType(f"bench.{name}")
        module.main = lambda rest, name=name: asked.append((name, rest)) or 3
        monkeypatch.setitem(sys.modules, f"bench.{name}", module)
        assert main([command, "--help", "x"]) == 3
    assert asked == [(name, ["--help", "x"]) for name in places.values()]


# The form of the file.


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda r: r.pop("ceilings"), "ceilings is missing"),
        (lambda r: r["ceilings"].update(copy_gb_per_s=0), "not positive"),
        (lambda r: r["machine"].pop("cpu"), "machine: cpu is missing"),
        (lambda r: r["rows"][0].pop("flops"), "flops is missing"),
        (lambda r: r["rows"][0].update(mode="backwards"), "mode is 'backwards'"),
        (lambda r: r["rows"][0]["ratios"].pop("eager"), "times of"),
        (lambda r: r["rows"][0]["times_us"]["fused"].update(q1=1e9), "quartiles"),
        (lambda r: r["rows"][0]["times_us"]["fused"].update(median=float("nan")), "quartiles"),
        (lambda r: r["rows"][0].update(slower_than=["matmul"]), "slower than"),
        (lambda r: r["rows"][0]["launches"].pop("eager"), "launches lacks eager"),
        (lambda r: r["rows"][2].pop("peak_bytes"), "peak_bytes is missing"),
        (lambda r: r["rows"][2].pop("host_us"), "host_us is missing"),
        (lambda r: r["rows"].append(r["rows"][0]), "there twice"),
        (lambda r: r.update(goals=[{"goal": "a", "row": "b"}]), "goal: bound is missing"),
        (lambda r: r["not_measured"].append({"case": "a", "dtype": "fp32"}), "mode is missing"),
    ],
)
def test_a_wrong_file_is_told(change: Any, told: str) -> None:
    results = sample()
    change(results)
    found = check_results(results)
    assert found and any(told in line for line in found), found


# What a row says.


def test_slower_are_those_beyond_noise() -> None:
    rounds = [{"fused": 1.0, "eager": 0.9, "compile": 0.99, "matmul": 0.5} for _ in range(9)]
    assert compare(rounds, True, RIVALS)["slower_than"] == ["eager"]
    assert compare(rounds, False, RIVALS)["slower_than"] == []
    assert compare(rounds, True, RIVALS)["ratios"]["matmul"]["median"] == 0.5
    for r in rounds[:3]:
        r["eager"] = 1.5
    assert compare(rounds, True, RIVALS)["slower_than"] == [], "its upper quartile is above 1"


def test_the_protocol_says_what_each_number_is() -> None:
    row = sample()["rows"][2]
    for key in ("rounds", "calm", "times_us", "ratios", "slower_than", "flops", "bytes"):
        assert key in row and len(PROTOCOL[key]) > 10
    for key in ("saved_bytes", "peak_bytes", "launches", "host_us"):
        assert key in row and "  " not in PROTOCOL[key] and PROTOCOL[key][-1] == "."
    assert set(RIVALS) <= PROTOCOL["contenders"].keys()


def test_shares_are_of_the_measured_ceilings() -> None:
    task, seconds = Task(COUNTED, "bf16", INFERENCE), 1e-5
    row = rates(task, [{"fused": seconds}], CEILINGS)
    assert row["gb_per_s"] == pytest.approx(traffic(task) / seconds / 1e9)
    assert row["copy_share"] == pytest.approx(row["gb_per_s"] / 10.0)
    assert row["matmul_share"] == pytest.approx(flops(task) / seconds / 1e12 / 0.2)


def item_of(row: dict[str, Any], colours: bool) -> tuple[Any, io.StringIO]:
    writer = TerminalWriter(file := io.StringIO())
    writer.hasmarkup = colours
    task = Task(COUNTED, "fp32", INFERENCE)
    told = SimpleNamespace(tasks=[task], began=0.0)
    config = SimpleNamespace(get_terminal_writer=lambda: writer, stash={conftest.RUN: told})
    callspec = SimpleNamespace(params={"task": task})
    item = SimpleNamespace(config=config, callspec=callspec, row=row)
    return item, file


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("slower", [["eager"], ["functional"], []])
def test_rows_that_lose_are_red_where_there_are_colours(colours: bool, slower: list[str]) -> None:
    spread = {"median": 0.9, "q1": 0.8, "q3": 0.95}
    row = {"case": "counted", "dtype": "fp32", "mode": INFERENCE, "calm": True}
    row |= {"times_us": {"fused": spread}, "ratios": {"eager": spread, "functional": spread}}
    row["slower_than"] = slower
    item, file = item_of(row, colours)
    conftest.pytest_runtest_makereport(item, SimpleNamespace(when="call"))
    assert ("\x1b[31m" in file.getvalue()) == (colours and slower == ["eager"])
    found = ["counted fp32, forward: eager takes 0.90 of fused's time (0.80 to 0.95)"]
    assert judge.losses([row]) == (found if slower == ["eager"] else [])


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"COPIED_BYTES": {"cpu": 2**10}, "WIDTHS": {"cpu": 1024}, "NARROWEST": 256}
    for name, value in sizes.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "seconds_per_call", lambda call, calls, device: call() and 0.01)
    monkeypatch.setattr(ceilings, "_product", lambda n, dtype, device: lambda: n)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: 1)
    found = ceilings.ceilings(CPU, 0.1)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 2**10 / 0.01 / 1e9)
    assert found["matmul_tflop_per_s"] == dict.fromkeys(DTYPES, 2 * 1024**3 / 0.01 / 1e12)
    slow = ceilings.ceilings(CPU, 0.05)["matmul_tflop_per_s"]["fp16"]
    assert slow == pytest.approx(2 * 256**3 / 0.01 / 1e12), "wider ones would take too long"


# Which rows, and why not others.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_agenda_has_every_row_once(device: str) -> None:
    tasks = agenda.agenda(device)
    assert len(set(tasks)) == len(tasks)
    for case in CASES:
        for dtype in case.dtypes:
            modes = {task.mode for task in tasks if task[:2] == (case, dtype)}
            assert modes >= {*case.modes} and modes <= {*MODES}
            assert (GRAPH in modes) == (device == "cuda" and case.group != "host")
    assert {(case.rows, case.features) for case in SQUARES} == {
        (m, n) for m in ROWS for n in WIDTHS
    }
    assert {case.order for case in CASES} <= set(FORMULAS)


def plan(**asked: Any) -> run.Run:
    options = {"--device": "cpu", "--only": ""} | {f"--{k}": v for k, v in asked.items()}
    found = run.Run(options.get, lambda text: None)
    found.results |= {"ceilings": CEILINGS, "not_measured": [], "clocks": {}}
    return found


@pytest.mark.parametrize("option", ["seconds", "limit", "threads"])
def test_options_without_sense_are_told(option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option} must be positive, got -1"):
        plan(**{option: -1})


def test_rows_are_left_out_for_a_reason() -> None:
    half, big = Task(CASES[1], "fp16", INFERENCE), Task(square(65536, 8192), "fp32", STEP)
    first = Task(CASES[1], "fp32", STEP)
    usual, full, late = plan(), plan(full=True), plan(limit=1e-9)
    assert usual.why_not(first) is None
    assert "fp16 is slow on a CPU" in str(usual.why_not(half))
    assert "--full" in str(usual.why_not(big))
    assert full.why_not(half) is full.why_not(big) is None
    assert str(late.why_not(first)).startswith("out of time: it takes about ")
    assert str(late.why_not(first)).endswith(" 0 s are left")
    assert plan(limit=1e9).why_not(half), "more time does not change the rules"


def test_a_longer_row_is_estimated_longer() -> None:
    def seconds(task: Task, names: tuple[str, ...] = ()) -> float:
        return agenda.estimate(task, names, CEILINGS, 0.5, "cpu")

    small, large = Task(square(256, 64), "fp32", STEP), Task(square(4096, 2048), "fp32", STEP)
    assert 0.6 < seconds(small) < 0.7
    product = 6 * 4096 * 2048**2 / 0.1e12  # at the ceiling
    assert seconds(large) > 2 * 13 * product, "two contenders, 13 calls each, and more"
    one = seconds(large._replace(mode=STEP_ONE_THREAD)) / seconds(large)
    assert one == pytest.approx(torch.get_num_threads(), rel=0.2)
    assert seconds(small, ("compile",)) == pytest.approx(seconds(small) + 5, abs=0.1)


def test_who_is_compiled() -> None:
    model, goal, sweep = CASES[1], square(256, 64), square(256, 1024)
    assert compiled(Task(TINY, "fp32", RECORD), "cpu", False) == ("compile",)
    assert compiled(Task(model, "fp32", STEP), "cpu", False) == ("compile",)
    assert compiled(Task(goal, "fp32", STEP), "cpu", False) == ("compile",)
    assert compiled(Task(goal, "fp32", ONE_THREAD), "cpu", False) == ()
    assert compiled(Task(goal, "bf16", STEP), "cpu", False) == ()
    assert compiled(Task(sweep, "fp32", STEP), "cpu", False) == ()
    assert compiled(Task(sweep, "fp32", STEP), "cpu", True) == ("compile", "compile-max")


def test_only_takes_part_of_name_and_dtype() -> None:
    tasks = agenda.agenda("cpu")
    assert {str(t) for t in chosen(tasks, "tiny fp32")} == {
        f"tiny fp32, {mode}" for mode in TINY.modes
    }
    assert {t.dtype for t in chosen(tasks, "bf16")} == {"bf16"}
    with pytest.raises(ValueError, match=r"'nonsense' leaves no case; cases: tiny, "):
        chosen(tasks, "nonsense")


def test_a_row_that_raises_is_told_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found, task = plan(), Task(COUNTED, "fp32", INFERENCE)

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        test_layers.test_layer(task, found, None)  # type: ignore[arg-type]
    told = {
        "case": "counted",
        "dtype": "fp32",
        "mode": INFERENCE,
        "why": "RuntimeError: out of memory",
    }
    assert found.results["not_measured"] == [told]
    late = plan(limit=1e-9)
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        test_layers.test_layer(task, late, None)  # type: ignore[arg-type]
    assert late.results["not_measured"][0]["why"].startswith("out of time")


def test_the_file_is_written_after_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some" / "results.json"
    found = plan(output=path)
    monkeypatch.setattr(run, "measure", lambda task, options: ({"case": task.case.name}, []))
    for i, case in enumerate(CASES[:3], 1):
        found.measure(Task(case, "fp32", INFERENCE))
        assert len(json.loads(path.read_text())["rows"]) == i
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert plan().writes and not plan(quick=True).writes and not plan(only="tiny").writes
