"""What every test has: one thread, the same random numbers every time; GPU tests, a GPU."""

import os

import pytest
import torch

import fusedres.backends.native as extension
from fusedres.tools import cli

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; none is visible"))
    # The longest first, minutes each: the last ones of a worker are nobody else's to take.
    items.sort(key=lambda item: "test_in_the_interpreter" not in item.nodeid)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    """A seeded generator of its own, for draws that torch.manual_seed must not disturb."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def fusedres_command(capsys):
    """Runs python -m fusedres with some arguments; exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def native():
    """The name of the C++ backend, for tests of what only it promises (bitwise layouts, say)."""
    if extension.missing:
        pytest.skip(extension.missing)
    return "cpu"
