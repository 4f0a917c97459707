"""What the commands print, with rich and without it."""

import io
import re
import sys
import threading

import pytest

from fusedres.tools import cli, console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)  # importing it raises ImportError


@pytest.fixture
def rich(monkeypatch, capsys):
    """rich, which takes what is captured for terminals; gives what was written to both."""
    pytest.importorskip("rich")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    return capsys.readouterr


TABLE = ("layer", "x", "ratio"), [["note [cli]", "8x8", ("1.50", "good")], ["", "1x1", "0.9"]]


def test_plain_table(plain, capsys):
    console.table(*TABLE, left=2)
    assert capsys.readouterr().out.splitlines() == [
        "layer       x    ratio",
        "----------  ---  -----",
        "note [cli]  8x8   1.50",
        "            1x1    0.9",
    ]


def test_rich_table(rich):
    console.table(*TABLE, left=2)
    out = rich().out
    assert "\x1b[32m 1.50\x1b[0m" in out and "note [cli]" in out and "─" in out


def test_no_color(rich, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console.table(*TABLE, left=2)
    console.out("all is well", "good")
    out = rich().out
    assert "\x1b[3" not in out and "1.50" in out and "all is well" in out


@pytest.mark.parametrize("style", ["", *console.STYLES])
def test_lines(plain, capsys, style):
    console.out("pip install [x] :+1: 12", style)
    console.error("wrong")
    assert capsys.readouterr() == ("pip install [x] :+1: 12\n", "wrong\n")


@pytest.mark.parametrize("style", ["", *console.STYLES])
def test_rich_lines(rich, style):
    text = "pip install [x] :+1: 12 " + "and so on " * 20  # rich reads no markup, breaks no line
    console.out(text, style)
    console.error("wrong")
    out, err = rich()
    assert text in out and ("\x1b[" in out) == bool(style)
    assert "\x1b[1;31mwrong" in err


def test_no_terminal_no_escape(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    console.out("good", "good")
    console.table(*TABLE)
    with console.progress(2, "bench") as show:
        show(1, "half")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and out.startswith("good\nlayer ")
    assert err == f"bench [{'#' * 15:<30}]  50%  half\n"


def test_a_broken_rich_is_none(monkeypatch, capsys):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("broken")

    monkeypatch.setitem(sys.modules, "rich.console", Broken())
    console.out("fine", "good")
    assert capsys.readouterr().out == "fine\n"


def test_plain_bar_redraws_one_line_and_cleans_up(plain, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError), console.progress(4, "bench") as show:
        show(1, "a long text")
        show(2, "b")
        raise ValueError
    bars = sys.stderr.getvalue().split("\r")
    assert "\n" not in sys.stderr.getvalue()
    assert bars[1] == f"bench [{'#' * 8:<30}]  25%  a long text"
    assert bars[2].rstrip() == f"bench [{'#' * 15:<30}]  50%  b" and len(bars[2]) == len(bars[1])
    assert bars[3].strip() == "" and bars[4] == ""


def test_rich_bar(rich):
    with console.progress(4, "bench") as show:
        show(1, "a [text]")
    out, err = rich()
    assert "a [text]" in err and not out


def test_rich_draws_from_no_thread_of_its_own(rich):
    """It would take the core away from what is being timed."""
    with console.progress(4, "bench") as show:
        show(1, "half")
        assert not [t for t in threading.enumerate() if type(t).__module__.startswith("rich")]


@pytest.mark.parametrize("arguments", [("info",), ("explain", "note", "--shape", "8x8")])
def test_a_command_says_the_same_with_rich(rich, arguments, monkeypatch):
    assert cli.main(arguments) == 0
    with_rich = rich().out
    monkeypatch.delenv("FORCE_COLOR")
    assert cli.main(arguments) == 0
    without = rich().out
    assert "\x1b[" in with_rich and "\x1b[" not in without
    assert re.sub(r"\x1b\[[\d;]*m", "", with_rich) == without


CELLS = ["note [cli] 8x8", "  ratio: 1.50", "1x1", "  ratio: 0.9"]  # a line for each


@pytest.mark.parametrize("width", [22, 21])
def test_a_narrow_terminal_cuts_no_number(plain, monkeypatch, width):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    console.table(*TABLE, left=2)
    lines = sys.stdout.getvalue().splitlines()
    assert max(map(len, lines)) <= width and (lines == CELLS) == (width < 22)


@pytest.mark.parametrize("width", [17, 16])
def test_nor_does_rich(rich, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    console.table(*TABLE, left=2)
    lines = re.sub(r"\x1b\[[\d;]*m", "", rich().out).splitlines()
    assert max(map(len, lines)) <= width and (lines == CELLS) == (width < 17)
    assert "…" not in "".join(lines)


def test_a_plain_bar_is_no_wider_than_the_terminal(plain, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "50")
    with console.progress(4, "bench") as show:
        show(1, "a text that is longer than what is left of the line")
    assert {len(bar) for bar in sys.stderr.getvalue().split("\r")} == {0, 49}
