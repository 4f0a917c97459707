"""Installs fusedres by every route, each into an environment of its own that is thrown away.

Run: python tests/install_check.py [--quick]     # by a Python that has torch, which routes share

Without --quick also by the other Pythons on PATH, which download torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TREE = ("fusedres", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
README = (ROOT / "README.md").read_text()
TORCH, INSTALL = re.search(r"## Install\n\n.*\n```sh\n(.*)\n(.*)\n```\n", README).groups()
HERE = f"python3.{sys.version_info.minor}"
# What the calls below and the exit code of `selftest` make of an installed package.
FUSED, SILENT, WARNS = "extension, silent, 0", "none, silent, 0", "none, warns once, 1"
CALLS = """
import subprocess, sys, warnings, torch, fusedres
layer, x = fusedres.FusedResidual(8), torch.ones(2, 8)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    layer(x), layer(x)
told = sum("fusedres" in str(w.message) for w in told)
selftest = [sys.executable, "-m", "fusedres", "selftest", "--seconds", "1"]
print("none" if fusedres.explain(layer, x).backend == "reference" else "extension",
      ("silent", "warns once", "warns twice")[told],
      subprocess.run(selftest, stdout=subprocess.DEVNULL).returncode, sep=", ")
"""


class Route(NamedTuple):
    name: str
    command: str
    expected: str  # or a part of the one line that an error is
    python: str = HERE
    path: str | None = None  # of programs; default: all


def routes(quick: bool) -> Iterator[Route]:
    readme, skipped = f"{TORCH}\n{INSTALL}", f"{TORCH}\nFUSEDRES_SKIP_EXT=1 {INSTALL}"
    copied = INSTALL.replace(" -e ", " ")
    build = "pip install -q build\npython -m build"
    from_sdist = f"{build} --sdist\nmv dist/*.tar.gz ..\nrm -r *\nmv ../*.tar.gz .\n"
    wheel = "pip install dist/*.whl"
    yield Route("README", readme, FUSED)
    yield Route("README, skipped", skipped, SILENT)
    yield Route("README, skipped, with wheel", f"pip install -q wheel\n{skipped}", SILENT)
    yield Route("copied, skipped", f"{TORCH}\nFUSEDRES_SKIP_EXT=1 {copied}", SILENT)
    yield Route("isolated", "pip install .", WARNS)
    yield Route("build, isolated", f"{build}\n{wheel}", WARNS)
    if sys.version_info < (3, 12):  # newer ones bring none
        yield Route("setuptools of venv", INSTALL, "found setuptools 6")
    yield Route("no compiler", readme, "no C++ compiler c++", path="")
    if quick:
        return
    yield Route("copied", f"{TORCH}\n{copied}", FUSED)
    yield Route("sdist", f"{TORCH}\n{from_sdist}{copied.removesuffix('.')}*.tar.gz", FUSED)
    here = f"{TORCH}\n{build} --wheel --no-isolation\n{wheel}"
    yield Route("build, not isolated", here, FUSED)
    # --no-deps: uv does not see the shared torch.
    yield Route("uv, isolated", "pip install -q uv\nuv pip install --no-deps .", WARNS)
    uv = copied.replace("pip", "uv pip", 1) + " --no-deps"
    yield Route("uv, not isolated", f"pip install -q uv\n{TORCH}\n{uv}", FUSED)
    for python in (f"python3.{minor}" for minor in range(10, 15)):
        if python != HERE and works(python):
            yield Route(f"README, {python}", readme, FUSED, python)


def works(python: str) -> bool:
    """Whether there is one of that name, and no mere hint at one."""
    found, imports = shutil.which(python), (python, "-c", "import venv")
    return bool(found) and subprocess.run(imports, capture_output=True).returncode == 0


def share_torch(folder: Path) -> None:
    """Links to torch and all it needs but setuptools, which is the environment's own."""
    needed, seen = ["torch", "numpy"], {"setuptools"}
    while needed:
        name = needed.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # needed by an extra
            continue
        needed += [re.match(r"[\w.-]+", line)[0] for line in found.requires or ()]
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


def copy_tree(folder: Path) -> None:
    """The source without what was built in it."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "without_extension.txt")
    folder.mkdir()
    for source in map(ROOT.joinpath, TREE):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=built)
        else:
            shutil.copy(source, folder)


def outcome(route: Route, folder: Path, source: Path, shared: Path) -> str:
    """Installs by this route into `folder` and says what came of it."""
    tree, venv = folder / "tree", folder / "venv"
    shutil.copytree(source, tree)
    python = sys.executable if route.python == HERE else route.python
    subprocess.run([python, "-m", "venv", venv], check=True)
    if route.python == HERE:
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(str(shared))
    path = os.environ["PATH"] if route.path is None else route.path
    variables = os.environ | {
        "PATH": f"{venv / 'bin'}{os.pathsep}{path}",
        "VIRTUAL_ENV": str(venv),
        "FORCE_ONLY_CPU": "1",
    }

    def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    done = run(shutil.which("bash"), "-ec", route.command, cwd=tree)
    if done.returncode == 0:
        # Who has a copy starts elsewhere: in the tree Python takes the tree's package.
        done = run("python", "-c", CALLS, cwd=tree if " -e " in route.command else folder)
        return done.stdout.strip()
    # pip tells how many lines a build said.
    said = re.search(r"\[1 lines of output\]\n *(fusedres: .*)", done.stdout)
    return said[1] if said else done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="builds the extension once")
    parser.add_argument("--only", default="", metavar="TEXT", help="routes with it in the name")
    args = parser.parse_args()
    bad = 0
    print(f"{'route':28}  seconds  result")
    with tempfile.TemporaryDirectory() as top:
        source, shared = Path(top, "source"), Path(top, "shared")
        copy_tree(source)  # all routes install the same, whatever is edited meanwhile
        shared.mkdir()
        share_torch(shared)
        for route in routes(args.quick):
            if args.only not in route.name:
                continue
            start = perf_counter()
            with tempfile.TemporaryDirectory(dir=top) as folder:
                found = outcome(route, Path(folder), source, shared)
            good = route.expected in found
            bad += not good
            told = found if good else f"WRONG, expected {route.expected!r}: {found}"
            print(f"{route.name:28}  {perf_counter() - start:7.0f}  {told}", flush=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
