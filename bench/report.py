"""`python -m bench report`: results files as README's tables, pictures and pages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import page, pictures
from .results_file import RESULTS, ROOT, load, name, newest, save
from .schema import check_results
from .section import Results, section

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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


def replace_part(text: str, part: str) -> str:
    """`text` with what stands between the markers replaced."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise SystemExit(
            f"bench report: README has no {BEGIN} with {END} after it to write between"
        )
    return f"{text[: begin + len(BEGIN)]}\n{part}\n{text[end:]}"


def write(found: dict[str, Results], readme: Path, folder: Path) -> list[Path]:
    """README's generated part, and beside the results files the pictures and a page a device."""
    text = replace_part(
        readme.read_text(encoding="utf-8"), render(found, folder=folder.relative_to(readme.parent))
    )
    written = []
    for results in found.values():
        drawn = pictures.draw(results, folder)
        written += [*drawn, page.write(results, drawn, folder)]
    readme.write_text(text, encoding="utf-8")
    return [readme, *written]


def read(path: Path) -> Results:
    """A results file of the present form."""
    results = load(path)
    if wrong := check_results(results):
        raise SystemExit("\n".join([f"bench report: {path} is no results file:", *wrong[:MOST]]))
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Prints results as Markdown tables. Without FILE: the newest of each device.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a results file")
    parser.add_argument("--full", action="store_true", help="print every row and column")
    parser.add_argument(
        "--write",
        action="store_true",
        help="take FILE over into bench/results, write the newest "
        "results of each device into README, draw the pictures, and make an HTML page of every row",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    asked = [read(args.file)] if args.file else []
    if args.write:
        for results in asked:
            save(results, RESULTS / f"{name(results)}.json")
        asked = []
    found = asked or [read(path) for path in newest(RESULTS).values()]
    by_device = {results["device"]: results for results in found}
    print(render(by_device, args.full))
    if args.write:
        for path in write(by_device, README, RESULTS):
            print(f"Written: {path}", file=sys.stderr)
    return 0
