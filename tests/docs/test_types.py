"""What type checkers say of a user's script."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]

GOOD = """
import torch
from torch import Tensor, nn
import fusedres
from fusedres import FusedResidual, FusedResidualMLP, FusedResidualStack, FusedSequential


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = FusedResidual(width, order="preact", norm="rms", gate="scalar")
        self.block = FusedResidualMLP(width, 4 * width, activation="gelu", backend="auto")
        self.stack = FusedResidualStack(width, 8, layers_per_block=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.block(self.first(x), x))


net: nn.Sequential = FusedSequential(Net(64), nn.Linear(64, 10))
y: Tensor = fusedres.fused_residual(torch.randn(4, 64), torch.randn(64, 64), shortcut="identity")
layer: FusedResidual = FusedResidual.from_layers(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
block: FusedResidualMLP = FusedResidualMLP.from_layers(nn.Linear(8, 9), nn.Linear(9, 8))
part: list[FusedResidual] = FusedResidualStack(8, 4).to_layers()
print(fusedres.explain(layer, torch.randn(2, 8)).backend, fusedres.ORDERS["note"])
"""

BAD = """
from fusedres import FusedResidual

FusedResidual(8, norm="leyer")
FusedResidual(8, gate="both")
FusedResidual(8, backend="gpu")
n: int = FusedResidual(8)(None)
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def mypy(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--cache-dir"]
    return run(sys.executable, "-m", "mypy", *options, ROOT / "build/mypy", script, cwd=ROOT)


def test_mypy_strict_is_content_with_a_good_script(tmp_path):
    code, told = mypy(tmp_path, GOOD)
    assert code == 0, told


def test_mypy_finds_a_bad_script_s_errors(tmp_path):
    code, told = mypy(tmp_path, BAD)
    assert code == 1 and told.count("error:") >= 4, told


def pyright(tmp_path, text):
    beside = str(Path(sys.executable).parent)
    command = shutil.which("pyright", path=beside) or shutil.which("pyright")
    if command is None:
        pytest.skip("pyright is not installed")
    script = tmp_path / "script.py"
    script.write_text(f"# pyright: strict\n{text}")
    return run(command, "--pythonpath", sys.executable, script, cwd=ROOT)


def test_pyright_strict_is_content_with_a_good_script(tmp_path):
    code, told = pyright(tmp_path, GOOD)
    assert code == 0, told


def test_pyright_finds_a_bad_script_s_errors(tmp_path):
    code, told = pyright(tmp_path, BAD)
    assert code == 1 and told.count("error:") >= 4, told


def test_the_package_says_that_it_has_types():
    assert (ROOT / "fusedres/py.typed").exists()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text()
