"""NUMERICS 6 to 8: the same call gives the same bytes, NaN and Inf stay where they belong, inputs
stay as they are.
"""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import ALIASES, make_case
from fusedres import ACTIVATIONS, NORMS, fused_residual
from oracle import exact, fused
from test_shapes import LAYOUTS

ROOT = Path(__file__).parents[2]
ROW_NORMS = (None, "layer", "rms")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def large_cases():
    """Enough rows and columns that the work is split among threads in every direction."""
    for index, order in enumerate(ALIASES):
        for norm in ("layer", "batch"):
            yield make_case(
                300,
                339,
                466 if index % 2 else 60,
                order=order,
                norm=norm,
                activation="gelu",
                gate="scalar",
                dropout=0.1,
                drop_path=0.1,
                dtype=DTYPES[index % 4],
            )


def digests():
    """One hash for each result of every large case."""
    return [
        hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for case in large_cases()
        for _, t in sorted(fused(case).items())
    ]


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_call_twice_is_bitwise_the_same(threads):
    for count in (1, 2):
        threads(count)
        assert digests() == digests()


def test_any_number_of_threads_gives_the_same_bytes(threads, native):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(digests())
    assert results[0] == results[1] == results[2]


def test_another_process_gives_the_same_bytes():
    code = "import sys; sys.path[:0] = ['tests', 'tests/way']; "
    code += "from test_determinism import digests; print(*digests())"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["MKL_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == digests()


def assert_same_specials(ours, plain, what):
    """NaN, +Inf and -Inf in the same places as in torch's float64; finite elsewhere.

    Not as in torch's own float32: there gelu(inf) is NaN by oneDNN and inf elsewhere.
    """
    for name in plain:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[name]), kind(plain[name])), (
                f"{kind.__name__} of {name}, {what}"
            )


def poisoned(case, name, row, column, value):
    t = case.tensors[name].clone()
    t[row, column] = value
    return case.with_tensors(**{name: t})


@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_or_inf_in_a_row_stays_in_that_row(order, dtype, value):
    for norm in ROW_NORMS:
        for activation in ("relu", "gelu", "silu", "tanh", None):
            case = make_case(
                21, 19, order=order, norm=norm, activation=activation, dtype=dtype, residual=19
            )
            for name in ("x", "residual"):
                bad = poisoned(case, name, 13, 7, value)
                clean, ours, true = fused(case), fused(bad), exact(bad)
                what = f"{value} in {name} of '{case.spec}'"
                assert_same_specials({"y": ours["y"]}, {"y": true["y"]}, what)
                assert ours["y"][13].isnan().any() or not math.isnan(value), what
                for output in ("y", "dx", "dresidual"):
                    others = torch.arange(21) != 13
                    assert torch.equal(ours[output][others], clean[output][others]), (
                        f"{output}, {what}"
                    )


@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_a_nan_reaches_every_gradient_that_it_reaches_in_torch(order, norm):
    for activation in ("gelu", "tanh"):
        case = make_case(21, 19, order=order, norm=norm, activation=activation, residual=19)
        for name in ("x", "weight", "residual"):
            bad = poisoned(case, name, 13, 7, math.nan)
            assert_same_specials(fused(bad), exact(bad), f"NaN in {name} of '{case.spec}'")
        dy = case.dy.clone()
        dy[13, 7] = math.nan
        bad = case.with_tensors(dy=dy)
        assert_same_specials(fused(bad), exact(bad), f"NaN in dy of '{case.spec}'")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_nan_inf_and_huge_values_are_those_of_torch(activation, dtype):
    """x = 0, so z is the bias: every special value, in every lane of a vector."""
    big = torch.finfo(dtype).max ** 0.5 / 4
    special = [math.nan, math.inf, -math.inf, big, -big, 200.0, -200.0, 30.0, -30.0, 1e-4, -1e-4]
    for shift in range(8):
        bias = torch.tensor([0.5] * shift + special, dtype=dtype)
        case = make_case(
            3, 4, len(bias), order="linear-act", norm=None, activation=activation, dtype=dtype
        )
        case = case.with_tensors(x=torch.zeros_like(case.x), bias=bias)
        ours, true = fused(case), exact(case)
        assert_same_specials({"y": ours["y"]}, {"y": true["y"].to(dtype)}, activation)
        assert ours["y"][:, shift].isnan().all(), "NaN comes through"
        finite = true["dbias"].to(dtype).isfinite()
        finite[shift : shift + 3] = False  # a derivative at NaN and Inf is whatever it is
        assert ours["dbias"][finite].isfinite().all(), (
            "no overflow on the way to a finite derivative"
        )
        keep, info = true["y"].isfinite(), torch.finfo(dtype)
        error = (ours["y"].double() - true["y"])[keep].abs()
        assert (error <= 4 * info.eps * true["y"][keep].abs() + info.tiny).all(), "4 ulp everywhere"


def inside(layout, t):
    """`t` in a larger buffer, and the buffer."""
    view = layout(t)
    buffer = view
    while buffer._base is not None:
        buffer = buffer._base
    return view, buffer


@pytest.mark.parametrize("order", [*ALIASES, "gate-linear-norm-act-add-dropout"])
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inputs_keep_their_bytes_and_their_versions(order, norm, training):
    """Also the bytes around them. Only running statistics may change, and only in training."""
    for index, layout in enumerate(LAYOUTS):
        case = make_case(
            9,
            13,
            order=order,
            norm=norm,
            activation="silu",
            gate="channel",
            dropout=0.1,
            residual=13,
            training=training,
            dtype=DTYPES[index % 4],
        )
        operands, buffers = {}, {}
        for name, t in {**case.tensors, "dy": case.dy}.items():
            operands[name], buffers[name] = inside(layout, t) if t.dim() == 2 else (t, t)
        before = {name: (t.clone(), t._version) for name, t in buffers.items()}
        changes = ("running_mean", "running_var") if case.spec.batch_stats else ()
        leaves = {
            name: t.requires_grad_(name in case.asked)
            for name, t in operands.items()
            if name != "dy"
        }
        settings = {name: value for name, value in case.settings.items() if name != "gate"}
        y = fused_residual(**leaves, **settings)
        kept, version = y.detach().clone(), y._version
        torch.autograd.grad(y, [leaves[name] for name in case.asked], operands["dy"])
        assert torch.equal(y, kept) and y._version == version, "backward leaves y alone"
        for name, t in buffers.items():
            old, version = before[name]
            same = torch.equal(t.detach().view(torch.uint8), old.view(torch.uint8))
            assert same != (name in changes), f"{name} in {layout.__name__}"
            assert t._version == version or name in changes, f"version of {name}"
