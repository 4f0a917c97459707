"""What only a GPU can show of the Triton and the CUDA backend: bf16, many programs at once,
streams, graphs, more than 2^31 elements, memory.

Triton's kernels always run once before a CUDA graph is captured: compiling one loads a module,
which a capture does not allow. bench/gpu/steps.py takes tests apart by what stands in their names
and parameters: "cuda" for the CUDA C++ backend, "hopper" for its Hopper kernels.
"""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # determinism; read when CUDA starts

import pytest
import torch
from torch import nn

from cases import ALIASES, DIFFERENTIABLE, STATISTICS, make_case
from fusedres import (
    ACTIVATIONS,
    ORDERS,
    FusedResidual,
    FusedResidualStack,
    Residual,
    explain,
    fused_residual,
    ops,
)
from fusedres.backends import choose, cuda, native
from fusedres.backends import plan as planner
from fusedres.chain import composite_chain
from oracle import assert_as_accurate, assert_close, double, eager, exact, fused, without_kinks

pytest.importorskip("triton", reason="Triton is not installed")

from fusedres.backends import triton as backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 runs kernels on the CPU; these tests need them on a GPU",
    ),
]

DEVICE = "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NORMS = ((None, True), ("layer", True), ("rms", True), ("batch", False), ("batch", True))
CALLS, REPLAYS, ROUNDS, STEPS = 1000, 100, 50, 1000
SANITIZER = os.environ.get("FUSEDRES_SANITIZER") == "1"  # bench/gpu: only the kernels run
MANY = 2**31  # elements, beyond what 32 bits can count

# What makes the planner choose a family whatever the sizes.
FORCE = {"wide": {"WIDEST_ROW": 0}, "batch": {"TALLEST_COLUMN": 0}}
# name -> settings of make_case, (M, N); the family is what comes before the comma. No bias where
# batch norm takes it out again: its gradient is nothing but rounding errors.
FAMILIES = {
    "tile": ({"norm": None}, (1031, 384)),
    "tile, given": ({"norm": "batch", "training": False}, (1031, 384)),
    "rows": ({}, (1031, 256)),
    "wide": ({}, (1031, 512)),
    "wide, narrow": ({"norm": "rms", "order": "postnorm"}, (1031, 192)),
    "wide, both ways": ({"order": "postnorm"}, (515, 2304)),  # backward too has rows in tiles
    "columns": ({"norm": "batch", "bias": False}, (509, 384)),
    "batch": ({"norm": "batch", "bias": False}, (1031, 384)),
    "batch, odd": ({"norm": "batch", "bias": False, "order": "resnet-v1"}, (300, 339)),
    "prologue": ({"order": "preact"}, (1031, 384)),
    "algebraic": ({"order": "prenorm"}, (1031, 384)),
    "prebatch": ({"order": "preact", "norm": "batch"}, (1031, 384)),
}
# The same for the CUDA backend.
CUDA_FAMILIES = {
    "cuda": ({}, (1031, 128)),
    "cuda, none": ({"norm": None, "order": "linear-act-add"}, (1031, 339)),
    "cuda, many tiles": ({"order": "postnorm", "norm": "rms"}, (1031, 512)),
    "cuda, odd": ({"order": "resnet-v1", "gate": "channel"}, (515, 339)),
    "cuda, before": ({"order": "preact"}, (1031, 200)),
    "cuda, prenorm": ({"order": "prenorm"}, (1031, 384)),
    "cuda, given": ({"norm": "batch", "training": False}, (1031, 384)),
}
HOPPER_FAMILIES = {  # of Hopper's kernels, which need one
    "cuda, hopper": ({}, (20011, 1024)),
    "cuda, hopper none": ({"norm": None}, (20011, 1000)),
    "cuda, hopper prenorm": ({"order": "prenorm"}, (20011, 512)),
}
without_cuda = pytest.mark.skipif(not native.has_cuda, reason="built without CUDA kernels")
BACKENDS = ("triton", pytest.param("cuda", marks=without_cuda))
NO_BATCH = "batch statistics are the Triton backend's"


def marked(names):
    return (pytest.param(name, marks=without_cuda) for name in names)


SMALL = (*marked(CUDA_FAMILIES), *FAMILIES)  # compute-sanitizer may not come to the last
EVERY = (*SMALL, *marked(HOPPER_FAMILIES))
FAMILIES |= CUDA_FAMILIES | HOPPER_FAMILIES
LARGE = {"rows": (4099, 200), "wide": (4099, 2048), "batch": (4099, 1024), "tile": (4099, 339)}


@pytest.fixture(autouse=True)
def _fresh_plans():
    """No plan that was made with other constants."""
    planner.plan.cache_clear()
    yield
    planner.plan.cache_clear()


@pytest.fixture
def nan_filled():
    """torch.empty comes filled with NaN, so an element that no kernel writes fails the test. Not
    under compute-sanitizer, which looks for reads of such elements.
    """
    torch.use_deterministic_algorithms(not SANITIZER)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(case, device=None):
    device = device or DEVICE
    tensors = {name: t.to(device) for name, t in case.tensors.items()}
    return case.with_tensors(dy=case.dy.to(device), **tensors)


def backend_of(name):
    return "cuda" if name.startswith("cuda") else "triton"


def force(family, case, monkeypatch, rows=None):
    """The planner chooses `family` for this case of so many rows, by default its own."""
    for constant, value in FORCE.get(family, {}).items():
        monkeypatch.setattr(planner, constant, value)
    planner.plan.cache_clear()
    N, K = case.tensors["weight"].shape
    M, device = rows or case.x.shape[0], torch.device(DEVICE, 0)
    chosen = planner.plan(case.spec, case.x.dtype, M, N, K, planner.device_of(device))
    assert chosen.family == family


def needs_hopper(case):
    """Skips the test where Hopper's kernels cannot run; those of this case must be among them."""
    if torch.cuda.get_device_capability()[0] != 9 or case.x.dtype == F32:
        pytest.skip("Hopper's kernels need one, and 16-bit types")
    if native.extension.build_info()["hopper"] != "built":
        pytest.skip("built without Hopper's kernels")
    (M, K), N = case.x.shape, case.dy.shape[1]
    kernel, _ = cuda.kernel(case.spec, case.x.dtype, M, N, K, torch.device(DEVICE, 0))
    assert "sm90" in kernel


def hopper_case(*sizes, **settings):
    """A case on DEVICE that one of Hopper's kernels runs."""
    case = make_case(*sizes, **{"activation": "gelu", "dtype": BF16, **settings})
    needs_hopper(case)
    return on_device(case)


def make_family(name, monkeypatch, sizes=None, dtype=BF16, **settings):
    """A case on DEVICE that runs in this family."""
    given, modest = FAMILIES[name]
    M, N = sizes or modest
    case = make_case(M, N, **{"activation": "gelu", "dtype": dtype, **given, **settings})
    if "hopper" in name:
        needs_hopper(case)
    if backend_of(name) == "triton":
        force(name.split(",")[0], case, monkeypatch)
    return on_device(case)


def check(case, backend="triton"):
    what = f"'{case.spec}', {case.x.dtype}"
    results = fused(case, backend), eager(case), exact(case)
    if case.spec.gate == "scalar":  # a sum over everything: one number has no RMS
        gates = [{"dgate": result.pop("dgate")} for result in results]
        assert_close(*gates, terms=case.dy.numel(), what=what)
    assert_as_accurate(*results, what)


def step_of(case, backend="triton"):
    """leaves, dy, and a call that makes y and every gradient from them; no running statistics."""
    leaves = {
        name: t.detach().clone().requires_grad_(name in DIFFERENTIABLE)
        for name, t in case.tensors.items()
        if not (case.spec.batch_stats and name in STATISTICS)
    }
    settings = {name: value for name, value in case.settings.items() if name != "gate"}
    wanted, dy = [leaves[name] for name in case.asked], case.dy.clone()

    def run():
        y = fused_residual(**leaves, **settings, backend=backend)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy))

    return leaves, dy, run


def assert_bitwise(ours, others, what=""):
    assert len(ours) == len(others) > 0
    for i, (a, b) in enumerate(zip(ours, others, strict=True)):
        assert b.isfinite().all(), f"tensor {i} {what}"
        assert torch.equal(a, b), f"tensor {i} {what}: {(a != b).sum()} of {a.numel()} differ"


def redraw(*tensors):
    with torch.no_grad():
        for t in tensors:
            t.normal_()


def compile_kernels(run):
    """Runs them on a side stream, as a capture will."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


# Operands as views: what of 16 bytes exists, or what 4 bytes or an element at a time bring.


def in_wider_rows(t, stride, offset):
    """The same values, from column `offset` of a matrix of `stride` columns."""
    buffer = torch.empty(len(t), stride, dtype=t.dtype, device=t.device)
    return buffer[:, offset : offset + t.shape[1]].copy_(t)


def check_views(case, view, names=("x", "weight", "residual", "dy")):
    """A call on views of these operands is bitwise the call on the operands."""
    operands = {**case.tensors, "dy": case.dy}
    seen = case.with_tensors(**{name: view(operands[name]) for name in names if name in operands})
    ours = list(fused(seen, "cuda").values())
    if SANITIZER:
        torch.cuda.synchronize()
    else:
        assert_bitwise(ours, list(fused(case, "cuda").values()), f"of '{case.spec}'")


def viewed_cases(dtype):
    """The last has dy, as it came, in a product."""
    for order in ("note", "prenorm", "postnorm", "norm-act-linear"):
        residual = 339 if "add" in ORDERS.get(order, order) else None
        settings = {"order": order, "residual": residual, "activation": "gelu", "dtype": dtype}
        yield on_device(make_case(67, 339, **settings))


@without_cuda
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("stride, offset", [(344, 0), (340, 0), (340, 1), (341, 2), (344, 2)])
def test_cuda_on_views(stride, offset, dtype, nan_filled):
    for case in viewed_cases(dtype):
        check_views(case, partial(in_wider_rows, stride=stride, offset=offset))


@without_cuda
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_cuda_on_views_of_a_transposed_weight(dtype, nan_filled):
    for case in viewed_cases(dtype):
        check_views(case, lambda weight: weight.t().contiguous().t(), ["weight"])


@without_cuda
@pytest.mark.parametrize("order", ["note", "prenorm"])
def test_hopper_on_rows_of_a_wider_matrix(order, nan_filled):
    """Rows start at multiples of 16 bytes, as TMA wants them."""
    check_views(hopper_case(20011, 512, order=order), partial(in_wider_rows, stride=520, offset=0))


@without_cuda
def test_cuda_on_one_row_for_all(nan_filled):
    """TMA refuses rows that lie at the same place."""
    case = on_device(make_case(20000, 1024, activation="gelu", dtype=BF16))
    case = case.with_tensors(x=case.x[0].expand(20000, 1024))
    results = fused(case, "cuda"), eager(case), exact(case)
    y = results[0]["y"]
    assert (y == y[0]).all()
    assert_as_accurate(*({**result, "y": result["y"][0]} for result in results), "one row for all")


# Accuracy: NUMERICS 1.


@pytest.mark.parametrize("name", SMALL)
def test_small_shapes(name, monkeypatch, nan_filled):
    """Few rows and columns, no power of two: also what compute-sanitizer looks at."""
    if name == "wide, both ways":
        for widest in ("BACKWARD_ROW", "BACKWARD_PLAIN_ROW"):
            monkeypatch.setattr(planner, widest, 0, raising=False)
    case = make_family(name, monkeypatch, (67, 70), residual=70)
    if SANITIZER:
        fused(case, backend_of(name))
        torch.cuda.synchronize()
    else:
        check(case, backend_of(name))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_as_accurate_as_eager(name, dtype, monkeypatch, nan_filled):
    if name == "algebraic" and dtype == F32:
        pytest.skip("this family is for 16-bit types")
    check(make_family(name, monkeypatch, LARGE.get(name), dtype), backend_of(name))


def any_case(order, norm, training, dtype, turn=0):
    """Sizes, activation, gate, dropout and drop-path take turns."""
    i = ALIASES.index(order) + 2 * NORMS.index((norm, training)) + turn
    drops = {"dropout": 0.1 * (i % 2), "drop_path": 0.2 * (i % 3 == 1)}
    lead = (1033, 4) if drops["drop_path"] else (4099,)
    return make_case(
        K=(339, 512, 200)[i % 3],
        lead=lead,
        order=order,
        norm=norm,
        training=training,
        activation=("gelu", "silu", "tanh")[i % 3],
        gate=(None, "channel", "scalar", None)[i % 4],
        bias=not (norm == "batch" and training and "linear-norm" in ORDERS[order]),
        dtype=dtype,
        **drops,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm, training", NORMS)
@pytest.mark.parametrize("order", ALIASES)
def test_every_order_is_as_accurate_as_eager_in_bf16(order, norm, training, backend, nan_filled):
    if backend == "cuda" and (norm, training) == ("batch", True):
        pytest.skip(NO_BATCH)
    check(on_device(any_case(order, norm, training, BF16)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("order", ALIASES)
def test_every_order_is_as_accurate_as_eager_in_other_types(order, dtype, backend, nan_filled):
    i = ALIASES.index(order) + 2 * (dtype == F32)
    norms = NORMS if backend == "triton" else NORMS[:-1]
    check(on_device(any_case(order, *norms[i % len(norms)], dtype, i)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_relu_is_as_accurate_as_eager(dtype, backend, nan_filled):
    check(on_device(without_kinks(make_case(2053, 256, dtype=dtype))), backend)


@without_cuda
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_every_activation_of_the_cuda_backend(dtype, nan_filled):
    for activation in ACTIVATIONS:
        case = without_kinks(make_case(515, 160, activation=activation, dtype=dtype))
        check(on_device(case), "cuda")


@without_cuda
def test_wide_cuda_layers_go_back_by_triton(nan_filled):
    """Rows too wide for shared memory: the forward is C++, the backward Triton's."""
    case = on_device(make_case(67, 64, 40000, activation="gelu", dtype=BF16))
    assert cuda.name(case.spec, BF16, torch.device(DEVICE, 0), 40000, 64) == cuda.WITH_TRITON
    check(case, "cuda")


@pytest.mark.parametrize("order", ["note", "postnorm", "linear-act-add"])
def test_the_library_s_product_and_one_pass(order, nan_filled):
    """What "auto" takes in true fp32 where a layer is not small."""
    case = on_device(make_case(4099, 512, order=order, activation="gelu"))
    assert choose("auto", str(case.spec), F32, torch.device(DEVICE, 0), 512, 512) == "vendor"
    check(case, "auto")


# Hopper's kernels at their edges.


@without_cuda
@pytest.mark.parametrize("order", ["note", "prenorm"])
@pytest.mark.parametrize("K", [8, 16, 56])
def test_hopper_s_boxes_may_be_wider_than_the_matrix(K, order, nan_filled):
    check(hopper_case(20011, K, 512, order=order), "cuda")


@without_cuda
def test_hopper_s_prenorm_with_an_outlier():
    """Statistics in one pass over x, about the mean of its first 64 columns."""
    case = hopper_case(9000, 4096, 512, order="prenorm")
    case.x[:, 0] = 200.0
    operands = (case.tensors.get(name) for name in (*DIFFERENTIABLE, *STATISTICS))
    _, _, stats = ops.FORWARD["cuda"](*operands, None, 1, case.spec.text, True)
    mean, rstd = stats.view(2, -1).double()
    x = case.x.double()
    var = x.var(1, correction=0)
    # Each sum has some 600 additions in a row, each with an error of up to 6e-8 of it.
    torch.testing.assert_close(mean, x.mean(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(rstd, (var + case.spec.eps).rsqrt(), rtol=1e-4, atol=0)


@without_cuda
@pytest.mark.parametrize("N", [256, 1024])
def test_hopper_s_first_call_on_a_thread(N):
    """A thread that has never used CUDA has no context, which making boxes for TMA needs."""
    _, _, run = step_of(hopper_case(20011, N), "cuda")
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(run).result()
    assert_bitwise(first, run())


FIRST_CALL = """
import sys

import torch

from fusedres import FusedResidual

layer = FusedResidual(1024, order=sys.argv[1], backend="cuda").to("cuda", torch.bfloat16)
x = torch.randn(20011, 1024, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.no_grad():
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        y = layer(x)
        assert y.isfinite().all() and torch.equal(captured, y)
"""


@without_cuda
@pytest.mark.parametrize("order", ["prenorm", "postnorm"])
def test_hopper_s_first_call_in_a_capture(order):
    """A process loads a kernel at its first launch, here one of blocks that wait for others."""
    needs_hopper(make_case(20011, 1024, order=order, dtype=BF16))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, order],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


# Nothing depends on which program comes first.


@pytest.mark.parametrize("name", EVERY)
def test_a_thousand_calls_are_bitwise_equal(name, monkeypatch):
    """Another stream keeps some of the GPU busy, so programs start and end in ever other orders."""
    _, _, run = step_of(make_family(name, monkeypatch), backend_of(name))
    first = run()
    assert all(t.isfinite().all() for t in first)
    other, noise = torch.cuda.Stream(), torch.randn(512, 512, device=DEVICE)
    other.wait_stream(torch.cuda.current_stream())
    unequal = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
    for _ in range(CALLS):
        with torch.cuda.stream(other):
            torch.mm(noise, noise)
        unequal += torch.stack([(a != b).sum() for a, b in zip(first, run(), strict=True)])
    assert not unequal.any(), f"elements that differ, by tensor: {unequal.tolist()}"


@pytest.mark.parametrize("name", EVERY)
def test_two_streams_at_once(name, monkeypatch):
    backend = backend_of(name)
    runs = [step_of(make_family(name, monkeypatch, draw=draw), backend)[2] for draw in (0, 1)]
    alone = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    together = []
    for _ in range(ROUNDS):
        for i, (stream, run) in enumerate(zip(streams, runs, strict=True)):
            with torch.cuda.stream(stream):
                together.append((i, run()))
    torch.cuda.synchronize()
    for i, results in together:
        assert_bitwise(results, alone[i], f"on stream {i}")


# CUDA graphs.


@pytest.mark.parametrize("name", EVERY)
def test_graph_replays_are_bitwise_the_ordinary_calls(name, monkeypatch):
    """New data each time. No arrival counters exist when the capture begins."""
    leaves, dy, run = step_of(make_family(name, monkeypatch), backend_of(name))
    compile_kernels(run)
    backend._slots.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for i in range(REPLAYS):
        redraw(leaves["x"], dy)
        graph.replay()
        assert_bitwise(captured, run(), f"in replay {i}")


def test_a_graph_draws_a_new_mask_in_each_replay(monkeypatch):
    _, _, run = step_of(make_family("wide", monkeypatch, dropout=0.5, order="linear-norm-act"))
    compile_kernels(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *_ = run()
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(y != 0)
        assert 0.45 < masks[-1].double().mean() < 0.55
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


# Devices and sizes.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "wide",
        "batch",
        "algebraic",
        *marked(["cuda", "cuda, many tiles", "cuda, prenorm", "cuda, hopper"]),
    ],
)
def test_a_device_that_is_not_current(name, monkeypatch):
    case = make_family(name, monkeypatch)
    check(on_device(case, "cuda:1"), backend_of(name))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    "family, N, settings",
    [
        ("tile", 1024, {"norm": None}),
        ("rows", 256, {}),
        ("wide", 1024, {}),
        ("batch", 1024, {"norm": "batch", "bias": False}),
        ("prologue", 1024, {"order": "preact"}),
        ("algebraic", 1024, {"order": "prenorm"}),
        ("prebatch", 1024, {"order": "preact", "norm": "batch"}),
    ],
)
def test_more_than_2_to_the_31_elements(family, N, settings, monkeypatch):
    """x and dy repeat 2048 rows, so all rows have the same results, bit by bit, and sums over rows
    are so many times those of 2048.
    """
    rows, K = 2048, 64
    base = make_case(rows, K, N, pad=True, activation="gelu", dtype=BF16, **settings)
    times = MANY // (rows * N) + 1
    force(family, base, monkeypatch, rows * times)
    torch.cuda.empty_cache()
    needed, free = 5 * 2 * rows * times * N, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, found {free >> 30}")
    base = on_device(base)
    case = base.with_tensors(x=base.x.repeat(times, 1), dy=base.dy.repeat(times, 1))
    ours, plain, true = (
        {name: t for name, t in results.items() if name not in STATISTICS}
        for results in (fused(case, "triton"), eager(base), exact(base))
    )
    assert ours["y"].numel() > MANY
    by_row = ("y", "dx")
    first = {name: ours[name][:rows] for name in by_row}
    for name in by_row:
        for i in range(rows, rows * times, rows):
            assert torch.equal(ours[name][i : i + rows], first[name]), f"{name} from row {i}"
    plain_rows, true_rows = ({name: r[name] for name in by_row} for r in (plain, true))
    assert_as_accurate(first, plain_rows, true_rows, f"'{case.spec}'")
    for name in true.keys() - set(by_row):
        error = (ours[name].double() / times - true[name]).abs().max()
        assert error <= 4 * torch.finfo(BF16).eps * true[name].abs().max(), name


# Training.


def layers(block, dtype=BF16, **settings):
    return nn.Sequential(
        block(320, gate="channel", gate_init=0.3, dropout=0.1, **settings),
        block(320, order="prenorm", **settings),
        block(320, order="preact", norm="batch", **settings),
        block(320, norm="batch", activation="gelu", **settings),
        block(320, 256, order="postnorm", norm="rms", activation="silu", **settings),
    ).to(DEVICE, dtype)


def test_a_thousand_steps_leave_no_byte_behind():
    net = layers(FusedResidual)
    step = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    x, dy = (torch.randn(1031, n, device=DEVICE, dtype=BF16) for n in (320, 256))

    def train(count):
        for _ in range(count):
            step.zero_grad()
            net(x).backward(dy)
            step.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = train(10)
    assert train(STEPS) == before


class Net(nn.Module):
    def __init__(self, block, **settings):
        super().__init__()
        blocks = [block(24, **settings) for _ in range(3)]
        self.layers = nn.Sequential(nn.Linear(10, 24), *blocks, nn.LayerNorm(24), nn.Linear(24, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_both_layers_train_alike_for_32_steps(order, norm):
    """NUMERICS 12: fp32 loss within 1e-5 relative; gelu, as a ReLU's kink lets runs part."""
    settings = {"order": order, "norm": norm, "activation": "gelu"}
    nets = [Net(block, **settings).to(DEVICE) for block in (Residual, FusedResidual)]
    nets[1].load_state_dict(nets[0].state_dict())
    steps = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for x in torch.randn(32, 64, 10).to(DEVICE):
        target = (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0).long()
        losses = []
        for net, step in zip(nets, steps, strict=True):
            step.zero_grad()
            losses.append(nn.functional.cross_entropy(net(x), target))
            losses[-1].backward()
            step.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


# Never a wrong number silently.


@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
@pytest.mark.parametrize("order", ALIASES)
def test_auto_takes_the_kernels(order, norm):
    x = torch.zeros(4, 339, device=DEVICE)
    for extra in ({}, {"gate": "scalar"}, {"gate": "channel", "dropout": 0.1, "drop_path": 0.1}):
        layer = FusedResidual(339, order=order, norm=norm, device=DEVICE, **extra)
        own = native.has_cuda and not layer.spec.batch_stats
        assert explain(layer, x).backend == ("cuda" if own else "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
def test_autocast(norm, dtype, backend):
    """Dtypes and accuracy of the eager twin under the same autocast."""
    if backend == "cuda" and norm == "batch":
        pytest.skip(NO_BATCH)
    settings = {"norm": norm, "activation": "gelu", "backend": backend}
    layer, plain = (block(256, **settings).to(DEVICE) for block in (FusedResidual, Residual))
    plain.load_state_dict(layer.state_dict())
    x, dy = (torch.randn(1031, 256, device=DEVICE) for _ in range(2))
    results = []
    for module, enabled in ((layer, True), (plain, True), (double(plain), False)):
        leaf = x.to(module.linear.weight.dtype).detach().requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=enabled):
            y = module(leaf)
        y.backward(dy.to(y.dtype))
        grads = {"dx": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
        results.append({"y": y.detach(), **grads})
    ours, eager, _ = results
    assert {name: t.dtype for name, t in ours.items()} == {n: t.dtype for n, t in eager.items()}
    assert_as_accurate(*results, f"autocast, {norm}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", [True, False], ids=["backward outside", "backward inside"])
def test_backward_in_and_out_of_autocast(outside, backend):
    layer = FusedResidual(256, order="prenorm", activation="silu", backend=backend).to(DEVICE)
    x, dy = (torch.randn(515, 256, device=DEVICE) for _ in range(2))
    results = []
    for late in (outside, not outside):
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, BF16):
            y = layer(leaf)
            if not late:
                grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))
        if late:
            grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))
        results.append([y, *grads])
    assert_bitwise(*results)


COMPILED = {
    "note": {"activation": "gelu", "gate": "channel", "gate_init": 0.5},
    "prenorm": {"order": "prenorm", "activation": "silu"},
    "batch": {"norm": "batch", "activation": "tanh"},
}


def call_of(layer, x, dy, autocast):
    leaf = x.clone().requires_grad_()
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        y = layer(leaf)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))
    return [t.detach().clone() for t in (y, *grads)]


def compare_compiled(name, backend, autocast, sizes, **how):
    """Forward and backward, inductor: bitwise what the same layer does without it."""
    if backend == "cuda" and name == "batch":
        pytest.skip(NO_BATCH)
    torch._dynamo.reset()
    layer = FusedResidual(320, **COMPILED[name], backend=backend)
    own = layer.to(DEVICE, F32 if autocast else BF16)
    other = copy.deepcopy(own)
    fast = torch.compile(other, fullgraph=True, **how)
    for rows in sizes:
        x, dy = (torch.randn(rows, 320, device=DEVICE, dtype=BF16) for _ in range(2))
        x = x.to(own.linear.weight.dtype)
        torch.compiler.cudagraph_mark_step_begin()
        ours, plain = (call_of(layer, x, dy, autocast) for layer in (fast, own))
        assert_bitwise(ours, plain, f"{rows} rows")
    for a, b in zip(other.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(BF16).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_ordinary_call(name, autocast, backend):
    compare_compiled(name, backend, autocast, (515, 1031, 67))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_with_reduced_overhead_is_the_ordinary_call(name, backend):
    """Warm-up, capture and replays. torch refuses tensors that a call leaves in the graphs' memory:
    arrival counters must not be made there.
    """
    compare_compiled(name, backend, False, (515,) * 5, mode="reduce-overhead")


def make_stack(width, depth, block, order, dtype, **settings):
    settings = {"activation": "silu", "device": DEVICE, "dtype": dtype, **settings}
    return FusedResidualStack(width, depth, layers_per_block=block, order=order, **settings)


def chain_results(stack, x, dy, dtype=None):
    """y and the gradients of x and all parameters: of one call, or with a dtype by plain torch."""
    given = [p.detach() for p in (x, *stack.parameters())]
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in given]
    if dtype is None:
        names = [name for name, _ in stack.named_parameters()]
        named = dict(zip(names, leaves[1:], strict=True))
        y = torch.func.functional_call(stack, named, (leaves[0],))
    else:
        y = composite_chain(
            stack._text(x, stack._given()), len(stack), None, 1, leaves[0], tuple(leaves[1:])
        )
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return dict(enumerate([y.detach(), *grads]))


CHAINS = [
    (BF16, 64, 16, 1),
    (BF16, 128, 12, 2),
    (BF16, 256, 8, 4),
    (F16, 64, 32, 4),
    (F32, 64, 12, 2),
    (BF16, 320, 8, 2),  # a launch a layer
    (F32, 512, 6, 1),
]


@pytest.mark.parametrize(
    "order, recompute", [("note", False), ("prenorm", True), ("postnorm", True)]
)
@pytest.mark.parametrize("M", [50, 5000])
@pytest.mark.parametrize("dtype, width, depth, block", CHAINS)
def test_chains_as_accurate_as_eager(dtype, width, depth, block, M, order, recompute, nan_filled):
    stack = make_stack(width, depth, block, order, dtype, recompute=recompute)
    as_accurate_as_eager(stack, M, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "channel", "gate_init": 0.7},
        {"gate": "scalar", "gate_init": 0.7, "block": 2},
        {"norm": "rms"},
        {"norm": None, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [64, 128, 320])
def test_chains_with_gates_and_without_other_parameters(width, settings, nan_filled):
    settings = {"block": 1, "order": "note", **settings}
    as_accurate_as_eager(make_stack(width, 8, dtype=BF16, **settings), 300, BF16)


def as_accurate_as_eager(stack, M, dtype):
    x, dy = (torch.randn(M, stack.features, device=DEVICE).to(dtype) for _ in range(2))
    assert stack.why_not_joined(x) is None
    found = [chain_results(stack, x, dy, to) for to in (None, dtype, torch.float64)]
    # each over its size to the next power of two, which rounds nothing
    sizes = [2.0 ** t.square().mean().sqrt().log2().round() for t in found[-1].values()]
    found = [{i: (t / sizes[i]).to(t.dtype) for i, t in result.items()} for result in found]
    assert_as_accurate(*found, what=f"{stack}, {dtype}, {M} rows")


@pytest.mark.parametrize("width, M", [(64, 300), (128, 9000), (256, 256), (512, 700)])
def test_a_hundred_calls_of_a_chain_and_replays_of_its_graph_are_equal(width, M):
    stack = make_stack(width, 50, 1, "note", BF16)
    x = torch.randn(M, width, device=DEVICE, dtype=BF16, requires_grad=True)
    dy = torch.randn_like(x)
    inputs = [x, *stack.parameters()]

    def step():
        y = stack(x)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = [t.detach().clone() for t in step()]
    for _ in range(CALLS // 10):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(10):
        for t in captured:
            t.detach().zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


def names_in_a_step(stack, x):
    """Of what the GPU does in a step that is not the first one."""
    dy = torch.randn_like(x)
    stack(x).backward(dy)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for p in (x, *stack.parameters()):
        p.grad = None
    with torch.profiler.profile(activities=activities) as profile:
        stack(x).backward(dy)
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("depth", [10, 200])
def test_launches_of_a_chain_do_not_grow_with_depth(depth):
    stack = make_stack(64, depth, 1, "note", BF16)
    x = torch.randn(256, 64, device=DEVICE, dtype=BF16, requires_grad=True)
    names = names_in_a_step(stack, x)
    assert len([name for name in names if "residual_chain" in name]) == 3
    assert len([name for name in names if "Memcpy" not in name]) <= 8  # bmm may be two


def test_a_wide_chain_is_a_launch_a_layer_and_few_products():
    """That is forward; in backward at most two and the products of all weights."""
    depth, stack = 12, make_stack(512, 12, 1, "note", BF16)
    x = torch.randn(4096, 512, device=DEVICE, dtype=BF16, requires_grad=True)
    assert stack._way(x, stack._given()).loop == "triton"
    names = [name for name in names_in_a_step(stack, x) if "Mem" not in name]
    assert len([name for name in names if "residual_forward" in name]) == depth
    assert len(names) <= 3 * depth + 8


@pytest.mark.parametrize("width, order", [(64, "prenorm"), (512, "note")])
def test_a_compiled_chain_is_the_ordinary_call(width, order):
    stack = make_stack(width, 20, 2, order, BF16)
    x, dy = (torch.randn(300, width, device=DEVICE, dtype=BF16) for _ in range(2))
    found = []
    for module in (stack, torch.compile(stack, fullgraph=True)):
        y = module(x)
        found.append([y.detach(), *torch.autograd.grad(y, list(stack.parameters()), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("H", [1024, 339])
def test_gated_unit(dtype, H):
    """One launch forward and one backward, of halves and of two tensors."""
    from fusedres.glu import composite_glu, gated, glu

    torch.manual_seed(0)
    z = torch.randn(4096, 2 * H, device=DEVICE, dtype=dtype, requires_grad=True)
    dh = torch.randn(4096, H, device=DEVICE, dtype=dtype)
    exact_z = z.detach().double().requires_grad_()
    exact = composite_glu("silu", False, exact_z)
    (exact_dz,) = torch.autograd.grad(exact, exact_z, dh.double())
    plain = composite_glu("silu", False, z)
    (plain_dz,) = torch.autograd.grad(plain, z, dh)
    for unit in (lambda: glu(z, "silu"), lambda: gated(*z.chunk(2, dim=-1), "silu")):
        h = unit()
        assert "GLUFunction" in type(h.grad_fn.next_functions[0][0]).__name__ + str(h.grad_fn)
        (dz,) = torch.autograd.grad(h, z, dh)
        for ours, theirs, true in ((h, plain, exact), (dz, plain_dz, exact_dz)):
            error = (ours.double() - true).square().mean().sqrt()
            assert error <= 1.1 * (theirs.double() - true).square().mean().sqrt()
