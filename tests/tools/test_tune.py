"""python -m fusedres tune: with a fake GPU whose clock is known, what is chosen and written."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from fusedres import FusedResidual
from fusedres.backends import plan as planner
from fusedres.backends.plan import Device, Tile
from fusedres.spec import NORMS, ORDERS, make_spec
from fusedres.tools import tune

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DEVICE = Device("NVIDIA Fake 1", 132, 227 << 10, "sm_90")
NOTE = make_spec(norm="layer", activation="relu")
KEY = "wide 16 256x512x512"
RULE = Tile(16, 64, 64, 4, 3)  # for KEY
SHAPE = ("--shape", "256x512")
DRIVER = (RuntimeError("Triton Error [CUDA]: too many blocks"), "RuntimeError: Triton Error")
RESOURCES = (
    triton.OutOfResources(300_000, 232_448, "shared memory"),
    "OutOfResources: out of resource: shared memory, Required: 300000",
)


class GPU:
    """Takes `cost[tile]` microseconds for a launch, else 100; `broken[tile]` is raised, and
    `wrong[tile]` added to every y.
    """

    def __init__(self):
        self.cost, self.broken, self.wrong = {}, {}, {}
        self.now = 0.0
        self.calls, self.samples, self.launched = [], [], []

    def prepare(self, call, device):
        assert device == DEVICE
        self.calls.append(call)
        y = torch.empty(4, 4, dtype=call.dtype)

        def launch(tile):
            self.now += 1e-6 * self.cost.get(tile, 100.0)
            self.launched.append(tile)
            if tile in self.broken:
                raise self.broken[tile]
            return y.fill_(1.0 + self.wrong.get(tile, 0.0))

        return launch

    def seconds_of(self, run, calls):
        before = self.now
        for _ in range(calls):
            run()
        self.samples.append(self.launched[-1])
        return (self.now - before) / calls


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    found, configs = GPU(), tmp_path / "configs"
    configs.mkdir()
    for path in planner.CONFIGS.glob("*.json"):
        (configs / path.name).write_text(path.read_text())
    monkeypatch.setattr(planner, "CONFIGS", configs)
    monkeypatch.setattr(planner, "device_of", lambda device: DEVICE)
    monkeypatch.setattr(tune, "why_not", lambda calls: None)
    monkeypatch.setattr(tune, "prepare", found.prepare)
    monkeypatch.setattr(tune, "seconds_of", found.seconds_of)
    monkeypatch.setattr(tune, "perf_counter", lambda: found.now)
    _clear()
    yield found
    _clear()


def _clear():
    planner.config.cache_clear()
    planner.plan.cache_clear()


@pytest.fixture
def run(fusedres_command):
    """Runs the command for tiles alone; exit code, stdout, stderr."""
    return partial(fusedres_command, "tune", "--only", "tiles")


def written():
    return json.loads(planner.config_file(DEVICE.name).read_text())


def planned(spec=NOTE, dtype=torch.bfloat16, M=256, N=512, K=512):
    return planner.plan(spec, dtype, M, N, K, DEVICE).tile


def candidates(quick=False, device=DEVICE, **sizes):
    call = {"spec": NOTE, "dtype": torch.bfloat16, "M": 256, "N": 512, "K": 512, **sizes}
    return tune.contenders([tune.Call(**call)], device, quick)


# What is measured


def test_candidates():
    rule, *others = candidates()
    assert rule == RULE == planned() and rule not in others
    assert len({*others}) == len(others) > 20
    family = [
        Tile(*row)
        for name in ("generic", "sm_90")
        for key in ("wide", "wide random")
        for row in json.loads(planner.config_file(name).read_text())["tiles"]
        .get(key, {})
        .get("16", ())
    ]
    assert {*candidates(quick=True)} == {*family} <= {rule, *others}
    assert {t[:3] for t in others} == {t[:3] for t in family}
    for size in {t[:3] for t in others}:
        here = {t[3:5] for t in (rule, *others) if t[:3] == size}
        warps = (4, 8) if size[0] * size[1] <= 128 * 128 else (8,)
        stages = (2, 3, 4) if sum(size[:2]) * size[2] * 2 * 4 <= DEVICE.shared else (2, 3)
        assert here == {*product(warps, stages)}, size


def test_candidates_fit_the_device():
    small = DEVICE._replace(shared=99 << 10, architecture="sm_89", processors=8)
    for quick in (False, True):
        tiles = candidates(quick, small, M=65536)
        assert all(tile.shared(2) <= small.shared for tile in tiles)
        assert Tile(128, 256, 64, 8, 2) in tiles  # another architecture's, less a stage
        assert Tile(128, 256, 64, 8, 3) not in tiles


def test_candidates_can_compute_the_size():
    batch = make_spec(norm="batch", training=True)
    for M, N in product((1, 17, 200, 512), (1, 60, 256)):
        for tile in candidates(M=M, N=N):
            assert tile.BLOCK_N >= N
        columns = N > 1 or M <= 256  # else programs meet
        for tile in candidates(spec=batch, M=M, N=N) if columns else ():
            assert tile.BLOCK_M >= M


def test_the_rule_of_a_key_is_that_of_its_largest_size():
    sizes = {"dtype": torch.float16, "N": 256, "K": 64}
    calls = [tune.Call(NOTE, M=M, **sizes) for M in (4500, 8192, 4400)]
    rules = [call.rule(DEVICE) for call in calls]
    assert len({call.key() for call in calls}) == 1 and rules[0] == rules[2] != rules[1]
    assert tune.contenders(calls, DEVICE)[0] == rules[1]


def test_dry_run(run, monkeypatch):
    monkeypatch.setattr(planner, "device_of", lambda device: planner.UNKNOWN)
    monkeypatch.setattr(tune, "prepare", None)  # nothing may be measured
    code, out, err = run("--dry-run", *SHAPE, "--order", "note", "--order", "prenorm")
    assert code == 0 and not err
    lines = out.splitlines()
    assert lines[0] == KEY and "algebraic 16 256x512x512" in lines
    assert lines[1] == (
        "  linear-norm-act-add norm=layer activation=relu, x (256, 512), weight (512, 512), "
        "torch.bfloat16"
    )
    assert lines[2] == "    [16, 64, 64, 4, 3] the rule" and "    [128, 256, 64, 8, 3]" in lines
    assert sum("the rule" in line for line in lines) == 2
    quick = run("--dry-run", "--quick", *SHAPE)[1].splitlines()
    assert len(quick) == 2 + len(candidates(quick=True)) < 12


def test_dry_run_lists_every_combination(run):
    arguments = [f"--norm={n}" for n in ("none", *NORMS)] + [f"--order={o}" for o in ORDERS]
    arguments += ["--dtype=fp32", "--dtype=fp16", "--dtype=bf16", "--shape=600x64x32"]
    code, out, _ = run("--dry-run", *arguments)
    lines = [line for line in out.splitlines() if line.startswith("  ") and "x (" in line]
    assert code == 0 and len(lines) == len({*lines})
    assert all("x (600, 64), weight (32, 64)" in line for line in lines)
    specs = {make_spec(o, n, training=n == "batch") for o in ORDERS for n in (None, *NORMS)}
    assert len(lines) == 3 * len(specs)
    keys = {line for line in out.splitlines() if not line.startswith(" ")}
    assert {key.split()[0] for key in keys} == {*planner.FAMILIES} - {"wide", "columns"}


def test_default_shapes(run):
    keys = [line for line in run("--dry-run", "--quick")[1].splitlines() if line[0] != " "]
    sizes = product((256, 4096, 65536), (64, 128, 256, 512, 1024, 2048, 4096))
    assert [key.split()[2] for key in keys] == [f"{M}x{n}x{n}" for M, n in sizes]


# What is chosen


def test_the_fastest_is_chosen_and_the_planner_takes_it(run, gpu):
    fast, faster = Tile(64, 128, 64, 8, 2), Tile(128, 128, 64, 4, 4)
    gpu.cost = {RULE: 50.0, fast: 40.0, faster: 30.0}
    assert planned() == RULE
    code, out, err = run(*SHAPE)
    assert code == 0 and not err
    assert written()["tuned"] == {KEY: [*faster[:5]]} and planned() == faster
    assert out.splitlines()[0] == KEY
    assert "50.00 us  [16, 64, 64, 4, 3]  the rule" in out
    assert "30.00 us  [128, 128, 64, 4, 4]  chosen" in out
    assert str(planner.config_file(DEVICE.name)) in out
    assert faster not in (planned(M=257), planned(N=1024), planned(dtype=torch.float32))


@pytest.mark.parametrize("cost, chosen", [(99.0, False), (98.1, False), (97.9, True)])
def test_the_rule_stands_unless_beaten_by_two_percent(run, gpu, cost, chosen):
    other = Tile(64, 128, 64, 8, 2)
    gpu.cost = {other: cost}
    code, out, _ = run(*SHAPE)
    assert code == 0 and planned() == (other if chosen else RULE)
    assert planner.config_file(DEVICE.name).exists() == chosen
    assert ("no file is written" in out) != chosen
    assert ("[16, 64, 64, 4, 3]  the rule  chosen" in out) != chosen


@pytest.mark.parametrize("error, told", [RESOURCES, DRIVER], ids=("compiler", "driver"))
def test_what_fails_is_named_and_left_out(run, gpu, error, told):
    broken, other = Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 8, 2)
    gpu.broken, gpu.cost = {broken: error}, {broken: 1.0, other: 50.0}
    code, out, _ = run(*SHAPE)
    assert code == 0 and planned() == other
    assert f"  failed  [128, 256, 64, 8, 3]: {told}" in out
    assert gpu.launched.count(broken) == 1


def test_a_rule_that_fails_is_replaced(run, gpu):
    gpu.broken = {RULE: RESOURCES[0]}
    other = Tile(64, 128, 64, 8, 2)
    gpu.cost = {other: 99.5}
    code, out, _ = run(*SHAPE)
    assert code == 0 and "failed  [16, 64, 64, 4, 3]" in out and planned() == other


def test_nothing_runs(run, gpu):
    gpu.broken = dict.fromkeys(candidates(), RESOURCES[0])
    code, out, _ = run(*SHAPE)
    assert code == 0 and out.count("failed") == len(candidates()) and planned() == RULE


def test_a_dead_gpu_ends_it(run, gpu):
    gpu.broken = {Tile(128, 128, 64, 8, 3): torch.AcceleratorError("an illegal memory access")}
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        run(*SHAPE)
    assert not planner.config_file(DEVICE.name).exists()


@pytest.mark.parametrize("error", (0.5, -1.0, math.nan, math.inf))
def test_what_is_wrong_is_never_chosen(run, gpu, error):
    wrong, other = Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 8, 2)
    gpu.wrong, gpu.cost = {wrong: error}, {wrong: 1.0, other: 50.0}
    code, out, _ = run(*SHAPE)
    assert code == 1 and "  WRONG   [128, 256, 64, 8, 3]: y is off by" in out
    assert planned() == other and wrong not in gpu.samples


def test_wrong_for_one_of_the_layers_is_wrong(run, gpu, monkeypatch):
    tile = Tile(64, 128, 64, 8, 2)
    gpu.cost = {tile: 50.0}

    def prepare(call, device):
        launch = gpu.prepare(call, device)
        return lambda tile_: launch(tile_) + (tile_ == tile) * (call.spec.activation == "gelu")

    monkeypatch.setattr(tune, "prepare", prepare)
    code, out, _ = run(*SHAPE, "--activation", "relu", "--activation", "gelu")
    assert code == 1 and "WRONG   [64, 128, 64, 8, 2]" in out and planned() == RULE


def test_an_element_that_is_not_written_is_wrong(run, gpu, monkeypatch):
    """The one before has left right values there."""
    lazy = Tile(128, 128, 64, 8, 3)

    def prepare(call, device):
        y = torch.full((4, 4), math.nan)

        def launch(tile):
            y[: 3 if tile == lazy else 4] = 1.0
            return y

        return launch

    monkeypatch.setattr(tune, "prepare", prepare)
    monkeypatch.setattr(tune, "seconds_of", lambda run, calls: len(run()) * 1e-6)
    code, out, _ = run(*SHAPE)
    assert code == 1 and "WRONG   [128, 128, 64, 8, 3]: y is off by nan" in out


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_rounding_is_not_wrong(dtype):
    """Products of the same numbers summed up in another order; then with one row left out."""
    x, weight = torch.randn(256, 4096), torch.randn(64, 4096) / 64
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    first = (x @ weight.T).to(dtype)
    other = sum(x[:, i : i + 32] @ weight[:, i : i + 32].T for i in range(0, 4096, 32)).to(dtype)
    assert (first != other).any() and tune.difference(other, first, 4096) is None
    other[7] = 0
    assert "y is off by" in tune.difference(other, first, 4096)


def test_rounds_are_interleaved_and_samples_equally_long(run, gpu):
    gpu.cost = {RULE: 2000.0}
    assert run(*SHAPE, "--quick")[0] == 0
    tiles = candidates(quick=True)
    rounds = gpu.samples[len(tiles) :]  # after one sample of each, for how long it takes
    assert len(rounds) == tune.ROUNDS * len(tiles)
    every = [rounds[i : i + len(tiles)] for i in range(0, len(rounds), len(tiles))]
    assert all({*each} == {*tiles} for each in every)
    assert len({each[0] for each in every}) > 1
    counted = {tile: gpu.launched.count(tile) for tile in tiles}
    assert counted.pop(RULE) == 2 + tune.ROUNDS  # 2 ms each: one a sample
    assert {*counted.values()} == {2 + 10 * tune.ROUNDS}  # 0.1 ms each: ten


def test_one_outlier_does_not_decide(run, gpu, monkeypatch):
    good, seconds_of = Tile(64, 128, 64, 8, 2), gpu.seconds_of
    gpu.cost = {good: 50.0}

    def disturbed(run, calls):
        seconds = seconds_of(run, calls)
        return seconds * (100 if gpu.samples[-1] == good and gpu.samples.count(good) == 4 else 1)

    monkeypatch.setattr(tune, "seconds_of", disturbed)
    assert run(*SHAPE)[0] == 0 and planned() == good


def test_what_shares_a_key_is_measured_as_one(run, gpu, monkeypatch):
    """The tile that is best for one layer is bad for another of the same key."""
    one, both = Tile(64, 128, 64, 8, 2), Tile(64, 128, 64, 8, 4)
    cost = {("relu", one): 10.0, ("gelu", one): 500.0, ("relu", both): 60.0, ("gelu", both): 60.0}

    def prepare(call, device):
        launch = gpu.prepare(call, device)

        def other(tile):
            gpu.cost[tile] = cost.get((call.spec.activation, tile), 100.0)
            return launch(tile)

        return other

    monkeypatch.setattr(tune, "prepare", prepare)
    layers = ("--activation", "relu", "--activation", "gelu", *SHAPE, "--shape", "200x512x400")
    assert run(*layers)[0] == 0
    assert len(gpu.calls) == 4 and {call.key() for call in gpu.calls} == {KEY}
    assert written()["tuned"] == {KEY: [*both[:5]]}


# The file


def test_the_file_says_where_it_is_from(run, gpu):
    gpu.cost = {Tile(64, 128, 64, 8, 2): 50.0}
    run(*SHAPE)
    path = planner.config_file(DEVICE.name)
    assert path.name == "NVIDIA-Fake-1.json"
    found = written()
    assert found["device"] == DEVICE.name and "fusedres tune" in found["note"]
    assert (found["torch"], found["triton"]) == (torch.__version__, triton.__version__)
    assert len(found["date"].split("-")) == 3
    assert f'    "{KEY}": [64, 128, 64, 8, 2]\n' in path.read_text()  # a size a line


def test_it_merges_with_a_file_that_is_there(run, gpu, monkeypatch):
    path = planner.config_file(DEVICE.name)
    tiles = {"rows": {"16": [[64, 256, 64, 8, 3]]}}
    kept = {"rows 16 4096x64x64": [16, 64, 64, 4, 2], "wide 32 256x512x512": [64, 128, 32, 8, 2]}
    gone = {"wide 16 4096x512x512": [16, 64, 64, 4, 2]}
    before = {"device": DEVICE.name, "note": "mine", "date": "1999-12-31", "tiles": tiles}
    path.write_text(json.dumps({**before, "tuned": {KEY: [16, 64, 64, 4, 2], **kept, **gone}}))
    _clear()
    assert planned() == Tile(16, 64, 64, 4, 2)
    new = Tile(64, 128, 64, 8, 2)
    gpu.cost = {new: 50.0}

    def only(call, device):  # for the other size nothing beats the rule
        gpu.cost[new] = 50.0 if call.M == 256 else 100.0
        return gpu.prepare(call, device)

    monkeypatch.setattr(tune, "prepare", only)
    assert run(*SHAPE, "--shape", "4096x512")[0] == 0
    found = written()
    assert found["tuned"] == {KEY: [*new[:5]], **kept}
    assert found["tiles"] == tiles and found["note"] == "mine" and found["date"] != "1999-12-31"
    assert planned() == new


@pytest.mark.parametrize("cost, stays", [(99.0, False), (50.0, True)])
def test_the_rule_is_the_one_without_the_file(run, gpu, cost, stays):
    """A tile written down before has to beat it again."""
    before = Tile(64, 128, 64, 8, 2)
    planner.config_file(DEVICE.name).write_text(json.dumps({"tuned": {KEY: [*before[:5]]}}))
    _clear()
    assert planned() == before
    gpu.cost = {before: cost}
    assert run(*SHAPE)[0] == 0
    assert written()["tuned"] == ({KEY: [*before[:5]]} if stays else {})
    assert planned() == (before if stays else RULE)


@pytest.mark.parametrize("fails", ("write_text", "replace"))
def test_the_file_is_whole_at_any_time(run, gpu, monkeypatch, fails):
    path = planner.config_file(DEVICE.name)
    path.write_text(before := json.dumps({"device": DEVICE.name, "tuned": {}}))
    _clear()
    gpu.cost = {Tile(64, 128, 64, 8, 2): 50.0}

    def full(self, *_):
        assert self != path
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        with pytest.raises(OSError, match="no space"):
            run(*SHAPE)
    assert path.read_text() == before
    assert [p.name for p in planner.CONFIGS.iterdir() if "Fake" in p.name] == [path.name]
    run(*SHAPE)
    assert KEY in written()["tuned"]


def test_every_size_is_written_when_it_is_done(run, gpu, monkeypatch):
    gpu.cost = {Tile(64, 128, 64, 8, 2): 50.0}

    def prepare(call, device):
        if call.M == 4096:
            raise KeyboardInterrupt
        return gpu.prepare(call, device)

    monkeypatch.setattr(tune, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        run(*SHAPE, "--shape", "4096x512")
    assert written()["tuned"].keys() == {KEY}


def test_out(run, gpu, tmp_path):
    gpu.cost = {Tile(64, 128, 64, 8, 2): 50.0}
    out = tmp_path / "mine.json"
    code, told, _ = run(*SHAPE, "--out", str(out))
    assert code == 0 and str(out) in told
    assert KEY in json.loads(out.read_text())["tuned"]
    assert not planner.config_file(DEVICE.name).exists() and planned() == RULE


@pytest.mark.parametrize(
    "path, text, words",
    [
        ("nowhere/x.json", None, "no folder that can be written to"),
        ("x.json", '{"device": "NVIDIA Real 1"}', "it is for NVIDIA Real 1, this is NVIDIA Fake 1"),
        ("x.json", "{", "Expecting"),
        (".", None, "directory"),
    ],
)
def test_a_file_that_cannot_be_written(run, gpu, tmp_path, path, text, words):
    path = tmp_path / path
    if text:
        path.write_text(text)
    code, out, err = run(*SHAPE, "--out", str(path))
    assert code == 1 and "cannot write" in err and words in err and str(path) in err
    assert not out and not gpu.launched  # before anything is measured
    assert text is None or path.read_text() == text


# When there is no time, no memory, no GPU


def test_the_budget_stops_it(run, gpu):
    tile = Tile(64, 128, 64, 8, 2)
    gpu.cost = {tile: 50.0}
    once = 1e-6 * 100 * len(candidates()) * (2 + 10 * tune.ROUNDS)
    shapes = (*SHAPE, "--shape", "512x512", "--shape", "1024x512")
    code, out, _ = run(*shapes, "--seconds", str(1.5 * once))
    assert code == 0 and "time is up: 2 of 3 sizes are left as they were" in out
    assert out.count("time is up") == 1
    assert written()["tuned"].keys() == {KEY}
    assert once < gpu.now < 1.6 * once  # in the middle of the second size
    gpu.launched.clear()
    code, out, _ = run(*SHAPE, "--seconds", "-1")
    assert code == 0 and "1 of 1 sizes are left" in out and not gpu.launched
    assert written()["tuned"].keys() == {KEY}


def test_what_does_not_fit_the_memory_is_left_out(run, gpu, monkeypatch):
    gpu.cost = {Tile(64, 128, 64, 8, 2): 50.0}

    def prepare(call, device):
        if call.M > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gpu.prepare(call, device)

    monkeypatch.setattr(tune, "prepare", prepare)
    code, out, _ = run("--shape", "65536x512", *SHAPE)
    assert code == 0 and "does not fit the GPU's memory" in out
    assert written()["tuned"].keys() == {KEY}


def test_no_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "prepare", None)  # nothing may be measured
    for out in ((), ("--out", "nowhere/x.json")):
        code, told, err = run(*SHAPE, *out)
        assert code == 1 and not told and "needs a GPU" in err and "--dry-run" in err


def test_why_not(monkeypatch):
    call = tune.Call(NOTE, torch.bfloat16, 256, 512, 512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fusedres.backends.triton.interpreting", lambda: False)
    assert "compute capability 7.5" in tune.why_not([call])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert tune.why_not([call]) is None
    assert "float64" in tune.why_not([call, call._replace(dtype=torch.float64)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in tune.why_not([call])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "GPU" in tune.why_not([call])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--shape", "256"), "MxK"),
        (("--shape", "256x0"), "MxK"),
        (("--order", "norm-act"), "no 'linear' stage"),
        (("--norm", "group"), "unknown 'group'; known: none, layer"),
        (("--activation", "swish"), "unknown 'swish'; did you mean 'silu'"),
        (("--dtype", "fp64"), "unknown 'fp64'"),
        (("--seconds", "soon"), "invalid float"),
    ],
)
def test_wrong_arguments(run, gpu, arguments, words):
    code, out, err = run(*arguments)
    assert code == 2 and words in err and not out and not gpu.launched


def test_a_call_of_a_layer_never_tunes(gpu):
    FusedResidual(512, backend="reference")(torch.randn(256, 512))
    source = "import sys, fusedres; assert 'fusedres.tools.tune' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True)
    assert not gpu.calls and not planner.config_file(DEVICE.name).exists()


# Real launches

LAUNCHES = """
import itertools, torch
from fusedres.tools import tune
from fusedres.backends import plan as planner
from fusedres.backends import triton as backend
from fusedres.operands import Operands
from fusedres.reference import composite
from fusedres.spec import NORMS, ORDERS, make_spec

run, inputs = backend._launch_forward, {}

def spy(spec, chosen, operands, *outputs):
    inputs.update(operands._asdict())
    return run(spec, chosen, operands, *outputs)

backend._launch_forward = spy
recipes = itertools.product(ORDERS, (None, *NORMS), ((33, 40, 40), (20, 50, 30)))
for order, norm, (M, N, K) in recipes:
    spec = make_spec(order, norm, "relu", training=norm == "batch")
    call = tune.Call(spec, torch.float32, M, N, K)
    launch = tune.prepare(call, planner.UNKNOWN, "cpu")
    tiles = tune.contenders([call], planner.UNKNOWN, quick=True)
    for tile in (tiles[0], tiles[-1]):
        y = launch(tile).clone()
        true = composite(spec, Operands(**inputs))
        assert tune.difference(y, true, K) is None, (call, tile)
        wider = spec.adds and spec.width("add", K, N) != K
        assert (inputs["residual"] is not None) == wider and true.std() < 8
print("done")
"""


@pytest.mark.slow
def test_real_launches_in_the_interpreter():
    """What the command launches is the layer: the rule's tile and another against plain torch."""
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES],
        env=os.environ | interpreter,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="times kernels on a GPU")
def test_on_a_gpu(run, tmp_path):
    torch.cuda.synchronize()
    x = torch.zeros(1 << 28, device="cuda")
    assert tune.seconds_of(lambda: x.add_(1), 5) > 10 * tune.seconds_of(lambda: x[:8].add_(1), 5)
    out = tmp_path / "here.json"
    sizes = ("--shape", "256x256", "--shape", "4096x512", "--norm", "layer", "--norm", "batch")
    code, told, err = run(*sizes, "--quick", "--out", str(out))
    assert code == 0 and not err and "WRONG" not in told and told.count("chosen") == 4
    tuned = json.loads(out.read_text())["tuned"] if out.exists() else {}
    assert len(tuned) == 4 - told.count("the rule  chosen")
