"""Every row of a results file as one HTML page, pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from . import pictures
from .cells import SLOWER
from .every_row import full_tables, goal_tables
from .results_file import name
from .section import Results, ceilings, source, unmeasured
from .tables import Table, loss_table, readme_tables

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #1c2128; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
       padding: 0 1rem; }
h1 { margin-bottom: 0; }
img { display: block; width: 850px; max-width: 100%; margin: 1.5rem 0; border-radius: 6px; }
.wide { overflow: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
        width: 100%; }
th, td { padding: 3px 10px; white-space: nowrap; text-align: right; }
th { position: sticky; top: 0; background: var(--soft); cursor: pointer; user-select: none; }
tr + tr > td, thead + tbody > tr > td { border-top: 1px solid var(--line); }
th.text, td.text { text-align: left; }
td.bad { color: var(--bad); }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.5rem; }
"""
# A click on a head sorts by that column, another turns the order around.
SCRIPT = """
const key = cell => {
  const number = parseFloat(cell.textContent.replace(/[,~]/g, ""));
  return isNaN(number) ? cell.textContent : number;
};
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex;
  const sign = head.dataset.sign = head.dataset.sign === "1" ? -1 : 1;
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0)
                                                  : typeof a === "number" ? -1 : 1;
  [...body.rows].sort((a, b) => sign * compare(key(a.cells[at]), key(b.cells[at])))
                .forEach(row => body.append(row));
}));
"""


def _table(table: Table) -> str:
    def cell(tag: str, at: int, text: str) -> str:
        kind = "text" if at < table.left else "bad" if SLOWER in text else ""
        return f"<{tag}{f' class={kind}' * bool(kind)}>{escape(text)}</{tag}>"

    head = "".join(cell("th", at, text) for at, text in enumerate(table.head))
    lines = [
        f"<tr>{''.join(cell('td', at, text) for at, text in enumerate(row))}</tr>"
        for row in table.body
    ]
    return (
        f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.note)}</p>\n"
        f"<div class=wide><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _picture(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _list(title: str, lines: list[str]) -> str:
    items = "\n".join(f"<li>{escape(line.removeprefix('* '))}" for line in lines)
    return f"<h2>{title}</h2>\n<ul>\n{items or '<li>nothing'}\n</ul>"


def _facts(title: str, found: dict[str, object]) -> str:
    lines = [
        f"<dt>{escape(key)}<dd>{escape(value if isinstance(value, str) else json.dumps(value))}"
        for key, value in found.items()
    ]
    return f"<h2>{title}</h2>\n<dl>\n" + "\n".join(lines) + "\n</dl>"


def page(results: Results, drawn: list[Path]) -> str:
    images = zip(drawn, pictures.names(results).values(), strict=True)
    rows = results["rows"]
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>fusedres: {escape(source(results))}</title><style>{STYLE}</style>",
            f"<h1>fusedres, measured</h1>\n<p>{escape(source(results))}<br>",
            f"Ceilings of the same run: {escape(ceilings(results) or 'none')}.<br>",
            f"x eager is eager's time over fused's: above 1 fused is faster; {SLOWER} marks fused",
            "as slower by more than noise, ~ a time that other processes disturbed.</p>",
            *(_picture(path, alt) for path, alt in images),
            *map(_table, readme_tables(results)),
            _table(loss_table(rows)),
            *map(_table, [*goal_tables(results), *full_tables(results)]),
            _list("Not measured", unmeasured(results, brief=False)),
            _facts("Protocol", results["protocol"]),
            _facts("Machine", results["machine"] | results["clocks"]),
            f"<script>{SCRIPT}</script></html>\n",
        ]
    )


def write(results: Results, drawn: list[Path], folder: Path) -> Path:
    """The page beside its results file, under the same name."""
    path = folder / f"{name(results)}.html"
    path.write_text(page(results, drawn), encoding="utf-8")
    return path
