"""The second half of python -m fusedres tune: with a fake GPU whose clock is known, up to how many
rows the CUDA C++ kernels are said to be the fastest.
"""

import json
from functools import partial

import pytest
import torch

from fusedres import backends, fused_residual
from fusedres.backends import plan as planner
from fusedres.backends.plan import Device
from fusedres.spec import make_spec
from fusedres.tools import crossover, tune

pytest.importorskip("triton")

CUDA, BF16, F32 = torch.device("cuda"), torch.bfloat16, torch.float32
DEVICE = Device("NVIDIA Fake 1", 132, 227 << 10, "sm_90")
SIZE = ("--only", "backends", "--shape", "256x500")  # weight (500, 500): key "16 512x512"
KEY = "16 512x512"


class GPU:
    """Where the C++ kernels win up to `crossing` rows and Triton beyond."""

    def __init__(self):
        self.crossing, self.most, self.now = 1000, 1 << 20, 0.0
        self.wrong, self.rivals, self.compared = 0.0, ("cuda", "triton"), []

    def prepare(self, call):
        if self.most < call.M:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def run(backend):
            self.compared.append((call.M, backend))
            y = torch.ones(4, dtype=call.dtype)
            return [y, y + self.wrong * (backend == "triton")]

        return run

    def interleave(self, runs, device, seconds):
        assert device == CUDA
        self.now += seconds
        M = self.compared[-1][0]
        times = {name: M / self.crossing if name == "cuda" else 1.0 for name in runs}
        return [times] * 3, True


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    found = GPU()
    for path in planner.CONFIGS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(planner, "CONFIGS", tmp_path)
    monkeypatch.setattr(planner, "device_of", lambda device: DEVICE)
    monkeypatch.setattr(tune, "why_not", lambda calls: None)
    for name in ("prepare", "interleave"):
        monkeypatch.setattr(crossover, name, getattr(found, name))
    monkeypatch.setattr(crossover, "rivals", lambda call: found.rivals)
    monkeypatch.setattr(crossover, "perf_counter", lambda: found.now)
    _clear()
    yield found
    _clear()


def _clear():
    planner.config.cache_clear()
    backends.most_rows.cache_clear()


@pytest.fixture
def run(fusedres_command):
    return partial(fusedres_command, "tune")


def written():
    return json.loads(planner.config_file(DEVICE.name).read_text())["auto"]["rows by size"]


@pytest.mark.parametrize("crossing, rows", [(1000, 512), (1024, 1024), (15, 0), (1 << 20, 65536)])
def test_auto_goes_by_what_was_measured(run, gpu, crossing, rows):
    gpu.crossing = crossing
    assert backends.most_rows(CUDA, BF16, 500, 500) == 4096  # the guess
    code, out, err = run(*SIZE)
    assert code == 0 and not err and written() == {KEY: rows}
    assert out.splitlines()[0] == f"backends {KEY}"
    assert str(planner.config_file(DEVICE.name)) in out
    assert backends.is_small(CUDA, BF16, rows, 500, 500)
    assert not backends.is_small(CUDA, BF16, rows + 1, 500, 500)
    assert backends.most_rows(CUDA, BF16, 512, 400) == rows  # the same key
    assert backends.most_rows(CUDA, BF16, 513, 500) == 4096  # another
    assert backends.most_rows(CUDA, F32, 500, 500) == 536  # 2^27 products, as guessed


def test_every_number_of_rows_is_compared_once(run, gpu):
    out = run(*SIZE)[1]
    expected = [16 << i for i in range(7)]  # until it loses, at 1024
    assert gpu.compared == [(M, name) for M in expected for name in ("cuda", "triton")]
    assert "     512 rows  cuda / triton 0.51" in out and "    1024 rows  cuda / triton 1.02" in out


def test_sizes_and_dtypes(run, gpu):
    """Once for each size of weight, whatever the rows and recipes."""
    shapes = (*SIZE, "--shape", "65536x512", "--shape", "256x64x128")
    assert (
        run(*shapes, "--dtype", "bf16", "--dtype", "fp32", "--order", "note", "--order", "prenorm")[
            0
        ]
        == 0
    )
    sizes = ("512x512", "128x64")
    assert written().keys() == {f"{bits} {size}" for bits in (16, 32) for size in sizes}


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_what_is_wrong_is_not_written(run, gpu, error):
    gpu.wrong = error
    code, out, _ = run(*SIZE)
    assert code == 1 and "WRONG   16 rows, cuda against triton: y is off by" in out
    assert not planner.config_file(DEVICE.name).exists()


def test_one_backend_alone(run, gpu):
    gpu.rivals = ("triton", "triton")
    code, out, _ = run(*SIZE)
    assert code == 0 and "only triton is here" in out
    assert not planner.config_file(DEVICE.name).exists() and not gpu.compared


def test_as_far_as_memory_goes(run, gpu):
    gpu.crossing, gpu.most = 1 << 30, 2048
    code, out, _ = run(*SIZE)
    assert code == 0 and "4096 rows do not fit" in out and written() == {KEY: 2048}


def test_the_budget_stops_it(run, gpu):
    code, out, _ = run(*SIZE, "--shape", "256x64", "--seconds", str(9 * crossover.SECONDS))
    assert code == 0 and "time is up: 1 of 2 sizes are left as they were" in out
    assert written().keys() == {KEY}


def test_tiles_and_limits_share_a_file(run, gpu):
    path = planner.config_file(DEVICE.name)
    before = {"device": DEVICE.name, "tuned": {"wide 16 256x512x512": [16, 64, 64, 4, 2]}}
    kept = {"32 64x64": 128, KEY: 7}
    path.write_text(json.dumps({**before, "auto": {"rows": 99, "rows by size": kept}}))
    _clear()
    assert backends.most_rows(CUDA, F32, 64, 64) == 128
    assert backends.most_rows(CUDA, BF16, 64, 64) == 99
    assert run(*SIZE)[0] == 0
    found = json.loads(path.read_text())
    assert found["tuned"] == before["tuned"]
    assert found["auto"] == {"rows": 99, "rows by size": {"32 64x64": 128, KEY: 512}}


def test_dry_run(run, gpu):
    code, out, _ = run("--dry-run", *SIZE)
    assert code == 0 and out.splitlines() == [
        f"backends {KEY}",
        "  linear-norm-act-add norm=layer activation=relu, weight (500, 500), torch.bfloat16, "
        "from 16 to 65536 rows",
    ]
    assert not gpu.compared
    everything = run("--dry-run", "--shape", "256x500")[1]
    assert "the rule" in everything and f"backends {KEY}" in everything


@pytest.mark.parametrize("order, norm", [("note", "layer"), ("prenorm", "rms"), ("linear", None)])
@pytest.mark.parametrize("K", [24, 40])
def test_a_step_is_a_layers_forward_and_backward(order, norm, K):
    """On the CPU's own backend, against the public function."""
    spec = make_spec(order, norm, "gelu")
    run = crossover.prepare(tune.Call(spec, F32, 8, 24, K), torch.device("cpu"))
    y, *grads = run("cpu")
    inputs = dict(
        zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__), strict=True)
    )
    x, weight, bias, scale, shift, _, residual, *_ = inputs["operands"]
    expected = fused_residual(
        x,
        weight,
        bias,
        scale,
        shift,
        residual=residual,
        order=order,
        norm=norm,
        activation="gelu",
        backend="reference",
    )
    torch.testing.assert_close(y, expected)
    leaves = [t for t in (x, weight, bias, scale, shift, residual) if t is not None]
    assert len(grads) == len(leaves)
    wanted = torch.autograd.grad(expected, leaves, inputs["dy"])
    torch.testing.assert_close(tuple(grads), wanted)
