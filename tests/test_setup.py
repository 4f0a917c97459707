"""setup.py: what it refuses, in one line each, and the note of a build without extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {  # as much of it as setup.py asks for
    "torch/__init__.py": "from . import version; __version__ = '2.11.0+cpu'",
    "torch/version.py": "cuda = None",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": """
from setuptools import Extension as CppExtension
from setuptools.command.build_ext import build_ext as BuildExtension
""",
}
RUN = "import runpy, setuptools; {} runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture
def setup(tmp_path):
    """setup(*arguments, files={}, first="", **variables): runs it, with `files` to import and run
    before others, after the statement `first`."""

    def run(*arguments, files=TORCH, first="", **variables):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        ours = ("CXX", "FORCE_CUDA", "FORCE_ONLY_CPU", "FUSEDRES_SKIP_EXT")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment |= {"PYTHONPATH": str(tmp_path), **variables}
        command = [sys.executable, "-c", RUN.format(first), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def refusal(done):
    """The one line that it ends with."""
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("fusedres: ") and not done.stdout
    return line


def test_a_build_of_torch_without_cuda(setup):
    done = setup("--name")
    assert done.returncode == 0 and done.stdout == "fusedres\n"
    reason = "this torch is a build without CUDA"
    assert done.stderr == f"fusedres: built without CUDA kernels: {reason}\n"
    assert refusal(setup("--name", FORCE_CUDA="1")).endswith(f"FORCE_CUDA=1 is set, but {reason}")


def test_an_old_setuptools(setup):
    told = refusal(setup("--name", first="setuptools.__version__ = '65.5.0';"))
    assert "found setuptools 65.5.0, needs 77 or newer: pip install 'setuptools>=77'" in told


def test_an_old_torch(setup):
    old = {"torch/__init__.py": "__version__ = '2.10.1'"}
    assert "found torch 2.10.1, needs torch >= 2.11" in refusal(setup("--name", files=TORCH | old))


def test_no_compiler(setup):
    for variables in ({"PATH": ""}, {"CXX": "g++-nowhere"}):
        told = refusal(setup("--name", **variables))
        name = variables.get("CXX", "c++")
        assert f"no C++ compiler {name}, expected g++ 11 or newer" in told
        assert "FUSEDRES_SKIP_EXT=1" in told
        assert setup("--name", **variables, FUSEDRES_SKIP_EXT="1").returncode == 0
        assert setup("egg_info", "--help", **variables).returncode == 0  # nor does sdist need one


def test_an_old_compiler(setup, tmp_path):
    """Named by CXX with an option, which a compiler behind a launcher looks like too."""
    script = '#!/bin/sh\n[ "$2" = --version ] && echo "g++ (Stub) 9.4.0\nCopyright" || exit 1\n'
    told = refusal(setup("--name", files={**TORCH, "cxx": script}, CXX=f"{tmp_path}/cxx -pipe"))
    assert "is 'g++ (Stub) 9.4.0' and knows no C++20, expected g++ 11" in told


def test_no_python_headers(setup):
    first = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere';"
    told = refusal(setup("--name", first=first))
    assert "no Python.h in /nowhere, install e.g. python3-dev, or set FUSEDRES_SKIP_EXT=1" in told


@pytest.mark.parametrize(
    "files, variables, reason",
    [
        ({}, {"FUSEDRES_SKIP_EXT": "1"}, "FUSEDRES_SKIP_EXT=1 was set"),
        ({"torch/__init__.py": "raise ImportError"}, {}, "torch was not importable"),
    ],
)
def test_note_of_a_build_without_extension(setup, tmp_path, files, variables, reason):
    build = ("--quiet", "build_py", "--build-lib", str(tmp_path / "lib"))
    done = setup(*build, files=files, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib/fusedres/without_extension.txt").read_text().startswith(reason)
    assert ("pip install --no-build-isolation ." in done.stderr) == (not variables)
