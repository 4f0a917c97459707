"""`python -m bench report`: results files as README's tables and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..measure.results_file import RESULTS, ROOT, Results, check_results, load, name, newest, save
from . import pictures
from .section import replace_part, section

README = ROOT / "README.md"
MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {"cpu": "CPU", "cuda": "GPU"}
MOST = 10  # complaints about a file


def render(found: dict[str, Results], full: bool = False, folder: Path | None = None) -> str:
    """README's generated part: each device, measured or not; with `folder`, its pictures."""
    parts = []
    for device, title in TITLES.items():
        if device not in found:
            parts.append(f"**{title}: not measured yet.**")
            continue
        links = pictures.links(found[device], folder) if folder else ""
        parts.append(f"### {title}\n\n{section(found[device], links, full)}")
    return "\n\n".join(parts)


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
    told = "take FILE over into bench/results, write the newest results of each device into "
    add("--write", action="store_true", help=f"{told}README, and draw the pictures")
    args = parser.parse_args(arguments)
    found = [read(args.file)] if args.file else []
    if args.write and found:
        save(found[0], RESULTS / f"{name(found[0])}.json")
    if args.write or not found:
        found = [read(path) for path in newest(RESULTS).values()]
    by_device = {results["device"]: results for results in found}
    print(render(by_device, args.full))
    if args.write:
        part = render(by_device, folder=RESULTS.relative_to(README.parent))
        text = replace_part(README, MARKERS, part)  # before drawing: it may refuse
        drawn = [path for each in found for path in pictures.draw(each, RESULTS)]
        README.write_text(text, encoding="utf-8")
        for path in (README, *drawn):
            print(f"Written: {path}", file=sys.stderr)
    return 0
