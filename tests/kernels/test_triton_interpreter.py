"""The Triton tests in Triton's interpreter, to be chosen before a process imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def cut(file, *words):
    """A file in parts that run beside each other: for each of `words` what pytest's -k finds by it
    and by none before, and the rest.
    """
    for i in range(len(words) + 1):
        others = [f"not ({word})" for word in words[:i]]
        yield file, " and ".join([*(f"({word})" for word in words[i : i + 1]), *others])


PARTS = (
    *cut(
        "test_triton.py",
        "shapes or layouts or outside or nan or expanded or empty",
        "scales or shortcuts or permutation or everything_on",
        "launch or alignment or many or wide or same_call or alone or product",
    ),
    ("test_triton_grid.py", ""),
    ("test_triton_mixed.py", ""),
    ("test_triton_chain.py", ""),
    ("test_triton_loop.py", ""),
)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run by themselves")
@pytest.mark.parametrize("file, chosen", PARTS)
def test_in_the_interpreter(file, chosen):
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    command += ["-W", "ignore::RuntimeWarning", "-k", chosen, str(tests)]  # NumPy warns of NaN
    run = subprocess.run(command, env=os.environ | interpreter, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert "passed" in run.stdout.splitlines()[-1], run.stdout
