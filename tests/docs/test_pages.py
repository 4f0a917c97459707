"""README and the pages of docs/: their code runs, their links lead somewhere, nothing is left out.

A block of Python or shell runs, unless a comment above it says why not: `<!-- not run: reason -->`,
or that it needs a package that is not here: `<!-- needs: onnx -->`. `group/name` is an entry point,
which a package that was only put on the path has not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import fusedres
from fusedres.mlp import MLP_ORDERS

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?:^<!-- (not run|needs): (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)")
LANGUAGES = ("python", "sh", "text")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    line: int  # of its first line, from 0
    language: str
    code: str
    needs: list[str]
    why: str | None  # it does not run


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        mark, said, language, code = match.groups()
        line = text.count("\n", 0, match.start(4))
        needs = said.split() if mark == "needs" else []
        found.append(Block(line, language, code, needs, said if mark == "not run" else None))
    return found


def is_here(name: str) -> bool:
    group, _, entry = name.rpartition("/")
    return bool(entry_points(group=group, name=entry) if group else find_spec(name))


def script(chosen: list[Block]) -> str:
    """The blocks as one program, each on the lines where it stands in its page."""
    lines: list[str] = []
    for block in chosen:
        lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    environment["OMP_NUM_THREADS"] = "1"  # tests run side by side
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@every_page
def test_python_runs_in_order_in_a_fresh_process(page: Path, tmp_path: Path) -> None:
    found = [block for block in blocks(page.read_text()) if block.language == "python"]
    chosen = [block for block in found if block.why is None]
    lacking = [block for block in chosen if not all(map(is_here, block.needs))]
    chosen = [block for block in chosen if block not in lacking]
    if chosen:
        file = tmp_path / f"{page.stem}.py"
        file.write_text(script(chosen))
        run([sys.executable, str(file)], tmp_path)
    if lacking:
        names = sorted({name for block in lacking for name in block.needs})
        pytest.skip(f"{len(chosen)} blocks ran, {len(lacking)} need {', '.join(names)}")


@every_page
def test_shell_runs(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "sh" and block.why is None:
            run(["bash", "-euc", block.code], tmp_path)


@every_page
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text()
    found = blocks(text)
    assert len(found) * 2 == len(re.findall("^```", text, re.M))
    assert [b for b in found if b.language not in LANGUAGES] == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: no #{anchor} in {target}"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r": (\S+\.md)$", menu, re.M)) == {page.name for page in PAGES[1:]}


def test_every_order_is_drawn_and_every_name_is_in_the_reference() -> None:
    layers, api = ((ROOT / "docs" / name).read_text() for name in ("layers.md", "api.md"))
    for alias, order in (*fusedres.ORDERS.items(), *MLP_ORDERS.items()):
        assert f"`{alias}`" in layers and f"`{order}`" in layers
    for name in (*fusedres.ACTIVATIONS, *fusedres.NORMS, *fusedres.GATES, *fusedres.SHORTCUTS):
        assert f"`{name}`" in layers
    functions = [n for n in fusedres.__all__ if callable(getattr(fusedres, n))]
    assert set(re.findall(r"^::: fusedres\.(\w+)$", api, re.M)) == set(functions)


def test_every_line_of_arguments_says_what_they_are() -> None:
    """As mkdocstrings reads them: names, a colon, a description; what goes on is indented more."""
    found = 0
    for path in sorted((ROOT / "fusedres").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.ClassDef, ast.FunctionDef)
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            for part in re.findall(r"^Args:\n((?: .*\n?|\n(?= ))+)", text or "", re.M):
                for line in re.findall(r"^    (\S.*)", part, re.M):
                    assert re.match(r"[\w*]+(, [\w*]+)*: \S", line), f"{path.name}: {line}"
                    found += 1
    assert found > 50


def test_readme_names_the_version() -> None:
    assert f"{fusedres.__version__}, unreleased" in PAGES[0].read_text()


def test_a_block_that_fails_would_be_told() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: why -->\n```sh\nfalse\n```\n"
    first, second = blocks(text)
    assert (first.line, first.code, first.why) == (2, "x = 1\n", None)
    assert (second.language, second.why) == ("sh", "why")
    assert script([first]) == "\n\nx = 1"
