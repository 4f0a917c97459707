"""README, docs and pictures say what the results files say."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.measure import results_file
from bench.report import command as report
from bench.report import pictures
from bench.report.machines import machine_table
from bench.report.tables import select
from results_sample import FORWARD, STEP, find, sample

Results = dict[str, Any]
PICTURE_BYTES = 150_000  # what a page loads at once
PROSE = (report.README, *sorted(report.PAGE.parent.glob("*.md")))


@pytest.fixture
def cpu() -> Results:
    return sample("cpu")


@pytest.fixture
def gpu() -> Results:
    return sample("cuda")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages and a folder of results, which `report` takes for the real ones."""
    folder, pages = tmp_path / "bench" / "results", tmp_path / "docs"
    begin, end = report.MARKERS
    for place in (folder, pages / "pictures"):
        place.mkdir(parents=True)
    for page in (tmp_path / "README.md", pages / "benchmarks.md"):
        page.write_text(f"# before\n\n{begin}\nold\n{end}\n\nafter\n")
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PAGE", pages / "benchmarks.md")
    monkeypatch.setattr(report, "PICTURES", pages / "pictures")
    return tmp_path


def put(site: Path, results: Results) -> Path:
    return results_file.save(
        results, site / "bench" / "results" / f"{results_file.name(results)}.json"
    )


# The committed README, pictures and results.


def committed() -> dict[str, Results]:
    files = results_file.newest(results_file.RESULTS)
    return {device: report.read(path) for device, path in files.items()}


def test_pages_say_what_the_newest_results_say() -> None:
    for page, fresh in report.pages(
        committed(), results_file.newest_of_machines(report.RESULTS)
    ).items():
        assert page.read_text(encoding="utf-8") == fresh, f"{page.name} is out of date: make tables"


def test_readme_is_read_in_a_minute() -> None:
    lines = report.README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert sum(line.startswith("| ") for line in lines) < 40


def test_pages_say_that_no_gpu_has_run_as_long_as_none_has() -> None:
    for name in ("README.md", "docs/install.md", "docs/index.md"):
        text = " ".join((report.ROOT / name).read_text(encoding="utf-8").split())
        assert ("nothing of this version has run on one" in text) == ("cuda" not in committed()), (
            name
        )


def stamp(path: Path) -> str | None:
    """The digest of the results a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(pictures.STAMP)


def test_pictures_are_drawn_from_the_newest_results() -> None:
    found = committed()
    expected = {name for results in found.values() for name in pictures.names(results)}
    assert {path.name for path in report.PICTURES.glob("c[pu]*-*.png")} == expected
    for results in found.values():
        for name in pictures.names(results):
            path = report.PICTURES / name
            assert stamp(path) == pictures.digest(results), f"{name} is out of date: make tables"
            assert path.stat().st_size < PICTURE_BYTES


MEASURED = re.compile(r"\d[\d.,]*\s?(x|times|%|us|µs|ms|ns|[GT]FLOP/s|GB/s|MiB)(?!\w)", re.I)
ABOUT_SPEED = re.compile(r"\b(faster|slower|speed|latency|throughput|overhead|eager's time)\b")


def speed_claims(text: str) -> list[str]:
    """Sentences and table lines with a measured number about speed."""
    sentences = re.split(r"(?<=[.:;])\s|\n\s*\n|\n(?=[|*#])", text)
    return [s for s in sentences if MEASURED.search(s) and ABOUT_SPEED.search(s)]


GENERATED = re.compile(r"<!-- ([\w ]+?)(: ?begin)? -->.*?<!-- (\1: ?end|/\1) -->", re.S)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_prose_claims_no_speed_in_numbers(page: Path) -> None:
    """Numbers stand in generated parts, where they cannot drift."""
    assert speed_claims(GENERATED.sub("", page.read_text(encoding="utf-8"))) == []


def test_a_claim_in_prose_would_be_found() -> None:
    assert speed_claims("It is fast.\nIt is 1.5x faster\nthan torch. It is small.") == [
        "It is 1.5x faster\nthan torch."
    ]
    assert speed_claims("Trained for 3 ms. Nothing is faster.") == []
    part = "<!-- bench:begin -->\n1.5x faster\n<!-- bench:end -->"
    assert GENERATED.sub("", f"before {part} after") == "before  after"


# README's table.


def test_a_line_for_each_machine_and_dtype(cpu: Results, gpu: Results) -> None:
    named = cpu | {"machine": cpu["machine"] | {"cpu": "Some CPU", "family": "26"}}
    rows = select(named["rows"], group="model", dtype="fp32", mode=STEP)
    ratios = [10.0 + i for i in range(len(rows))]
    for row, ratio in zip(rows, ratios, strict=True):
        row["ratios"]["eager"]["median"] = ratio
    rows[0]["slower_than"], rows[-1]["calm"] = ["eager"], False  # what is disturbed does not count
    lines = machine_table([named, gpu]).body
    assert [line[2] for line in lines] == ["fp32", "bf16", "bf16", "fp32"]
    assert lines[0][0] == "Some CPU family 26"
    middle, ends = median(ratios[:-1]), f"{ratios[0]:.2f}-{ratios[-2]:.2f}"
    assert lines[0][5:7] == [f"{middle:.2f} ({ends})", f"1 of {len(rows) - 1}"]


# Files.


def test_newest_file_of_each_device(tmp_path: Path, cpu: Results, gpu: Results) -> None:
    old = results_file.save(cpu | {"date": "2029-12-31"}, tmp_path / "z-old.json")
    new = results_file.save(cpu, tmp_path / "a-new.json")
    other = results_file.save(gpu | {"date": "2029-01-01"}, tmp_path / "gpu.json")
    assert results_file.newest(tmp_path) == {"cpu": new, "cuda": other}
    assert results_file.load(old)["date"] == "2029-12-31"
    named = cpu | {"machine": cpu["machine"] | {"family": "26"}}  # what it was before is told then
    results_file.save(named, tmp_path / "named.json")
    machines = [found["machine"] for found in results_file.newest_of_machines(tmp_path)]
    assert machines in ([gpu["machine"], named["machine"]], [named["machine"], gpu["machine"]])


def test_a_file_of_another_form_is_refused(site: Path, cpu: Results) -> None:
    del cpu["ceilings"]
    path = put(site, cpu)
    with pytest.raises(SystemExit, match="is no results file:\nfile: ceilings is missing"):
        report.main([str(path)])


def test_report_prints_the_file_it_is_given(
    site: Path, cpu: Results, gpu: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    put(site, cpu)
    assert report.main([str(put(site, gpu))]) == 0
    printed = capsys.readouterr().out
    assert "## GPU" in printed and "## CPU" not in printed
    assert report.main(["--full"]) == 0
    printed = capsys.readouterr().out
    assert "## GPU" in printed and "**Every row: square**" in printed
    assert "old" in report.README.read_text()


def test_markers_must_be_there(site: Path, cpu: Results) -> None:
    put(site, cpu)
    report.README.write_text("no markers")
    with pytest.raises(SystemExit, match=r"README\.md has no <!-- bench:begin -->"):
        report.main(["--write"])
    assert not list(report.PICTURES.glob("*.png")), "nothing is drawn where it cannot be shown"
    report.README.write_text(" ".join(reversed(report.MARKERS)))
    with pytest.raises(SystemExit, match="after it"):
        report.main(["--write"])


def test_write_makes_pages_and_pictures_and_changes_nothing_twice(
    site: Path, cpu: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "DPI", 30)  # nobody looks at them
    file = put(site, cpu)
    (report.PICTURES / "cpu-stale.png").write_bytes(b"of an older report")
    report.main(["--write"])
    first = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    names = [f"cpu-{picture.name}.png" for picture in pictures.PICTURES]
    drawn = [report.PICTURES / name for name in names]
    assert set(first) == {report.README, report.PAGE, file, *drawn}

    text = report.PAGE.read_text(encoding="utf-8")
    assert text.startswith("# before\n\n") and text.endswith("\n\nafter\n") and "old" not in text
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert [Path(link).name for link in links] == names
    assert all((report.PAGE.parent / link).is_file() for link in links)

    report.main(["--write"])
    assert first == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_write_takes_a_file_over(
    site: Path, tmp_path_factory: pytest.TempPathFactory, cpu: Results
) -> None:
    cpu["rows"] = []  # so that there is nothing to draw
    elsewhere = results_file.save(cpu, tmp_path_factory.mktemp("elsewhere") / "mine.json")
    report.main([str(elsewhere), "--write"])
    path = report.RESULTS / f"{results_file.name(cpu)}.json"
    assert results_file.load(path) == cpu
    assert cpu["machine"]["cpu"] in report.README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The pictures of a CPU and of a GPU."""
    folder = tmp_path_factory.mktemp("drawn")
    return {device: pictures.draw(sample(device), folder) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_know_when_they_are_stale(drawn: dict[str, list[Path]], device: str) -> None:
    results = sample(device)
    assert len(drawn[device]) == len(pictures.PICTURES)
    for path in drawn[device]:
        assert path.stat().st_size < PICTURE_BYTES
        assert stamp(path) == pictures.digest(results)
    results["rows"][0]["rounds"] += 1
    assert stamp(drawn[device][0]) != pictures.digest(results)


def test_every_row_and_all_that_is_said_of_it_can_be_printed(
    site: Path, gpu: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    find(gpu, "digits", "fp32", FORWARD)["slower_than"] = ["eager"]
    gpu["not_measured"] = [{"case": "a", "dtype": "b", "mode": "c", "why": "none"}]
    report.main([str(put(site, gpu)), "--full"])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for row in gpu["rows"]:
        words = [row[key] for key in ("case", "dtype", "mode", "backend")]
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        [line] = [each for each in cells if [each[1], *each[4:7]] == words]
        assert f"{row['ratios']['eager']['median']:.2f}" in [cell.rstrip("▼") for cell in line]
        assert any(cell.endswith("▼") for cell in line) == bool(row["slower_than"])
    assert "* none (1 row): a b, c" in text
