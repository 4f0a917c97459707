"""The house: no import runs from an inner room to an outer one; CONTRIBUTING maps the tree."""

import ast
import re
from pathlib import Path

import pytest

import fusedres

PACKAGE = Path(fusedres.__file__).parent
# inner ones first; a name is a file or a folder of fusedres/
ROOMS = [
    "spec",
    "operands",
    "wiring",
    "checks",
    "tracing",
    "dtypes",
    "layers",
    "reference",
    "kernels",
    "activations",
    "backends",
    "ops",
    "donation",
    "autograd",
    "chain_ops",
    "chain",
    "graphs",
    "functional",
    "glu",
    "modules",
    "links",
    "mlp",
    "network",
    "stack",
    "models",
    "tools",
]
DOORS = ("__init__", "__main__")  # what users enter by: they see every room
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Names of what a file imports of this package, relative to it: "backends.plan", say."""
    folder = path.parent.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (n.partition(".")[2] for n in names if n.startswith("fusedres."))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = folder[: len(folder) + 1 - node.level]
                start = ".".join([*above, *([node.module] if node.module else [])])
            elif node.module and node.module.split(".")[0] == "fusedres":
                start = node.module.partition(".")[2]
            else:
                continue
            yield from [start] if start else [alias.name for alias in node.names]


def test_every_room_is_known():
    assert {room(path) for path in FILES} == {*ROOMS, *DOORS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_outwards(path):
    here = room(path)
    if here in DOORS:
        return
    for name in imported(path):
        there = name.split(".")[0]
        if there in ROOMS:
            assert ROOMS.index(there) <= ROOMS.index(here), f"{here} imports {name}"
        else:  # a public name, as any user imports it
            assert here == "tools" and hasattr(fusedres, there), f"{here} imports {name}"


def test_imports_are_seen():
    """The walk finds what the files are known to import."""
    assert {"ops", "autograd", "backends"} <= {*imported(PACKAGE / "functional.py")}
    assert "kernels" in {*imported(PACKAGE / "backends/triton.py")}
    assert {"backends.plan", "tools.timing"} <= {*imported(PACKAGE / "tools/crossover.py")}


def test_the_map_of_contributing_is_the_tree():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    start = text.index("```\nfusedres/") + len("```\nfusedres/")
    listed = re.findall(r"(?<![\w/.-])([a-z_]+(?:\.py|/))", text[start : text.index("```", start)])
    top = {p.name + "/" * p.is_dir() for p in PACKAGE.iterdir() if p.suffix in ("", ".py")}
    files = {p.name for p in FILES if p.name != "__init__.py"}
    wanted = {name for name in top - {"__pycache__/"} | files if not name.startswith("__")}
    assert wanted - {*listed} == set() and {*listed} - wanted == set()
