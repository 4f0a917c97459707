"""The numbers in tables are those of the results file, and nothing that was measured is hidden."""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure.results_file import check_results
from bench.report import command as report
from bench.report import pictures, section
from bench.report.tables import COMPILED, SLOWER, UNMEASURED, full_tables, ratio, select
from results_sample import FORWARD, GRAPH, RECORD, STEP, find, sample

Results = dict[str, Any]
MODES = {"forward": FORWARD, "step": STEP, "graph": GRAPH, "recording": RECORD}


@pytest.fixture
def cpu() -> Results:
    return sample("cpu")


@pytest.fixture
def gpu() -> Results:
    return sample("cuda")


def cells(text: str, title: str) -> list[dict[str, list[str]]]:
    """The lines of a Markdown table after `title`: cells by column, of which heads may repeat."""
    lines = text[text.index(f"**{title}") :].split("\n\n")[1].splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = []
    for line in body:
        by_head: dict[str, list[str]] = {}
        for name, cell in zip(head, line, strict=True):
            by_head.setdefault(name, []).append(cell)
        found.append(by_head)
    return found


def test_the_samples_have_the_agreed_form(cpu: Results, gpu: Results) -> None:
    assert check_results(cpu) == []
    assert check_results(gpu) == []


def number(cell: str) -> float:
    return float(cell.removesuffix(SLOWER).replace(",", ""))


def test_numbers_of_the_model_tables_are_those_of_the_file(cpu: Results) -> None:
    text = section.section(cpu)
    for mode, title in ((FORWARD, "forward"), (STEP, "step")):
        lines = cells(text, f"Layers of models, fp32, {title}")
        layers = [line["layer"][0] for line in lines]
        assert layers == ["digits", "rtdl-339", "mesh-128", "vit-384", "bert-768"]
        for line in lines:
            row = find(cpu, line["layer"][0], "fp32", mode)
            for name in ("eager", "compile", "matmul"):
                told = number(line[f"x {name}"][0])
                assert told == pytest.approx(row["ratios"][name]["median"], abs=0.005)
            told = number(line["us"][0])
            assert told == pytest.approx(row["times_us"]["fused"]["median"], abs=0.5)
            for key in ("saved", "peak") if mode == STEP else ():
                found = row[f"{key}_bytes"]
                part = found["fused"] / found["eager"]
                assert number(line[key][0]) == pytest.approx(part, abs=0.005)


def test_numbers_of_the_square_table_are_those_of_the_file(cpu: Results) -> None:
    lines = cells(section.section(cpu), "Square layers")
    assert len(lines) == 2 * 2 * 2  # modes, contenders, numbers of rows
    for line in lines:
        for width in (64, 256, 1024):
            [row] = select(
                cpu["rows"],
                group="square",
                dtype="fp32",
                mode=MODES[line["mode"][0]],
                rows=int(line["rows"][0].replace(",", "")),
                features=width,
            )
            told = line[str(width)][0]
            expected = row["ratios"][line["against"][0]]["median"]
            assert number(told) == pytest.approx(expected, abs=0.005)


def test_the_summary_counts_and_spans_its_rows(cpu: Results) -> None:
    line = cells(section.section(cpu), "All rows in short")[0]
    rows = select(cpu["rows"], group="model", mode=FORWARD, dtype="fp32")
    ratios = sorted(row["ratios"]["eager"]["median"] for row in rows)
    assert line["x eager"] == [f"{ratios[len(ratios) // 2]:.2f}"]
    assert line["range"][0] == f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    assert line["slower"][0] == f"0 of {len(rows)}"


def test_the_host_table_shows_every_contender(cpu: Results) -> None:
    lines = cells(section.section(cpu), "Host time of a call")
    assert [line["mode"][0] for line in lines] == ["forward", "recording", "step"]
    host = find(cpu, "tiny", "fp32", FORWARD)["host_us"]
    assert set(host) <= set(lines[0])
    assert lines[0]["eager"] == [f"{host['eager']:.1f}"]


def test_a_loss_is_marked_and_listed(cpu: Results) -> None:
    for row in cpu["rows"]:
        row["slower_than"] = []
    assert "**Where it loses**: nowhere in 47 rows." in section.section(cpu)
    cpu["rows"][0]["calm"] = False  # and so not judged
    assert "**Where it loses**: nowhere in 46 rows." in section.section(cpu)
    row = find(cpu, "vit-384", "fp32", STEP)
    row["ratios"]["eager"] = {"median": 0.9, "q1": 0.88, "q3": 0.92}
    row["slower_than"] = ["eager"]
    text = section.section(cpu)
    lines = cells(text, "Layers of models, fp32, step")
    assert [line["x eager"] for line in lines if line["layer"] == ["vit-384"]] == [["0.90▼"]]
    [lost] = cells(text, "Where it loses")
    assert (lost["layer"], lost["mode"]) == (["vit-384"], ["step"])
    assert lost["against"] + lost["ratio"] + lost["quartiles"] == ["eager", "0.90▼", "0.88-0.92"]


def test_losses_of_dtypes_that_readme_leaves_out_are_listed(cpu: Results) -> None:
    row = find(cpu, "digits", "bf16", FORWARD)
    row["slower_than"] = ["compile"]
    lost = cells(section.section(cpu), "Where it loses")
    assert any(line["layer"] == ["digits"] and line["dtype"] == ["bf16"] for line in lost)


def test_what_was_not_measured_is_told_in_short_and_with_every_row_in_full(cpu: Results) -> None:
    cpu["not_measured"] = [
        {"case": f"square-{n}", "dtype": dtype, "mode": STEP, "why": f"it takes about {n / 4} s"}
        for n in range(1, 10)
        for dtype in ("fp32", "bf16")
    ]
    told = (
        "* it takes about 0.25 to 2.25 s (18 rows): square-1, square-2, square-3, square-4, "
        "square-5, square-6 and 3 more (fp32, bf16)"
    )
    assert section.unmeasured(cpu) == [told]
    assert f"**Not measured:**\n\n{told}" in section.section(cpu)
    [line] = section.unmeasured(cpu, brief=False)
    assert line.count(";") == 17 and "square-9 bf16, forward + backward" in line
    assert line in section.section(cpu, full=True)


def test_a_contender_that_did_not_run_is_told(cpu: Results) -> None:
    row = find(cpu, "digits", "fp32", FORWARD)
    for found in (row["times_us"], row["ratios"]):
        del found["compile"]
    row["failed"] = {"compile": "no compiler"}
    row["slower_than"] = []
    text = section.section(cpu)
    assert cells(text, "Layers of")[0]["x compile"][0] == UNMEASURED
    assert "* compile: no compiler (1 row): digits (fp32)" in text


def test_of_compiled_contenders_the_faster_counts(cpu: Results) -> None:
    row = find(cpu, "digits", "fp32", FORWARD)
    row["ratios"]["compile-max"] = {"median": 0.7, "q1": 0.69, "q3": 0.71}
    row["slower_than"] = ["compile-max"]
    assert ratio(row, *COMPILED) == "0.70▼"


def test_disturbed_rows_are_marked(cpu: Results) -> None:
    find(cpu, "digits", "fp32", FORWARD)["calm"] = False
    text = section.section(cpu)
    assert cells(text, "Layers of")[0]["us"][0].startswith("~")
    assert f"(1 of {len(cpu['rows'])})" in text


def test_every_section_says_where_and_how(cpu: Results, gpu: Results) -> None:
    for results in (cpu, gpu):
        text = section.section(results | {"dirty": True})
        machine = results["machine"]
        for told in (
            machine.get("gpu", machine["cpu"]),
            "torch 2.11.0",
            "abc1234567 with changes",
            "2030-01-02",
            "rotating order",
            "copy ",
        ):
            assert told in text


def test_a_gpu_shows_bf16_and_cuda_graphs(gpu: Results) -> None:
    text = report.render({"cuda": gpu})
    assert "**CPU: not measured yet.**" in text and "## GPU" in text
    assert cells(text, "Layers of models, bf16")
    assert {"graph"} <= {line["mode"][0] for line in cells(text, "Square layers")}
    assert "Kernels on the GPU a call: forward fused 1 and eager 4;" in text


def test_without_results_nothing_is_measured_yet() -> None:
    text = report.render({})
    assert text == "**CPU: not measured yet.**\n\n**GPU: not measured yet.**"


def test_a_run_that_was_cut_short_can_be_read(cpu: Results) -> None:
    text = section.section(cpu | {"rows": [], "ceilings": {}})
    assert "nowhere in 0 rows" in text
    assert pictures.names(cpu | {"rows": []}) == {}


def test_every_row_is_in_the_full_tables(cpu: Results) -> None:
    found = full_tables(cpu)
    assert sum(len(table.body) for table in found) == len(cpu["rows"])
    model = next(table for table in found if table.title.endswith("model"))
    line = dict(zip(model.head, model.body[0], strict=True))
    row = find(cpu, "digits", "fp32", FORWARD)
    assert line["GB/s"] == f"{row['gb_per_s']:,.1f}"
    assert line["of matmul"] == f"{row['matmul_share']:.0%}"
    assert line["launches"] == "1 / 4"
