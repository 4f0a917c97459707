"""NUMERICS 2 and 3: any shape, any layout; nothing unwritten, nothing read or written outside."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import make_case
from oracle import assert_close, eager, exact, fused

ROOT = Path(__file__).parents[2]
ROWS = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
FEATURES = (
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    255,
    257,
    339,
    466,
)
ORDERS = ("note", "preact", "postnorm", "linear-act-add", "resnet-v1", "prenorm", "linear-act")
NORMS = ("layer", "rms", "batch", None)


def shapes():
    """Every row count with every kind of width, K != N more often than not, and a few long ones."""
    for i, (M, K) in enumerate(itertools.product(ROWS, FEATURES[::2])):
        yield M, K, FEATURES[(7 * i + 3) % len(FEATURES)]
    for M, K in itertools.product((1, 33), FEATURES[1::2]):
        yield M, K, K
    yield from [
        (3, 16384, 5),
        (2, 7, 16384),
        (1, 4096, 1023),
        (1025, 3, 2),
        (4099, 17, 1),
        (5, 1024, 1537),
    ]


SHAPES = sorted(set(shapes()))


def small(M, K, N, index, **settings):
    """With eps = 1 a norm of one or two nearly equal numbers does not amplify rounding errors."""
    order, norm = ORDERS[index % len(ORDERS)], NORMS[index % len(NORMS)]
    if norm == "batch" and M < 2:
        norm = "layer"
    defaults = {
        "order": order,
        "norm": norm,
        "activation": ("gelu", "silu", "tanh")[index % 3],
        "eps": 1.0,
    }
    return make_case(M, K, N, **{**defaults, **settings})


def check(case):
    terms = case.x.shape[-1] + case.dy.shape[-1] + math.prod(case.dy.shape[:-1])
    assert_close(
        fused(case), eager(case), exact(case), terms, f"'{case.spec}' {tuple(case.x.shape)}"
    )


def test_there_are_enough_shapes():
    assert len(SHAPES) >= 200
    assert {339, 466, 16384} <= {K for _, K, _ in SHAPES} | {N for _, _, N in SHAPES}
    assert sum(K != N for _, K, N in SHAPES) >= 200 and any(M == 0 for M, _, _ in SHAPES)


@pytest.mark.parametrize("M", sorted({M for M, _, _ in SHAPES}))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_shape(M, dtype):
    for index, (_, K, N) in enumerate(shape for shape in SHAPES if shape[0] == M):
        check(small(M, K, N, index, dtype=dtype))


@pytest.mark.parametrize("order", ["note", "preact", "bert-output"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 5), (1, 1), (4, 0, 2), (0,)], ids=str)
def test_leading_dimensions(lead, order):
    for K, N in ((8, 8), (5, 12)):
        case = make_case(lead=lead, K=K, N=N, order=order, activation="gelu", eps=1.0)
        result = fused(case)
        assert result["y"].shape == (*lead, N) and result["dx"].shape == (*lead, K)
        assert result["y"].is_contiguous()
        given = {name: case.tensors[name] for name in ("x", "residual") if name in case.tensors}
        flat = {name: t.reshape(-1, t.shape[-1]) for name, t in given.items()}
        rows = fused(case.with_tensors(dy=case.dy.reshape(-1, N), **flat))
        for name in result:
            assert torch.equal(result[name].flatten(), rows[name].flatten()), name


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_row(t):
    return t.new_full((2 * t.shape[0], *t.shape[1:]), math.nan)[::2].copy_(t)


def every_third_column(t):
    return t.new_full((*t.shape[:-1], 3 * t.shape[-1]), math.nan)[..., 1::3].copy_(t)


def within_wider_rows(t):
    return t.new_full((*t.shape[:-1], t.shape[-1] + 5), math.nan)[..., 2:-3].copy_(t)


def at_an_odd_offset(t):
    return t.new_full((t.numel() + 3,), math.nan)[3:].view(t.shape).copy_(t)


def expanded_rows(t):
    return t[:1].expand(t.shape)


def expanded_columns(t):
    return t[..., :1].expand(t.shape)


LAYOUTS = (
    transposed,
    every_other_row,
    every_third_column,
    within_wider_rows,
    at_an_odd_offset,
    expanded_rows,
    expanded_columns,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", ["note", "resnet-v1", "preact", "prenorm", "postnorm", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strided_operand_gives_bitwise_what_its_copy_gives(layout, order, dtype, native):
    """NaN stands beside every element of a slice: reading it would show."""
    for norm, residual in (("layer", 48), ("batch", 48), (None, None), ("rms", None)):
        case = make_case(
            33,
            48,
            order=order,
            norm=norm,
            activation="gelu",
            dtype=dtype,
            gate="channel",
            residual=None if order == "linear" else residual,
        )
        operands = {"dy": case.dy, **case.tensors}
        operands = {name: t for name, t in operands.items() if t.dim() == 2}
        every_one = []
        for name, t in operands.items():
            strided = layout(t)
            assert strided.stride() != t.stride() or strided.storage_offset()
            every_one.append((name, strided))
            ours = fused(case.with_tensors(**{name: strided}), native)
            copied = fused(case.with_tensors(**{name: strided.contiguous()}), native)
            for output in copied:
                assert torch.equal(ours[output], copied[output]), (
                    f"{output} of a {layout.__name__} {name}"
                )
        ours = fused(case.with_tensors(**dict(every_one)), native)
        copied = fused(case.with_tensors(**{name: t.contiguous() for name, t in every_one}), native)
        assert all(torch.equal(ours[output], copied[output]) for output in copied)


@pytest.mark.parametrize(
    "name", ["bias", "norm_weight", "norm_bias", "gate", "running_mean", "running_var"]
)
def test_a_strided_vector_gives_bitwise_what_its_copy_gives(name, native):
    for training in (True, False):
        case = make_case(33, 48, norm="batch", gate="channel", activation="gelu", training=training)
        for layout in (every_third_column, at_an_odd_offset, expanded_columns):
            strided = layout(case.tensors[name])
            ours = fused(case.with_tensors(**{name: strided}), native)
            copied = fused(case.with_tensors(**{name: strided.contiguous()}), native)
            assert all(torch.equal(ours[output], copied[output]) for output in copied)


@pytest.fixture
def nan_filled():
    """torch.empty is filled with NaN, so that an element nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("M", [0, 1, 5, 33, 128])
def test_nothing_is_left_unwritten(M, nan_filled):
    assert torch.empty(3).isnan().all()
    for index, (K, N) in enumerate(
        [(1, 1), (3, 2), (16, 17), (65, 64), (129, 31), (339, 339)] * len(ORDERS)
    ):
        case = small(M, K, N, index, gate="channel", dropout=0.2)
        for name, t in fused(case).items():
            assert t.isfinite().all(), f"{name} of '{case.spec}' at {(M, K, N)}"


OVERRUN = """
import ctypes, torch
block = torch.empty(10)
ctypes.memset(block.data_ptr(), 7, 41)  # one byte too many
del block
"""

CALLS = """
import sys, torch
sys.path[:0] = ["tests", "tests/way"]
from oracle import fused
from test_shapes import SHAPES, small
for index, (M, K, N) in enumerate(SHAPES[::9]):
    for dtype in (torch.float32, torch.bfloat16):
        case = small(M, K, N, index, gate="channel", dtype=dtype)
        for name, t in fused(case).items():
            assert t.isfinite().all(), (name, str(case.spec), M, K, N)
print("done")
"""


def test_nothing_is_written_outside(native):
    """glibc's checking malloc puts a canary behind every block and looks when it is freed."""
    library = "libc_malloc_debug.so.0"
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "MALLOC_CHECK_": "3",
        "MALLOC_PERTURB_": "165",
    }

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    if run(OVERRUN).returncode != -6:
        pytest.skip("this C library has no checking malloc (glibc's libc_malloc_debug)")
    result = run(CALLS)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr[-2000:]
