"""Ctrl-C, which every process of a terminal gets: one line, exit code 130, nothing left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="no groups of processes")
SLOW_TORCH = """
import sys, time
print("importing", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:  # some package's import that goes on
    raise RuntimeError("half-made")
"""


def heeds():
    """Where tests run in the background the signal is ignored, and would be by their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(folder, arguments, first, seconds=0.0):
    """stdout and stderr of a command that gets Ctrl-C `seconds` after it printed `first`."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedres", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=heeds,
    )
    try:
        seen = process.stdout.readline()
        while first not in seen:
            assert process.poll() is None, seen
            seen += process.stdout.readline()
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        told = seen + process.communicate(timeout=60)[0]
        assert process.returncode == 130, told
        with pytest.raises(ProcessLookupError):  # soon nobody of the group is left
            for _ in range(200):
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    finally:
        process.kill()
    assert told.endswith("interrupted\n") and "Traceback" not in told, told
    assert told.count("interrupted") == 1, told


def test_while_torch_is_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(SLOW_TORCH)
    interrupted(tmp_path, ["info"], "importing")


def test_within_an_exec(tmp_path):
    (tmp_path / "work.py").write_text("""
import sys
from fusedres.tools.interrupted import said
try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    sys.exit(said())
""")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "work"]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 130


@pytest.mark.parametrize(
    "arguments, first, seconds",
    [
        (["bench", "--shape", "64x64", "--seconds", "60", "--threads", "1"], "bench [", 0.5),
        (["selftest", "--seconds", "60"], "cpu", 0.0),
        (["demo", "--quick"], "Training", 0.0),
        (["demo", "--quick"], "Training", 4.0),
    ],
)
def test_at_work(tmp_path, arguments, first, seconds):
    if arguments[0] == "demo":
        pytest.importorskip("sklearn")
    interrupted(tmp_path, arguments, first, seconds)
