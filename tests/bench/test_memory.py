"""`python -m bench memory`: it counts, and the page and picture show what its newest file says."""

import pytest

from bench import memory, stacks
from bench.measure import results_file
from bench.report import pictures


def test_a_step_s_peak_is_counted(native):
    """Eager keeps z, the norm's and the sum's inputs; recompute keeps less than fused does."""
    (row,) = memory.measure((stacks.Net("tiny", 256, 16, 8),))
    peaks, gradients = row["peak_bytes"], 8 * (16 * 16 + 3 * 16) * 4
    assert peaks.keys() == memory.WAYS.keys() and min(peaks.values()) > gradients
    assert peaks["recompute"] < peaks["fused"]


def test_the_page_and_the_picture_are_the_newest_file_s():
    results = results_file.load(results_file.newest(memory.RESULTS)["cpu"])
    for page, text in memory.pages(results).items():
        assert text == page.read_text(encoding="utf-8"), "run `make tables`"
    image = pytest.importorskip("PIL.Image")
    with image.open(memory.PICTURE) as picture:
        assert picture.info[pictures.STAMP] == pictures.digest(results), "run `make tables`"
