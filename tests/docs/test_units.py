"""One spelling of units, in everything that is printed, drawn or written: us, ms, s; bytes, KiB,
MiB, GiB. Rates are decimal, as makers give them: GB/s, TFLOP/s.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRONG = re.compile(
    r"(?<![\w/])(?:[µμ]s|[mu]?secs?|(?:micro|milli)seconds?|mins|[kKMGT]i?b|[kKMGT]B)(?![\w/])"
)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")]
CODE = [path for top in ("fusedres", "bench", "examples") for path in (ROOT / top).rglob("*.py")]
COMMANDS = [
    ["info"],
    ["selftest", "--seconds", "1e-9"],
    ["explain", "note", "--shape", "4096x1024"],
    ["explain", "note", "--shape", "4096x1024", "--device", "cuda"],
    ["bench", "--shape", "8x8", "--seconds", "0.1", "--threads", "1"],
    ["tune", "--dry-run", "--shape", "8x8"],
    *([name, "--help"] for name in ("info", "selftest", "explain", "bench", "demo", "tune")),
]


def test_what_is_wrong_would_be_found():
    for text in ("12 MB", "3.5 µs", "10 msec", "(milliseconds)", "5 kB,", "2 Gb"):
        assert WRONG.search(text), text
    for text in ("12 MiB", "3.5 us", "10 ms", "30 GB/s", "--seconds", "1 s", "4.8 TB/s", "KiB"):
        assert not WRONG.search(text), text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages(page):
    assert WRONG.findall(page.read_text()) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_of_the_code(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    assert [text for text in texts if WRONG.search(text)] == []


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands(fusedres_command, arguments):
    code, out, err = fusedres_command(*arguments)
    assert code in (0, 1) and WRONG.findall(out + err) == []


def test_they_are_said_once():
    told = [page.name for page in PAGES if "KiB is 1024 bytes" in page.read_text()]
    assert told == ["benchmarks.md"]
