"""The numbers of the Hopper kernel, on an emulated GPU (cuda_on_cpu): all of it but the
instructions of TMA and the tensor cores. Nothing here needs a GPU.
"""

import ctypes
import re
from functools import cache

import pytest
import torch

import cuda_on_cpu
from cases import make_case
from cuda_on_cpu import HERE, ROOT
from cuda_on_cpu.layers import Call, Settings, same_bytes
from oracle import assert_as_accurate, eager, exact, without_kinks

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

F16, BF16 = torch.float16, torch.bfloat16
RECIPES = [
    ("linear-act-add", None),
    ("note", "layer"),
    ("postnorm", "rms"),
    ("note", "batch"),
    ("prenorm", "layer"),
    ("prenorm", "rms"),
]


@cache
def hopper() -> ctypes.CDLL:
    return load("hopper", ROOT / "csrc" / "cuda" / "forward_sm90.cu")


def load(name, *sources) -> ctypes.CDLL:
    library = cuda_on_cpu.load(name, HERE / "launchers_sm90.cpp", *sources)
    library.refusal.restype = library.forward.restype = ctypes.c_char_p
    return library


def settings(columns=256, processors=4, **given) -> Settings:
    """All programs are resident, and no fewer than a row has tiles: they wait for each other."""
    return Settings(
        block=(128, columns),
        processors=processors,
        resident=processors,
        shared_limit=227 << 10,
        **given,
    )


def check(case, given=None):
    """y by the rule of oracle.py; the statistics against those of what the norm saw."""
    case, spec = without_kinks(case), case.spec
    y, z, stats = forward(case, given)
    results = ({"y": y.view(case.dy.shape)}, eager(case, ()), exact(case, ()))
    assert_as_accurate(*results, f"'{spec}', {case.x.dtype}, {given}")
    before = spec.prologue == ("norm",)
    if stats is not None and (before or spec.epilogue[0] == "norm"):
        t = (case.x.flatten(0, -2) if before else z).double()
        mean = t.mean(1) if spec.norm == "layer" else torch.zeros(len(t)).double()
        rstd = ((t - mean[:, None]).square().mean(1) + spec.eps).rsqrt()
        # Rounding of fp32 sums of a few thousand terms about the mean of some of them.
        scale = 1e-5 * t.abs().max().item()
        torch.testing.assert_close(stats[0].double(), mean, rtol=0, atol=scale)
        torch.testing.assert_close(stats[1].double(), rstd, rtol=1e-4, atol=0)


def forward(case, given=None) -> list[torch.Tensor | None]:
    """y, z and the statistics, which outlive the call's memory."""
    with Call(case, given or settings(), library=hopper()) as call:
        assert call.refusal() is None
        return [None if t is None else t.clone() for t in call.forward()]


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("number, recipe", list(enumerate(RECIPES)))
def test_recipes(number, recipe, columns):
    order, norm = recipe
    dtype = (F16, BF16)[(number + columns // 256) % 2]
    case = make_case(
        150, 200, 312, order=order, norm=norm, activation="gelu", dtype=dtype, training=False
    )
    check(case, settings(columns))


@pytest.mark.parametrize("order", ["linear-norm-act-gate-dropout-droppath-add", "bert-output"])
def test_everything_on(order):
    case = make_case(
        130,
        72,
        272,
        order=order,
        norm="layer",
        activation="silu",
        dtype=BF16,
        dropout=0.3,
        drop_path=0.3 if "path" in order else 0.0,
        gate="channel" if "gate" in order else None,
        residual_scale=0.5,
    )
    check(case)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("order", ["note", "prenorm", "bert-output"])
def test_a_variance_that_overflows(order, norm):
    """FIDELITY 10: NaN of layer norm, 0 of the other."""
    for N in (256, 272):
        case = make_case(
            130, 72, N, order=order, norm=norm, activation=None, dtype=BF16, residual=N
        )
        x, residual = case.x.clone(), case.tensors["residual"].clone()
        for t in (x, residual):
            t[2] *= 1e20
            t[3] = 0
            t[3, 5] = 1e20
        y, _, _ = forward(case.with_tensors(x=x, residual=residual))
        rows = torch.zeros(130, dtype=torch.bool)
        rows[2:4] = norm == "layer"
        assert torch.equal(y.isnan(), rows[:, None].expand_as(y))
        others = [0, 1, *range(4, 130)]
        assert same_bytes(y[others], forward(case)[0][others])


def test_norm_after_other_stages_and_sines():
    check(
        make_case(
            140,
            64,
            300,
            order="linear-act-gate-add-norm-dropout",
            norm="layer",
            gate="scalar",
            activation="sin",
            dtype=F16,
            dropout=0.1,
        ),
        settings(128),
    )


SHAPES = [  # M, K, N
    (1, 8, 1),
    (127, 64, 255),
    (129, 72, 257),
    (128, 520, 129),
    (257, 136, 339),
    (3, 200, 130),
]


@pytest.mark.parametrize("order", ["note", "prenorm"])
@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_shapes(number, shape, order):
    # eps: a row of one element has variance 0.
    case = make_case(
        *shape,
        order=order,
        activation="silu",
        dtype=(F16, BF16)[number % 2],
        eps=1e-5 if min(shape) > 1 else 0.1,
        bias=number % 3 > 0,
        affine=number % 4 > 0,
    )
    check(case, settings((128, 256)[(number + (order == "note")) % 2], processors=3))


def test_strides_and_a_narrow_residual():
    """Rows apart by a multiple of 16 bytes, as TMA takes them."""
    case = make_case(140, 72, 264, order="note", dtype=F16, residual=100, pad=True)
    check(case, settings(gap=8))


@pytest.mark.parametrize("mean", [30.0, 1000.0])
def test_a_large_mean_before_linear(mean):
    check(make_case(64, 512, 128, order="prenorm", dtype=F16, mean=mean), settings(128))


@pytest.mark.parametrize("place", [0, 700])
def test_an_outlier_before_linear(place):
    case = make_case(40, 1024, 128, order="prenorm", dtype=F16)
    case.x[:, place] = 200.0
    check(case, settings(128))


def test_a_row_of_more_tiles_than_programs_is_an_error():
    case = make_case(8, 64, 400, dtype=F16)
    told = pytest.raises(AssertionError, match="more tiles in a row block than programs")
    with Call(case, settings(128, 3), library=hopper()) as call, told:
        call.forward()


@pytest.mark.parametrize("order", ["note", "prenorm"])
def test_the_schedule_does_not_show(order):
    """Bitwise the same by any order of threads, by any number of blocks, kept or not."""
    case = make_case(260, 136, 400, order=order, activation="gelu", dtype=BF16)
    results = []
    for given, keep in (
        (settings(128), True),
        (settings(128, seed=1), False),
        (settings(128, 5, seed=2), True),
        (settings(128, 7, seed=3), False),
    ):
        with Call(case, given, keep=keep, library=hopper()) as call:
            results.append(call.forward()[0].clone())
    assert all(same_bytes(results[0], other) for other in results[1:])


@pytest.mark.parametrize("order", ["note", "prenorm"])
def test_nan_stays_in_its_row(order):
    case = make_case(130, 64, 300, order=order, dtype=BF16)
    case.x[129, 5] = float("nan")
    case.x[7, 63] = float("inf")
    with Call(case, settings(), library=hopper()) as call:
        y, _, _ = call.forward()
        sick = y.isnan().any(1) | y.isinf().any(1)
    assert sick.nonzero().flatten().tolist() == [7, 129]


@pytest.mark.parametrize(
    "order, dtype, K, reason",
    [
        ("note", torch.float32, 64, "float16"),
        ("note", F16, 60, "16 bytes"),
        ("preact", F16, 64, "norm over rows alone"),
    ],
)
def test_refusals(order, dtype, K, reason):
    with Call(make_case(8, K, 64, order=order, dtype=dtype), settings(), library=hopper()) as call:
        assert reason in call.refusal()


# What stands in roles_sm90.h and what there instead: each must show in what forward gives. Where a
# wait is left out, those who are waited for are late. pass_by: wait_for_blocks without waiting.
PASS_BY = """
namespace fusedres::cuda::sm90 {
inline void pass_by(int32_t* counters, int count) {
  if (arrive(counters + 1) == count - 1) counters[0] = counters[1] = 0;
}
}  // namespace fusedres::cuda::sm90
"""
STALL = "for (int i = 0; i < 3000; ++i) emulator::maybe_yield();\n"
MISTAKES = {
    "tiles are swizzled": [("(chunk ^ (row & 7))", "(chunk ^ (row & 3))")],
    "tails of K are not surveyed": [("whole = left >= kBlockK / kStrip;", "whole = true;")],
    "g is summed up as rounded": [("total += sum(g);", "total += sum(weight);")],
    "all threads have stored": [
        ("    sync_warps(kFinishWarps);  // the stores", "    //"),
        (
            "    make_y(tile, whole);",
            f"if (!whole && thread > 31 && blockIdx.x == 0) {STALL} make_y(tile, whole);",
        ),
    ],
    "all tiles of a row are awaited": [
        ("wait_for_blocks(arrived, call", "pass_by(arrived, call"),
        (
            "    make_y(tile, whole);",
            f"if (!whole && blockIdx.x == 0) {STALL} make_y(tile, whole);",
        ),
    ],
    "all blocks meet": [
        ("wait_for_blocks(call.out.arrived, gridDim.x);", "pass_by(call.out.arrived, gridDim.x);"),
        ("  const Weights<T> to", f"if (blockIdx.x == 1) {STALL} const Weights<T> to"),
    ],
}


def mistaken(number, changes) -> str:
    """The kernel with a mistake, all in one text and in a namespace of its own."""
    cuda = ROOT / "csrc" / "cuda"
    roles = (cuda / "roles_sm90.h").read_text()
    for old, new in changes:
        assert old in roles
        roles = roles.replace(old, new, 1)
    parts = [path.read_text() for path in (cuda / "schedule.h", HERE / "hopper_on_cpu.h")]
    text = "".join([*parts, PASS_BY, roles, (cuda / "forward_sm90.cu").read_text()])
    text = re.sub(r'#pragma once|#include "cuda/(schedule|hopper|roles_sm90)\.h"', "", text)
    text = text.replace("residual_forward_sm90(", f"forward_{number}(")
    return f"""#define sm90 sm90_{number}
{text}
#undef sm90
extern "C" const char* mistaken_{number}(const fusedres::cuda::Layer& layer,
    const fusedres::cuda::ForwardOut& out, const fusedres::cuda::Tile& tile) {{
  return fusedres::cuda::forward_{number}(layer, out, tile, nullptr);
}}
"""


class Mistaken:
    """A library whose `forward` is one of the mistaken kernels."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self.library, self.forward = library, getattr(library, f"mistaken_{number}")
        self.forward.restype = ctypes.c_char_p

    def __getattr__(self, name):
        return getattr(self.library, name)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    source = tmp_path_factory.mktemp("mistakes") / "mistakes.cpp"
    source.write_text("".join(map(mistaken, range(len(MISTAKES)), MISTAKES.values())))
    return load("mistakes", source, ROOT / "csrc" / "cuda" / "forward_sm90.cu")


@pytest.mark.slow
@pytest.mark.parametrize("number, name", list(enumerate(MISTAKES)))
def test_a_mistake_shows(number, name, mistakes):
    def results(case, library, seed):
        with Call(case, settings(128, 8, seed=seed), library=library) as call:
            return [t.clone() for t in call.forward() if t is not None]

    def shows(order, seed):
        case = make_case(200, 136, 400, order=order, dtype=F16, mean=30.0)
        right = results(case, mistakes, 0)
        try:
            return not all(map(same_bytes, right, results(case, Mistaken(mistakes, number), seed)))
        except AssertionError:
            return True  # the launch fails, or leaves its counters or memory amiss

    assert any(shows(order, seed) for seed in range(2) for order in ("note", "prenorm")), name
