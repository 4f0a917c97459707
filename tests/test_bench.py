"""The benchmark measures what it says: one small case end to end, saved bytes against a count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.__main__ import main
from bench.cases import CASES, FORMULAS, Case, Job
from bench.measure import check, saved_bytes

CPU = torch.device("cpu")
FP32 = 4  # bytes


@pytest.fixture(scope="module")
def results_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "results.json"
    main(["--quick", "--only=tiny", "--seconds=0.01", "--device=cpu", f"--output={path}"])
    return path


@pytest.fixture
def results(results_file: Path) -> Any:
    return json.loads(results_file.read_text())


def test_results_say_where_and_how_they_were_measured(results: Any) -> None:
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert set(results["versions"]) == {"python", "torch", "fusedres"}
    assert {"rounds", "ratios", "saved_bytes", "modes"} <= set(results["protocol"])
    assert isinstance(results["dirty"], bool)


def test_every_mode_has_a_row_with_times_and_ratios(results: Any) -> None:
    modes = {row["mode"]: row for row in results["rows"]}
    assert set(modes) == {"forward", "forward, recording", "forward + backward"}
    for row in modes.values():
        assert set(row["times_us"]) == {"functional", "eager", "fused"}
        assert set(row["ratios"]) == {"functional", "eager"}
        assert row["rounds"] >= 7
        for spread in (*row["times_us"].values(), *row["ratios"].values()):
            assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]


def test_report_prints_the_file(results_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(results_file)])
    printed = capsys.readouterr().out
    assert "| forward + backward" in printed
    assert torch.__version__ in printed


def test_report_marks_and_lists_what_is_slower(results: Any) -> None:
    forward, _, step = results["rows"]
    row = forward | {"slower_than": ["eager"]}
    text = report.markdown(results | {"rows": [r | {"host": False} for r in (row, step)]})
    assert f"{row['ratios']['eager']['median']:.2f} slower" in text
    assert "* tiny fp32, forward: eager takes" in text


def test_default_name_holds_device_date_and_commit(
    results: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    results["machine"] |= {"cpu": "AMD EPYC (TM) 9B14", "cores": 2}
    results |= {"date": "2030-01-02", "commit": "abc"}
    assert report.save(results, None).name == "cpu-amd-epyc-tm-9b14-2c-2030-01-02-abc.json"
    assert report.load(None) == results


def test_saved_bytes_of_eager_and_fused() -> None:
    """note + layer norm + GELU: eager saves z, mean, rstd and h = norm(z); fused at most half."""
    rows, features = 37, 53
    job = Job(Case("counted", rows, features), "fp32", CPU)
    z, vector = rows * features * FP32, rows * FP32
    eager = 2 * z + 2 * vector
    assert saved_bytes(job.eager, job) == eager
    fused = saved_bytes(job.fused, job)
    assert fused == eager if job.backend == "reference" else 0 < fused <= eager / 2


def test_the_hand_written_baseline_is_the_layer() -> None:
    assert {case.order for case in CASES} <= set(FORMULAS)
    for order in FORMULAS:
        assert check(Job(Case("small", 33, 17, order, residual=True), "fp32", CPU)) == []


def test_the_check_finds_a_wrong_layer() -> None:
    job = Job(Case("wrong", 33, 17), "fp32", CPU)
    job.fused.register_forward_hook(lambda _module, _inputs, y: y * 1.001)
    assert any(line.startswith("y has RMS error") for line in check(job))


def test_an_unknown_case_is_named_with_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"'nonsense' leaves no case; cases: tiny, "):
        main(["--only=nonsense"])
