"""The sm_80 kernels' numbers, on an emulated GPU (cuda_on_cpu): every launch is checked against the
formula in float64 by the rule of oracle.py, and for what it touches. Nothing here needs a GPU.
"""

import random
from dataclasses import replace

import pytest
import torch

import cuda_on_cpu
from cases import ALIASES, make_case
from cuda_on_cpu.layers import Call, Settings, emulated, same_bytes
from cuda_on_cpu.structs import BackwardOut
from fusedres.spec import ACTIVATIONS, STAGES
from oracle import assert_by_size, eager, exact, without_kinks

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
TILES = ((64, 128), (32, 128), (32, 64), (16, 128), (16, 64))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors as small as these, torch's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case, settings=None, rounded=False):
    """NUMERICS 1 for y and every gradient. `rounded`: compare gradients in the layer's dtype."""
    case = without_kinks(case)
    ours, plain, true = emulated(case, settings), eager(case), exact(case)
    if rounded:
        ours = {name: t.to(case.x.dtype) for name, t in ours.items()}
    assert_by_size(case, ours, plain, true, f"'{case.spec}', {case.x.dtype}, {settings}")


def check_same(a, b, what):
    assert a.keys() == b.keys()
    for name in a:
        assert same_bytes(a[name], b[name]), f"{what}: {name} differs"


# ---- recipes

EXTRAS = {
    "plain": {},
    "gate, dropout": {"gate": "channel", "dropout": 0.3},
    "scalar gate, drop-path": {"gate": "scalar", "drop_path": 0.4, "residual_scale": 0.5},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
@pytest.mark.parametrize("order", ALIASES)
def test_orders_and_norms(order, norm, extra):
    dtype = DTYPES[(ALIASES.index(order) + list(EXTRAS).index(extra)) % 3]
    settings = {"order": order, "norm": norm, "activation": "gelu", "dtype": dtype}
    case = make_case(
        37, 136, 200, lead=(37, 1), training=norm != "batch", **settings, **EXTRAS[extra]
    )
    check(case)


def shuffled_orders(count):
    draw = random.Random(0)
    for _ in range(count):
        stages = draw.sample([stage for stage in STAGES if stage != "linear"], draw.randint(0, 6))
        stages.insert(draw.randint(0, len(stages)), "linear")
        yield "-".join(stages)


@pytest.mark.parametrize("number, order", list(enumerate(shuffled_orders(60))))
def test_any_order(number, order):
    draw = random.Random(number)
    norm = draw.choice(["layer", "rms", "batch"])
    case = make_case(
        29,
        72,
        draw.choice([72, 150]),
        order=order,
        norm=norm,
        activation="silu",
        training=norm != "batch",
        gate=draw.choice(["scalar", "channel"]) if "gate" in order else None,
        dropout=0.2 if "dropout" in order else 0.0,
        drop_path=0.2 if "droppath" in order else 0.0,
        residual_scale=draw.choice([1.0, -0.5]),
        dtype=DTYPES[number % 3],
        affine=draw.random() < 0.8,
        bias=draw.random() < 0.8,
        norm_bias=draw.random() < 0.5,
    )
    check(case, Settings(block=draw.choice(TILES)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    check(make_case(64, 64, activation=activation, dtype=dtype))
    if dtype == F32:
        check(make_case(64, 64, order="preact", activation=activation))


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12, 1e36])
def test_sines_of_large_numbers(scale):
    check(make_case(32, 96, order="act-linear", activation="sin", scale=scale))


# ---- shapes

SHAPES = [  # M, K, N
    (1, 1, 1),
    (1, 339, 339),
    (5, 1, 70),
    (3, 70, 1),
    (33, 339, 466),
    (17, 466, 339),
    (64, 64, 64),
    (65, 65, 65),
    (63, 63, 63),
    (16, 128, 128),
    (15, 127, 129),
    (128, 32, 256),
    (31, 257, 131),
    (97, 61, 193),
    (2, 8, 1024),
    (8, 1000, 24),
    (200, 16, 40),
    (19, 37, 521),
]


@pytest.mark.parametrize("order", ["note", "prenorm", "postnorm", "preact"])
@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_shapes(number, shape, order):
    number += ("note", "prenorm", "postnorm", "preact").index(order)
    # eps: a row of one element has variance 0, and a gradient of nothing but rounding errors.
    case = make_case(
        *shape,
        order=order,
        activation="silu",
        dtype=DTYPES[number % 3],
        eps=0.1 if 1 in shape else 1e-5,
    )
    check(case)


TILED = ("note", "prenorm", "linear-act-add", "gate-act-norm-linear")


@pytest.mark.parametrize("block", TILES)
@pytest.mark.parametrize("order", TILED)
def test_every_tile(block, order):
    given = Settings(block=block, parts=(2, 3), shared_limit=227 << 10)
    m, n = block
    for number, shape in enumerate([(m + 1, 129, 2 * n), (m, n, n - 1), (2 * m - 1, 64, n + 8)]):
        dtype = DTYPES[(number + TILED.index(order)) % 3]
        check(make_case(*shape, order=order, activation="gelu", gate="channel", dtype=dtype), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (5, 3), (64, 64)])
def test_rows_in_parts(parts, dtype):
    case = make_case(
        333,
        66,
        71,
        order="norm-gate-linear-gate-act".replace("-gate", "", 1),
        gate="channel",
        activation="gelu",
        dtype=dtype,
    )
    check(case, Settings(parts=parts))


def test_sums_of_many_rows():
    """A long chain of additions would lose more than eager's tree."""
    settings = {"norm": "layer", "activation": "tanh", "gate": "channel"}
    for parts in ((1, 1), (0, 0), (8, 64)):
        check(make_case(2500, 16, 136, **settings), Settings(parts=parts, processors=64))


# ---- operands

RESIDUALS = {
    "another": {"residual": 90},
    "narrower": {"residual": 33, "pad": True},
    "none": {"order": "linear-norm-act"},
    "x, narrower": {"K": 57, "N": 90, "pad": True},
    "before linear": {"order": "norm-add-act-linear", "residual": 90},
    "x, before linear": {"order": "norm-add-act-linear"},
    "after a norm of both": {"order": "linear-add-norm-act", "residual": 90},
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals(name):
    for dtype in DTYPES:
        settings = {"K": 90, "activation": "silu", "residual_scale": 0.7, **RESIDUALS[name]}
        check(make_case(40, dtype=dtype, **settings))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("order", ["note", "prenorm", "bert-output"])
def test_scales(order, scale):
    for dtype in DTYPES if scale < 1e3 else (F32, BF16):
        check(make_case(40, 160, order=order, activation="tanh", scale=scale, dtype=dtype))


@pytest.mark.parametrize("order", ["note", "prenorm", "norm-act-linear"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_large_mean(order, norm):
    check(make_case(40, 300, order=order, norm=norm, activation="tanh", mean=1e3))
    if norm == "layer":  # the mean's own rounding is a tenth of sigma
        settings = {"activation": "tanh", "mean": 1e3, "scale": 1e-3, "eps": 1e-12}
        check(make_case(40, 129, order=order, **settings))


@pytest.mark.parametrize("order", ["note", "prenorm"])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_parameters_in_float32(order, dtype):
    case = make_case(40, 90, order=order, activation="silu", gate="channel", dtype=dtype)
    wide = {n: t.float() for n, t in case.tensors.items() if n.startswith("norm") or n == "gate"}
    # Eager would round them, and their gradients, to the layer's type.
    check(case.with_tensors(**wide), rounded=True)


def test_what_the_planner_refuses():
    cases = {
        "float64": make_case(8, 16, dtype=torch.float64),
        "rows of x do not fit": make_case(8, 20000, 16, order="prenorm"),
        "rows of z do not fit": make_case(8, 16, 20000),
    }
    for reason, case in cases.items():
        floats = {n: t.float() for n, t in case.tensors.items()}
        with Call(case.with_tensors(case.dy.float(), **floats)) as call:
            call.layer.dtype = 3 if case.x.dtype == torch.float64 else 0
            assert reason in call.refusal()
    with Call(cases["rows of z do not fit"]) as call:
        assert call.refusal(gradients=False) is None


def test_samples_of_several_rows():
    for order in ("note", "droppath-norm-linear-add"):
        check(make_case(lead=(7, 2, 3), K=90, order=order, activation="silu", drop_path=0.5))


def test_nothing_kept_and_everything_dropped():
    check(make_case(20, 90, dropout=1.0, activation="silu"))
    check(make_case(20, 90, drop_path=1.0, activation="silu"))


# ---- the same bytes, however it runs

RECIPES = {
    "note": {"order": "note", "dropout": 0.3},
    "prenorm": {"order": "prenorm", "gate": "scalar"},
    "postnorm": {"order": "postnorm", "dropout": 0.2},
    "before": {"order": "gate-norm-act-add-linear", "gate": "channel"},
    "after": {"order": "linear-gate-add-norm-act", "gate": "channel"},
}


def make_recipe(name, dtype, M=70, K=120, N=264):
    return make_case(M, K, N, activation="gelu", dtype=dtype, **RECIPES[name])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", RECIPES)
def test_no_order_of_threads_or_blocks_changes_a_bit(name, dtype):
    case, first = make_recipe(name, dtype), Settings(block=(16, 64), parts=(3, 2))
    expected = emulated(case, first)
    for seed in range(1, 5):
        again = replace(first, seed=seed, resident=seed)
        check_same(emulated(case, again), expected, f"seed {seed}")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", RECIPES)
def test_programs_that_take_several_tiles_change_no_bit(name, dtype):
    for block, K, N in (((16, 64), 264, 257), ((64, 128), 120, 264)):
        case = make_recipe(name, dtype, K=K, N=N)
        given = Settings(block=block, parts=(1, 1), shared_limit=227 << 10)
        expected = emulated(case, given)
        for groups in (1, 2, 3):
            got = emulated(case, replace(given, groups=groups, seed=groups))
            check_same(got, expected, f"{groups} programs a row block")


@pytest.mark.parametrize(
    "processors, M, programs",
    [(132, 64, 4 * 8), (132, 1024, 32 * 8), (132, 16384, 256 * 1), (8, 100, 2 * 4)],
)
def test_programs_take_several_tiles_once_the_device_is_full(processors, M, programs):
    """Row blocks of 16, 32, 64 and 64 rows; x has 8 tiles of columns."""
    case = make_case(8, 1024, 512, order="note", dtype=BF16)
    with Call(case, Settings(processors=processors, shared_limit=227 << 10)) as call:
        call.layer.M = M
        wanted = BackwardOut(dx=call.layer.x)
        assert call.plan("backward", wanted).programs == programs


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", RECIPES)
def test_strides_change_no_bit(name, dtype):
    for N in (264, 257):
        case = make_recipe(name, dtype, M=19, N=N)
        expected = emulated(case)
        for gap, shift in ((8, 0), (1, 0), (8, 1), (3, 3), (16, 8)):
            check_same(emulated(case, Settings(gap=gap, shift=shift)), expected, f"{gap}, {shift}")


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", ["note", "before"])
def test_rows_far_apart(name, dtype):
    """Offsets that do not fit into 32 bits."""
    case = make_case(5, 40, 72, activation="gelu", dtype=dtype, **RECIPES[name])
    check_same(emulated(case, Settings(gap=1 << 30)), emulated(case), "2^30 columns apart")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_asked_for_changes_nothing_else(name):
    case = make_recipe(name, F16, M=35)
    with Call(case) as call, Call(case, keep=False) as other:
        assert same_bytes(call.forward()[0], other.forward()[0])
    everything = emulated(case)
    for left_out in case.asked:
        asked = tuple(n for n in case.asked if n != left_out)
        got = emulated(case, asked=asked)
        check_same(got, {n: everything[n] for n in got}, f"without d{left_out}")
    for only in case.asked:
        got = emulated(case, asked=(only,))
        check_same(got, {n: everything[n] for n in got}, f"d{only} alone")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(name, dtype, bad):
    """Where the formula has a NaN or an Inf there is one; rows that have none are as they were.

    Not where eager has one: in 16 bits a CPU's library may spread it to the row before, as AMX's
    does where K is no multiple of 32.
    """
    case = make_recipe(name, dtype, M=35)
    x, dy = case.x.clone(), case.dy.clone()
    x[3, 5], dy[20, 7] = bad, bad
    spoilt = case.with_tensors(dy=dy, x=x)
    asked = tuple(n for n in ("x", "residual") if n in case.tensors)
    ours, plain = emulated(spoilt, asked=asked), exact(spoilt, asked)
    clean = emulated(case, asked=asked)
    rows = torch.ones(35, dtype=torch.bool)
    rows[[3, 20]] = False
    for name, t in ours.items():
        assert same_bytes(t[rows], clean[name][rows]), name
        assert torch.equal(t.isfinite(), plain[name].isfinite()), name
    assert torch.equal(ours["y"].isnan(), plain["y"].isnan())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("order", ["note", "prenorm", "bert-output"])
def test_a_variance_that_overflows(order, norm, dtype):
    """FIDELITY 10: NaN of layer norm (of torch's by the width), 0 of the others."""
    settings = {"order": order, "norm": norm, "activation": None, "dtype": dtype, "pad": True}
    for N in (72, 264):
        clean = make_case(9, 72, N, residual=N, training=norm != "batch", **settings)
        tensors = {name: clean.tensors[name].clone() for name in ("x", "residual")}
        for t in tensors.values():
            t[2] *= 1e20
            t[3] = 0
            t[3, 5] = 1e20
        case = clean.with_tensors(**tensors)
        ours, plain = (f(case, asked=("x", "residual")) for f in (emulated, eager))
        if norm == "layer":
            assert ours["y"][2:4].isnan().all() and ours["dx"][2:4].isnan().all()
        else:
            for name, t in ours.items():
                assert torch.equal(t.isnan(), plain[name].isnan()), name
                torch.testing.assert_close(t[2:4], plain[name][2:4], rtol=0.1, atol=0.1)
        expected, others = emulated(clean, asked=("x", "residual")), [0, 1, *range(4, 9)]
        check_same(
            {n: t[others] for n, t in ours.items()},
            {n: t[others] for n, t in expected.items()},
            norm,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_no_races(name, dtype):
    """Every access to memory is watched: see cuda_on_cpu/races.h and visits.h."""
    for block, groups, parts, K in (((16, 64), 1, (2, 2), 72), ((64, 128), 0, (1, 1), 136)):
        case = make_recipe(name, dtype, M=block[0] + 1, K=K, N=136)  # at K = 136 x is the residual
        given = Settings(0, 3, 4, 227 << 10, block, groups, parts, watched=True)
        emulated(case, given)
