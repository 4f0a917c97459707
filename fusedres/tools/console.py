"""What the commands print: plain text, and on a terminal tables, colours and bars by rich, where it
is installed (extra `cli`). Nothing else knows rich.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

Cell = str | tuple[str, str]  # text, or text and its style
STYLES = {"good": "green", "bad": "bold red", "note": "yellow", "head": "bold", "dim": "dim"}
BAR = 30  # characters


def _rich(stream: TextIO) -> Any:
    """A rich console on the stream; None where that is no terminal, or rich is not here.

    NO_COLOR and FORCE_COLOR mean to rich what they mean elsewhere.
    """
    try:
        from rich.console import Console

        console = Console(file=stream, highlight=False, markup=False, emoji=False)
    except Exception:  # a broken rich is as good as none
        return None
    return console if console.is_terminal else None


def out(text: str = "", style: str = "") -> None:
    console = _rich(sys.stdout)
    if console is None:
        print(text, flush=True)
    else:
        console.print(text, style=STYLES.get(style), soft_wrap=True)


def error(text: str) -> None:
    console = _rich(sys.stderr)
    if console is None:
        print(text, file=sys.stderr, flush=True)
    else:
        console.print(text, style=STYLES["bad"], soft_wrap=True)


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], left: int = 1) -> None:
    """The first `left` columns start at the left, the others end at the right. On a terminal that
    is too narrow for whole numbers: a line for each cell.
    """
    console = _rich(sys.stdout)
    split = [[cell if isinstance(cell, tuple) else (cell, "") for cell in row] for row in rows]
    texts = [list(header), *([text for text, _ in row] for row in split)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    gaps = 2 * (len(widths) - 1)
    if console is None:
        if sys.stdout.isatty() and sum(widths) + gaps > shutil.get_terminal_size().columns:
            return _cells(header, split, left)
        texts.insert(1, ["-" * width for width in widths])
        for line in texts:
            cells = [f"{c:{'<' if i < left else '>'}{widths[i]}}" for i, c in enumerate(line)]
            print("  ".join(cells).rstrip(), flush=True)
        return
    for i in range(left):  # these may be broken between words
        widths[i] = max(len(word) for line in texts for word in (line[i] or " ").split(" "))
    if sum(widths) + gaps > console.width:
        return _cells(header, split, left)
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, name in enumerate(header):
        numbers = i >= left
        drawn.add_column(name, justify="right" if numbers else "left", no_wrap=numbers)
    for row in split:
        drawn.add_row(*(Text(text, STYLES.get(style, "")) for text, style in row))
    console.print(drawn)


def _cells(header: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], left: int) -> None:
    """A row's first cells as a heading, each other one below it with its column's name."""
    for row in rows:
        out(" ".join(text for text, _ in row[:left] if text), "head")
        for name, (text, style) in zip(header[left:], row[left:], strict=True):
            if text:
                out(f"  {name}: {text}", style)


@contextmanager
def progress(total: float, what: str) -> Iterator[Callable[[float, str], None]]:
    """Yields a function that says how much of `total` is done, and a few words about it.

    On stderr: a bar on a terminal, elsewhere a line a call.
    """
    console = _rich(sys.stderr)
    if console is None:
        with _plain_progress(total, what) as show:
            yield show
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
    )
    # a thread that redraws would disturb what is being timed
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        task = bars.add_task(what, total=total, text="")
        yield lambda done, text: bars.update(task, completed=done, text=text, refresh=True)


@contextmanager
def _plain_progress(total: float, what: str) -> Iterator[Callable[[float, str], None]]:
    terminal = sys.stderr.isatty()
    width = 0

    def show(done: float, text: str) -> None:
        nonlocal width
        line = f"{what} [{'#' * round(BAR * done / total):<{BAR}}] {done / total:4.0%}  {text}"
        if terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # else \r is no way back
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)
            width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal:
            print("\r" + " " * width + "\r", end="", file=sys.stderr, flush=True)
