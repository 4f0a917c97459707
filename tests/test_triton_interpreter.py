"""test_triton.py in Triton's interpreter, to be chosen before a process imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="test_triton.py runs by itself"
)
def test_in_the_interpreter():
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = Path(__file__).with_name("test_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    command += ["-W", "ignore::RuntimeWarning", str(tests)]  # NumPy warns of inf and NaN
    run = subprocess.run(command, env=os.environ | interpreter, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout
