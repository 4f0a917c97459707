"""Markdown that reads well in a terminal too: tables, and the generated part of a page."""

from __future__ import annotations

from pathlib import Path


def table(head: list[str], body: list[list[str]], left: int) -> str:
    """The first `left` columns are left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(cells: list[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        padded = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in columns]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [head, rule, *body]))


def replace_part(page: Path, markers: tuple[str, str], part: str) -> str:
    """The text of a page with what stands between the markers replaced."""
    text, (begin, end) = page.read_text(encoding="utf-8"), markers
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        raise SystemExit(f"bench: {page.name} has no {begin} with {end} after it to write between")
    return f"{text[: first + len(begin)]}\n{part}\n{text[last:]}"
