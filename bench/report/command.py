"""`python -m bench report`: results files as tables and pictures, in README and docs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..measure.results_file import (
    RESULTS,
    ROOT,
    Results,
    check_results,
    load,
    name,
    newest,
    newest_of_machines,
    save,
)
from . import pictures
from .machines import machine_table
from .section import replace_part, section

README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "pictures"
MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {"cpu": "CPU", "cuda": "GPU"}
MOST = 10  # complaints about a file


def missing(found: dict[str, Results]) -> list[str]:
    """A sentence for each kind of device that nothing was measured on."""
    return [f"**{title}: not measured yet.**" for d, title in TITLES.items() if d not in found]


def render(found: dict[str, Results], part: Callable[[Results], str] = section) -> str:
    """A page's generated part: what `part` says of each device, measured or not."""
    parts = [
        f"## {TITLES[device]}\n\n{part(found[device])}" for device in TITLES if device in found
    ]
    return "\n\n".join([*parts, *missing(found)])


def pages(found: dict[str, Results], machines: list[Results]) -> dict[Path, str]:
    """The text of each page that shows results: README in short, docs/benchmarks.md all."""
    folder = PICTURES.relative_to(PAGE.parent)
    by_machine = machine_table(machines).markdown()
    parts = {
        README: [by_machine, *missing(found)],
        PAGE: [by_machine, render(found, lambda r: section(r, pictures.links(r, folder)))],
    }
    return {page: replace_part(page, MARKERS, "\n\n".join(p)) for page, p in parts.items()}


def read(path: Path) -> Results:
    """A results file of the present form."""
    results = load(path)
    if wrong := check_results(results):
        raise SystemExit("\n".join([f"bench report: {path} is no results file:", *wrong[:MOST]]))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Prints results as Markdown tables. Without FILE: the newest of each device.",
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="a results file")
    add("--full", action="store_true", help="print every row and column")
    told = "take FILE over into bench/results, write the newest results of each device into README "
    add("--write", action="store_true", help=f"{told}and docs, and draw the pictures")
    args = parser.parse_args(arguments)
    found = [read(args.file)] if args.file else []
    if args.write and found:
        save(found[0], RESULTS / f"{name(found[0])}.json")
    if args.write or not found:
        found = [read(path) for path in newest(RESULTS).values()]
    by_device = {results["device"]: results for results in found}
    print(render(by_device, partial(section, full=args.full)))
    if args.write:
        texts = pages(by_device, newest_of_machines(RESULTS))  # before drawing: it may refuse
        drawn = [path for each in found for path in pictures.draw(each, PICTURES)]
        for page, text in texts.items():
            page.write_text(text, encoding="utf-8")
        for path in (*texts, *drawn):
            print(f"Written: {path}", file=sys.stderr)
    return 0
