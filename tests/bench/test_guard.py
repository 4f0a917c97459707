"""The regression guard catches what became slower, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.measure import callgrind
from bench.report import guard
from bench.report.guard import BASELINE, compare_counts, compare_times, main, watched
from fusedres.backends import native

ROW = str(watched()[0])


def quartiles(median: float, spread: float = 0.02) -> dict[str, float]:
    return {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread)}


def times(*attempts: dict[str, float]) -> bool:
    """Whether ROW, at 0.8 in the baseline, fails where measurements find `attempts` in turn."""
    turns = iter(attempts)
    (finding,) = compare_times({ROW: quartiles(0.8)}, lambda *_: {ROW: next(turns)})
    assert (finding.row, finding.baseline, finding.limit) == (ROW, 0.8, pytest.approx(0.88))
    return finding.failed


def test_equal_times_pass_at_the_first_attempt() -> None:
    assert not times(quartiles(0.8))
    assert not times(quartiles(0.87))


def test_times_past_the_limit_fail_if_every_attempt_says_so() -> None:
    assert times(quartiles(0.95), quartiles(0.92), quartiles(0.91))
    assert not times(quartiles(0.95), quartiles(0.92), quartiles(0.85))
    assert not times(quartiles(0.95), quartiles(0.81))


def test_times_whose_lower_quartile_is_within_the_limit_pass() -> None:
    assert not times(quartiles(0.95, spread=0.10))


def test_a_time_that_is_no_number_fails() -> None:
    assert times(*[quartiles(float("nan"))] * 3)


COUNTS = {"eager": 1000, "fused": 800, "kernels": 100}


@pytest.mark.parametrize(
    ("changes", "same_key", "failing"),
    [
        ({}, True, []),
        ({"fused": 820, "kernels": 102}, True, []),
        ({"fused": 830}, True, ["instructions"]),
        ({"kernels": 104}, True, ["instructions in the extension"]),
        ({"eager": 1300}, True, []),  # another eager does not make fused slower
        ({"fused": 960}, False, []),
        ({"fused": 1040}, False, ["instructions, fused / eager"]),
        ({"fused": 1600, "eager": 2000, "kernels": 900}, False, []),
    ],
)
def test_counts(changes: dict[str, int], same_key: bool, failing: list[str]) -> None:
    findings = compare_counts({"a": COUNTS}, {"a": COUNTS | changes}, same_key)
    assert len(findings) == (2 if same_key else 1)
    assert [f.cost for f in findings if f.failed] == failing


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What callgrind is made to find, in place of running it, and for which key."""
    found: dict[str, Any] = {"rows": {"a": dict(COUNTS)}, "key": {"torch": "1"}}
    monkeypatch.setattr(guard, "missing", lambda kind: None)
    monkeypatch.setattr(callgrind, "count", lambda: found["rows"])
    monkeypatch.setitem(guard.KEYS, "instructions", lambda: found["key"])
    return found


@pytest.fixture
def arguments(tmp_path: Path, counted: dict[str, Any]) -> list[str]:
    """Of the command, with a baseline that it has just written."""
    arguments = ["--only=instructions", f"--baseline={tmp_path / 'baseline.json'}"]
    assert main(arguments) == 2
    assert main([*arguments, "--update"]) == 0
    return arguments


def test_the_command_passes_on_what_it_has_written(arguments: list[str]) -> None:
    assert main(arguments) == 0


def test_the_command_names_row_baseline_found_and_limit(
    arguments: list[str], counted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counted["rows"] = {"a": COUNTS | {"fused": 900}}
    assert main(arguments) == 1
    assert "a: instructions 900 (+12.5 %); baseline 800, limit 824" in capsys.readouterr().err


def test_the_command_tells_what_it_cannot_compare(
    arguments: list[str], counted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counted |= {"rows": {"a": {"eager": 2000, "fused": 1600, "kernels": 0}}, "key": {"torch": "2"}}
    counted["rows"]["b"] = COUNTS
    assert main([arguments[1]]) == 0
    told = capsys.readouterr().err
    assert "instructions compared as ratios only: the baseline has torch 1 (here 2)" in told
    assert "instructions of b: not in the baseline" in told
    assert "times not compared: not in the baseline" in told


def test_without_valgrind_nothing_is_compared_and_nothing_fails(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "missing", lambda kind: "no valgrind")
    assert main(arguments) == 0
    assert "instructions not compared: no valgrind" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cannot update instructions: no valgrind"):
        main([*arguments, "--update"])


def test_the_committed_baseline_has_every_row() -> None:
    baseline = json.loads(BASELINE.read_text())
    assert baseline["times"]["rows"].keys() == {str(task) for task in watched()}
    assert baseline["instructions"]["rows"].keys() == {str(task) for task in callgrind.COUNTED}
    assert {task.case.name for task in watched()} == {"tiny", *guard.WATCHED}


def test_a_measurement_is_of_fused_over_eager() -> None:
    found = guard.measure(watched()[:1], 0.01)[ROW]
    assert 0 < found["q1"] <= found["median"] <= found["q3"] < 20


def test_instructions_are_counted_where_they_are_spent() -> None:
    dump = """
positions: line
events: Ir
ob=(1) /lib/libc.so.6
fn=(1) memset
10 100
+3 20
ob=(2) /here/fusedres/_C.abi3.so
fl=(7) ???
fn=(2) forward
0 7
cob=(1)
cfn=(1)
calls=3 10
0 360
* 5

ob=(1)
fn=(3) malloc
-2 1000
totals: 1132
"""
    found = callgrind.by_object(dump)
    assert found == {"/lib/libc.so.6": 1120, "/here/fusedres/_C.abi3.so": 12}
    assert [name for name in found if callgrind.EXTENSION.search(name)] == [
        "/here/fusedres/_C.abi3.so"
    ]


def test_a_missing_header_of_valgrind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(callgrind.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(callgrind, "MARKS", "#include <valgrind/no_such_header.h>")
    assert "no_such_header.h" in str(callgrind.missing())


@pytest.mark.skipif(callgrind.missing() is not None, reason=str(callgrind.missing()))
def test_counts_repeat_and_grow_with_the_work(tmp_path: Path) -> None:
    program = """if True:
        import ctypes, sys
        marks = ctypes.CDLL(sys.argv[1])
        marks.start()
        for n in (500, 1000, 2000):  # the first warms up
            marks.zero()
            sum(map(abs, [1] * n))
            marks.dump(f"{n} {sys.argv[2]}".encode())
        """
    marks = callgrind.build_marks(tmp_path)
    totals: dict[str, int] = {}
    for run in "12":
        folder = tmp_path / run
        folder.mkdir()
        dumps = callgrind.run([sys.executable, "-Sc", program, str(marks), run], folder)
        totals |= {label: objects.total() for label, objects in dumps.items()}
    assert totals["1000 1"] == pytest.approx(totals["1000 2"], rel=callgrind.REPEATABILITY)
    # twice the calls of abs, but one of zero and dump
    assert 1.5 < totals["2000 1"] / totals["1000 1"] < 2
