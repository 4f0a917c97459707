"""The Triton backend's numbers: by the interpreter on CPU tensors, and by the same tests on a GPU.

TRITON_INTERPRET=1 counts only if it is set before Triton is imported: test_triton_interpreter.py
runs this file that way. The interpreter computes bf16 wrongly, so bf16 is left to GPUs.
"""

import random
import re
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fusedres import FusedResidual, ops
from fusedres.backends import native, vendor
from fusedres.backends import plan as planner
from fusedres.backends import triton as backend
from fusedres.kernels import by_tanh, epilogue, products
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import ACTIVATIONS, ORDERS
from oracle import assert_close, eager, exact, make_case
from triton_run import (
    BF16,
    DEVICE,
    DTYPES,
    EPS,
    F16,
    F32,
    FAMILIES,
    INTERPRET,
    MARKS,
    NAMES,
    _clean,  # noqa: F401
    bitwise,
    call,
    check,
    force,
    forget,
    make,
    make_family,
    orders,
    ours,
)

pytestmark = MARKS
NORMS = (None, "layer", "rms", "batch")
FORWARD_ORDER = tuple(FAMILIES)


# Accuracy: NUMERICS 1.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_as_accurate_as_eager(family, activation, dtype, monkeypatch):
    if family == "algebraic" and dtype == F32:
        pytest.skip("16-bit types only")
    if family.startswith("prologue") and activation is None:
        pytest.skip("a norm alone is algebraic")
    check(make_family(family, monkeypatch, 96, 130, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_relu(norm, dtype):
    if dtype == BF16:
        pytest.skip("in bf16 more than 0.5 % of all elements lie near the kink")
    check(make(96, 130, norm=norm, activation="relu", dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_with_everything_on(order, norm, dtype):
    settings = {"gate": "channel", "dropout": 0.25, "drop_path": 0.125, "residual_scale": 0.5}
    check(make(64, 96, order=order, norm=norm, activation="gelu", dtype=dtype, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"N": 200, "pad": True},
        {"N": 70, "residual": 70},
        {"N": 70, "residual": 33, "pad": True},
        {"order": "linear-norm-act", "N": 70},
        {"order": "linear", "N": 200},
        {"order": "linear-add"},
        {"order": "linear-norm", "N": 33},
        {"order": "prenorm", "N": 70},
        {"order": "preact", "N": 70, "residual": 33, "pad": True},
        {"bias": False, "affine": False},
        {"bias": False, "affine": False, "order": "prenorm"},
        {"gate": "scalar"},
    ],
    ids=str,
)
def test_shortcuts_and_missing_stages(settings, norm, dtype):
    check(make(64, 96, norm=norm, activation="gelu", residual_scale=0.5, dtype=dtype, **settings))


@pytest.mark.parametrize("i, order", enumerate(orders(random.Random(5), 60)))
def test_any_permutation_of_the_stages(i, order, monkeypatch):
    force(monkeypatch, WIDEST_ROW=(0, 256)[i % 2], TALLEST_COLUMN=(0, 512)[i // 2 % 2])
    settings = {"gate": ("channel", None)[i % 2], "dropout": 0.25 * (i % 2)}
    settings |= {
        "drop_path": 0.125,
        "training": i % 5 != 0,
        "norm": ("layer", "rms", "batch")[i % 3],
    }
    N = (64, 48)[i // 3 % 2]
    check(make(64, 64, N, order=order, activation="tanh", dtype=DTYPES[i % 2], **settings))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    check(make(64, 130, activation=name, residual_scale=-2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale, mean", [(1e-3, 0.0), (1.0, 0.0), (1e3, 0.0), (1.0, 1e3)])
def test_scales(family, scale, mean, dtype, monkeypatch):
    if (dtype == F16 and scale != 1.0) or (family == "algebraic") != (dtype != F32):
        pytest.skip("sums of fp16 leave its range" if dtype == F16 else "16-bit types only")
    # Without a norm few pre-activations of sigma 1e3 lie where gelu bends: too few for an RMS.
    given = FAMILIES[family][0]
    normed = given.get("norm", "layer") and "order" not in given and family != "tile, given"
    activation = "gelu" if normed else None
    settings = {"scale": scale, "mean": mean, "activation": activation, "dtype": dtype}
    case = make_family(family, monkeypatch, 64, 128, **settings)
    asked = case.asked
    if INTERPRET and family == "tile, given":
        asked = asked[1:]  # a CPU's addmm rounds dx at every step at the size of what it adds to
    check(case, asked)


@pytest.mark.parametrize("family", ["rows", "rows, rms", "wide", "wide, rms", "prologue"])
def test_rows_past_the_end_of_a_block_do_not_disturb_sums_when_eps_is_zero(family, monkeypatch):
    check(make_family(family, monkeypatch, 33, 70, activation="silu", eps=0.0))


@pytest.mark.parametrize("family", ["rows", "wide", "prologue", "columns", "batch", "prebatch"])
def test_a_norm_of_equal_numbers_is_zero(family, monkeypatch):
    """What a norm sees is what is stored: a rounding of z alone must not pass for a deviation."""
    case = make_family(family, monkeypatch, 32, 48, dtype=F16, bias=False)
    settings = {"x": torch.full_like(case.x, 0.7), "weight": torch.full_like(case.x, 0.3)[:1]}
    settings["weight"] = settings["weight"].expand(48, 48)
    case = case.with_tensors(**settings)
    torch.testing.assert_close(ours(case)["y"], eager(case)["y"], rtol=2e-3, atol=2e-3)


def test_masks_are_the_reference_s_at_every_index():
    case = make(300, 40, norm=None, activation=None, dropout=0.5, drop_path=0.25, gate=None)
    kept = (ours(case)["y"] - case.x) != 0
    assert torch.equal(kept, (eager(case)["y"] - case.x) != 0)
    assert 0.3 < kept.float().mean() < 0.45 and len(kept.any(1).unique()) == 2


# Activations one by one.


@triton.jit
def apply_kernel(h_ptr, out_ptr, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """out = FUNCTION(h)"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, FUNCTION(tl.load(h_ptr + i, i < count, 0.0)), i < count)


def apply(function, h):
    h = h.to(DEVICE)
    out = torch.empty_like(h)
    apply_kernel[(triton.cdiv(h.numel(), 1024),)](h, out, h.numel(), function, 1024)
    return out.cpu()


def value_and_derivative(name, h):
    """By torch, in h's dtype."""
    h = h.clone().requires_grad_()
    value = ACTIVATION_FUNCTIONS[name](h)
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


def logarithmic(start, end):
    h = torch.logspace(start, end, 4001, dtype=torch.float64).float()
    return torch.cat([h, -h])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_derivative_are_as_accurate_as_torch(name):
    h = torch.cat([torch.linspace(-12, 12, 20011), logarithmic(-6, 4)])
    plain, true = value_and_derivative(name, h), value_and_derivative(name, h.double())
    for function, p, t in zip(epilogue.ACTIVATIONS[name], plain, true, strict=True):
        unit = t.abs().clamp(min=1.0)
        error, allowed = ((v.double() - t).abs() / unit for v in (apply(function, h), p))
        worst = error.argmax()
        told = f"{error[worst]:.3g} at {h[worst]}, torch {allowed.max():.3g}"
        assert error.max() <= 2 * allowed.max() + EPS, told


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_accurate_relative_to_its_value_near_zero(name):
    h = logarithmic(-30, 0)
    plain, true = value_and_derivative(name, h)[0], value_and_derivative(name, h.double())[0]
    kept = true.abs() > 1e-37  # below, fp32 has fewer digits
    value = apply(epilogue.ACTIVATIONS[name][0], h)
    error, allowed = (((v.double() - true) / true)[kept].abs() for v in (value, plain))
    assert error.max() <= 2 * allowed.max() + 2 * EPS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_kinks_infinities_and_nan(name):
    kinks = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0])
    true = value_and_derivative(name, kinks.double())
    for function, t in zip(epilogue.ACTIVATIONS[name], true, strict=True):
        torch.testing.assert_close(apply(function, kinks), t.float(), rtol=4 * EPS, atol=EPS)
    edges = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e15, -1e15])
    value = value_and_derivative(name, edges.double())[0].float()
    torch.testing.assert_close(apply(epilogue.ACTIVATIONS[name][0], edges), value, equal_nan=True)


def test_normal_cdf_error_bound():
    """fp32 numbers near 1 lie 1.2e-7 apart; a GPU's exp2 is off by 2 of these steps."""
    h = torch.cat([torch.linspace(-14, 14, 400001), logarithmic(-20, 10)])
    error = (apply(epilogue.normal_cdf, h).double() - torch.special.ndtr(h.double())).abs()
    assert error.max() < (8e-8 if INTERPRET else 1.5e-7)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("name", by_tanh.ACTIVATIONS)
def test_bf16_has_room_for_the_error_of_the_tanh_instruction(name, sigma):
    """NUMERICS 1 for value and derivative, with errors of the size that the PTX manual allows.

    Harder than in a layer: h is a bf16 number, so that eager only rounds once.
    """
    random = torch.Generator().manual_seed(0)
    h = (sigma * torch.randn(1 << 16, generator=random)).bfloat16()
    sign = 2.0 * torch.randint(0, 2, h.shape, generator=random) - 1
    t = h.float()
    u = {"silu": t / 2, "gelu_tanh": 0.7978845608028654 * (t + 0.044715 * t**3), "tanh": t}[name]
    tanh = torch.tanh(u) * (1 + sign * 2**-11)
    value = tanh if name == "tanh" else t * (0.5 + 0.5 * tanh)
    ours = [value, 1 - tanh * tanh] if name == "tanh" else [value]
    plain, true = value_and_derivative(name, h), value_and_derivative(name, h.double())
    for mine, eagers, t in zip(ours, plain, true, strict=False):
        error, allowed = ((v.bfloat16().double() - t).abs() for v in (mine, eagers))
        assert error.square().mean().sqrt() <= 1.1 * allowed.square().mean().sqrt()
        assert error.max() <= 2 * allowed.max()


@pytest.mark.parametrize("name", by_tanh.ACTIVATIONS)
def test_activation_by_the_tanh_instruction(name):
    """By the portable tanh in the interpreter, by the instruction on a GPU."""
    h = torch.cat([torch.linspace(-12, 12, 20011), logarithmic(-6, 4)])
    true = value_and_derivative(name, h.double())
    for function, t in zip(by_tanh.ACTIVATIONS[name], true, strict=True):
        error = (apply(function, h).double() - t).abs() / h.abs().clamp(min=1.0)
        assert error.max() <= (4 * EPS if INTERPRET else 2**-10)
    edges = torch.tensor([float("nan"), float("inf"), 1e15, -1e15])
    value = value_and_derivative(name, edges.double())[0].float()
    torch.testing.assert_close(apply(by_tanh.ACTIVATIONS[name][0], edges), value, equal_nan=True)


def test_bf16_takes_the_tanh_instruction_and_other_types_do_not():
    for name in (None, *ACTIVATIONS):
        exact = epilogue.ACTIVATIONS[name]
        assert (
            backend.activation_functions(name, F32)
            == backend.activation_functions(name, F16)
            == exact
        )
        assert (backend.activation_functions(name, BF16) != exact) == (
            name in ("silu", "gelu_tanh", "tanh")
        )


# dz and dx in one launch.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"N": 130},
        {"order": "resnet-v1"},
        {"order": "postnorm"},
        {"order": "linear-act"},
        {"order": "linear-add", "norm": None},
        {"norm": "rms", "residual": 80},
        {"norm": "batch", "training": False},
        {"N": 130, "pad": True},
        {"N": 130, "pad": True, "order": "linear-norm-add-act"},
        {"gate": "channel", "dropout": 0.25, "drop_path": 0.125, "residual_scale": 0.5},
    ],
    ids=str,
)
def test_dz_and_dx_in_one_launch_or_two(settings, whole, dtype, monkeypatch):
    """Both ways are as accurate as eager; programs take several row blocks each."""
    force(monkeypatch, 40, **({"MOST_WALKERS": 3} if whole else {"WIDEST_PRODUCT": 0}))
    case = make(150, 80, **{"activation": "gelu", "dtype": dtype, **settings})
    N = settings.get("N", 80)
    planned = backend.plan_whole(case.spec, dtype, 150, N, 80, planner.device_of(case.x.device))
    assert (planned is not None) == whole
    check(case)


@pytest.mark.parametrize("N", [1, 16, 17, 256, 257, 512])
def test_dz_and_dx_of_rows_of_any_width(N, monkeypatch):
    force(monkeypatch, 40, MOST_WALKERS=1)
    case = make(21, 70, N, activation="gelu", dtype=F16, residual=N)
    assert_close(ours(case), eager(case), exact(case), terms=10 * (70 + N))


# Stages before `linear` in a launch of their own.


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "prenorm", "norm": "rms", "dtype": F16},
        {"order": "add-norm-act-linear", "N": 70, "residual": 80, "eps": 0.0},
        {"order": "act-linear-norm-add", "N": 300, "residual": 300},
        {"order": "preact", "norm": "batch", "training": False, "gate": "channel"},
        {"order": "act-linear-norm-add", "norm": "batch"},
        {"order": "norm-gate-dropout-droppath-linear-add", "dropout": 0.25, "drop_path": 0.125},
    ],
    ids=str,
)
def test_stages_before_the_product_in_a_launch_of_their_own(settings, monkeypatch):
    force(monkeypatch, 40, APART_FROM=0, APART_COSTS=-1e9)
    case = make(21, 80, **{"activation": "gelu", **settings})
    N = case.tensors["weight"].shape[0]
    assert planner.plan(case.spec, case.x.dtype, 21, N, 80).apart
    check(case)


def test_true_fp32_backward_is_the_library_s_from_some_size_on(monkeypatch):
    """Batch norm's, too: its statistics are known then."""
    force(monkeypatch, LIBRARY=0)
    sizes = F32, 37, 70, 48
    for norm in ("layer", "batch"):
        case = make(37, 48, 70, order="preact", norm=norm, activation="gelu", residual=70)
        assert not planner.plan(case.spec, *sizes).apart
        launches = backend.backward_launches(case.spec, True, True, *sizes)
        assert launches.count("mm") == 2 and "residual_prologue_kernel" in launches
        check(case)


# The library's product, then one pass.


@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
@pytest.mark.parametrize(
    "order",
    ["note", "resnet-v1", "bert-output", "linear-norm", "linear-add", "preact", "act-linear-norm"],
)
def test_the_library_s_product_and_one_pass(order, norm, monkeypatch):
    M, K, N = ((37, 24, 24), (5, 40, 700), (9, 16, 2050))[(len(order) + len(str(norm))) % 3]
    gate = "channel" if order == "note" else None
    settings = {"order": order, "norm": norm, "training": norm != "batch", "gate": gate}
    force(monkeypatch, APART_FROM=0)
    case = make(M, K, N, activation="gelu", eps=1e-2, drop_path=0.2, **settings)
    assert vendor.why_not(case.spec, F32, torch.device(DEVICE), N, K) is None
    monkeypatch.setitem(ops.FORWARD, "triton", ops.FORWARD["vendor"])
    assert_close(ours(case), eager(case), exact(case), terms=10 * (M + K + N))
    with torch.no_grad():
        assert_close(ours(case, ()), eager(case, ()), exact(case, ()), terms=10 * (M + K + N))


@pytest.mark.parametrize("settings", [{}, {"norm": None}, {"order": "linear"}], ids=str)
def test_the_library_s_product_of_16_bit_rows_of_odd_width(settings, monkeypatch):
    device = torch.device(DEVICE)
    monkeypatch.setitem(ops.FORWARD, "triton", ops.FORWARD["vendor"])
    for N, K in ((33, 33), (32, 33), (33, 32)):
        residual = None if "order" in settings else N
        case = make(37, K, N, dtype=F16, activation="gelu", residual=residual, **settings)
        assert vendor.why_not(case.spec, F16, device, N, K) is None
        check(case)
        recipe = str(replace(case.spec, y_dtype="float32"))
        operands = (case.tensors.get(name) for name in NAMES)
        (y,) = vendor.residual_forward(*operands, None, None, None, 1, recipe, False)
        assert y.dtype == F32 and torch.equal(y.half(), ours(case, ())["y"])
    assert "tensor cores" in vendor.why_not(case.spec, F16, device, 32, 32)


# Alignment


def test_alignment_is_what_widths_and_row_strides_share():
    """1 where Triton sees for itself that 16 divides all of them."""
    x = torch.empty(5, 96)
    assert backend.alignment(64, x, None) == backend.alignment(64, x[:1].expand(7, 96)) == 1
    assert backend.alignment(64, x[:, :40]) == backend.alignment(40, x) == 8
    assert backend.alignment(64, x, torch.empty(5, 68)) == 4
    assert backend.alignment(66, x) == 2
    assert backend.alignment(64, torch.empty(5, 33)[:, :32]) == 1
    assert backend.alignment(64, torch.empty(96, 5).t()) == 1
    turned = torch.empty(96, 5).t()  # its columns lie apart
    assert backend.between_rows(x, None, turned) == backend.between_rows(turned) == 16
    assert backend.between_rows(torch.empty(5, 36)[:, :32], x) == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", [40, 36, 34])
def test_sizes_of_every_alignment(features, family, monkeypatch):
    """Widths of 8, 4 and 2, with shortcuts wider and narrower than x."""
    check(make_family(family, monkeypatch, 19, 48, features, residual=features))
    check(make_family(family, monkeypatch, 19, features, 48, residual=features - 8, pad=True))


@pytest.mark.parametrize("features", [33, 34])
@pytest.mark.parametrize("family", ["rows", "wide", "prologue"])
def test_tiles_for_narrow_loads(family, features, monkeypatch):
    case = make_family(family, monkeypatch, 19, features, features, dtype=F16)
    call = (case.spec, F16, 4096, features, features)
    usual = planner.plan(*call).tile
    monkeypatch.undo()
    force(monkeypatch, 2, **FAMILIES[family][1])
    assert planner.plan(*call).tile.BLOCK_K < usual.BLOCK_K
    check(case)


def test_the_library_s_product_is_for_true_fp32():
    def why(dtype=F32, **settings):
        spec = make_case(**settings).spec
        return vendor.why_not(spec, dtype, torch.device(DEVICE), 64, 64)

    assert why() is None
    assert "tensor cores" in why(F16) and "before linear" in why(order="prenorm")
    assert "batch statistics" in why(norm="batch")
    torch.set_float32_matmul_precision("high")
    try:
        assert "tensor cores" in why()
    finally:
        torch.set_float32_matmul_precision("highest")


# Shapes and layouts.

EDGES_N = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 339, 466, 511, 512)
EDGES_K = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 339)
EDGES_M = (1, 2, 15, 16, 17, 31, 33, 47, 127, 128, 129)


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("i", range(39))
def test_shapes(i, processors, monkeypatch):
    """On a device of one multiprocessor every launch fills it, so tiles are large."""
    steps = ((EDGES_M, 1), (EDGES_K, 5), (EDGES_N, 3))
    M, K, N = (edges[i * step % len(edges)] for edges, step in steps)
    family = FORWARD_ORDER[i % len(FORWARD_ORDER)]
    dtype = F16 if family == "algebraic" else DTYPES[i // 2 % len(DTYPES)]
    if M == 1 and family in ("columns", "batch", "prebatch"):
        M = 2
    if family.startswith("rows"):
        N = min(N, 256)
    force(monkeypatch, processors)
    case = make_family(family, monkeypatch, M, K, N, eps=1e-2, dtype=dtype)
    assert_close(ours(case), eager(case), exact(case), terms=10 * (M + K + N), what=f"{M, K, N}")


@pytest.mark.parametrize("order", ["note", "prenorm", "preact", "postnorm"])
@pytest.mark.parametrize("N", [513, 1024, 2049])
def test_wide_rows(N, order):
    K, N = (N, 40) if order in ("prenorm", "preact") else (40, N)
    check(make(21, K, N, order=order, activation="gelu", dtype=F16))


@pytest.mark.parametrize("order", ["note", "prenorm"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_too_wide_for_one_program_backward(norm, order, monkeypatch):
    force(monkeypatch, BACKWARD_ROW=0, BACKWARD_PLAIN_ROW=0)
    K, N = (24, 700) if order == "note" else (700, 24)
    settings = {"gate": "channel", "dropout": 0.2, "residual_scale": 0.5}
    check(make(40, K, N, order=order, norm=norm, activation="gelu", **settings))


@pytest.mark.parametrize("order", ["note", "preact"])
def test_plain_rows_of_up_to_4096_are_whole_in_backward(order):
    K, N = (2064, 16) if order == "preact" else (16, 2064)
    case = make(5, K, N, order=order, activation="gelu", residual=N)
    assert not planner.plan_backward(5, 2064, "rows", plain=True).wide
    assert_close(ours(case), eager(case), exact(case), terms=4000)


def test_a_very_wide_norm():
    case = make(3, 16, 16384, activation="gelu")
    assert_close(ours(case), eager(case), exact(case), terms=20000)


def test_without_a_norm_any_width_runs():
    check(make(5, 40, 3001, norm=None, activation="tanh"))


@pytest.mark.parametrize("order", ["note", "preact"])
@pytest.mark.parametrize("norm", (None, "layer", "rms"))
@pytest.mark.parametrize("M, K, N", [(0, 8, 8), (5, 0, 8), (5, 8, 0)])
def test_empty(M, K, N, norm, order):
    case = make(6, 9, 9, order=order, norm=norm, activation="gelu", residual=9)
    sizes = {"x": (M, K), "weight": (N, K), "residual": (M, N)}
    C = K if order == "preact" else N
    cut = {}
    for name, t in case.tensors.items():
        rows, columns = sizes.get(name, (N if name == "bias" else C, None))
        cut[name] = t[:rows] if columns is None else t[:rows, :columns]
    case = case.with_tensors(dy=case.dy[:M, :N], **cut)
    (y, *_), grads = call(case)
    assert y.shape == (M, N)
    for name, grad in zip(case.asked, grads, strict=True):
        assert grad.shape == case.tensors[name].shape and grad.isfinite().all()
        assert (M and N) or not grad.any()
    if not K and order == "note":
        zeros = {"x": y.new_zeros(M, 1), "weight": y.new_zeros(N, 1)}
        torch.testing.assert_close(y.double(), exact(case.with_tensors(**zeros))["y"])


@pytest.mark.parametrize("family", FAMILIES)
def test_many_programs_share_the_work(family, monkeypatch):
    """Column sums meet in two levels, row blocks and column tiles are many, sums are split."""
    force(monkeypatch, 40, BACKWARD_TILE=256)
    check(make_family(family, monkeypatch, 150, 24, 40, gate="channel"))


def test_many_programs_of_one_tile_of_dweight_meet_in_groups(monkeypatch):
    force(monkeypatch, 40)
    M = 1300
    case = make(M, 24, 20, order="preact", activation="gelu", dtype=F32)
    chosen = planner.plan_products(F32, M, 20, 24, True, False, planner.device_of(case.x.device))
    parts = products.PARTS.value
    assert chosen.splits > parts and chosen.splits % parts
    check(case, ("weight", "x"))
    check(case, ("weight", "x"))  # counters are 0 again


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scalar_gate(family, monkeypatch):
    """Its gradient is one number, a sum over all elements: one error, no RMS."""
    force(monkeypatch, 40, BACKWARD_TILE=256)
    case = make_family(family, monkeypatch, 150, 24, 40, gate="scalar")
    asked = ("gate", "x") if family == "tile" else ("gate",)
    assert_close(ours(case, asked), eager(case, asked), exact(case, asked), terms=150 * 40)


def same(a, b):
    """Bit by bit where sums have one order. Compiled, it follows how a layout is loaded."""
    if INTERPRET:
        return bitwise(a, b)
    assert a.keys() == b.keys()
    for name, t in a.items():
        torch.testing.assert_close(t, b[name])


def strided(t):
    """Tensors that equal `t`, by kind of layout."""
    rows, columns = t.shape
    wide = t.new_full((rows, 2 * columns + 3), float("nan"))
    wide[:, 3::2] = t
    offset = t.new_full((rows * columns + 1,), float("nan"))[1:].view(rows, columns)
    offset.copy_(t)
    return {"transposed": t.t().contiguous().t(), "sliced": wide[:, 3::2], "offset": offset}


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("name", ["x", "weight", "residual", "dy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_do_not_change_a_bit(family, name, layout, monkeypatch):
    case = make_family(family, monkeypatch, 37, 48, 70, residual=70)
    tensor = strided(case.dy if name == "dy" else case.tensors[name])[layout]
    a, b = ours(case), ours(case.with_tensors(**{name: tensor}))
    assert_close(b, eager(case), exact(case), terms=1)
    if name in ("x", "weight"):  # dx and dweight are the library's products, it may sum otherwise
        for product in ("dx", "dweight"):
            del a[product], b[product]
    same(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_inputs(family, monkeypatch):
    case = make_family(family, monkeypatch, 37, 48)
    x, dy = case.x[:1].expand(37, 48), case.dy[:1, :1].expand(37, 48)
    vectors = tuple(name for name in ("bias", "norm_weight") if name in case.tensors)
    spread = case.with_tensors(dy=dy, x=x)
    dense = case.with_tensors(dy=dy.contiguous(), x=x.contiguous())
    same(ours(spread, vectors), ours(dense, vectors))


# Operands that do not fit: the promised errors, and no kernel reads out of bounds.

MISFITS = {  # what is wrong: (its tensor's new shape, dtype or device, the error, what it says)
    "bias too short": ("linear.bias", lambda t: t[:3], ValueError, "bias has shape (3,)"),
    "norm weight too short": ("norm.weight", lambda t: t[:3], ValueError, "expected (32,)"),
    "norm bias elsewhere": ("norm.bias", lambda t: t.to("meta"), ValueError, "is on meta"),
    "weight elsewhere": ("linear.weight", lambda t: t.to("meta"), ValueError, "is on meta"),
    "gate too long": ("gate", lambda t: t.repeat(2), ValueError, "gate has shape (64,)"),
    "bias of another dtype": ("linear.bias", lambda t: t.half(), TypeError, "torch.float16"),
}


@pytest.mark.parametrize("order", ["note", "preact"])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_module_s_misfits_are_told_by_every_backend(name, order):
    if name == "cpu" and (native.missing or DEVICE != "cpu"):
        pytest.skip("needs the C++ extension, and CPU tensors")
    for what, (parameter, change, error, words) in MISFITS.items():
        layer = FusedResidual(32, order=order, gate="channel", backend=name, device=DEVICE)
        owner, _, leaf = parameter.rpartition(".")
        owner = layer.get_submodule(owner)
        setattr(owner, leaf, torch.nn.Parameter(change(getattr(owner, leaf).detach())))
        with torch.no_grad(), pytest.raises(error, match=re.escape(words)):
            layer(torch.randn(4, 32, device=DEVICE))
            pytest.fail(what)
    layer = FusedResidual(32, order=order, backend=name, device=DEVICE)
    with pytest.raises(TypeError, match=r"torch\.float16.*autocast"):
        layer(torch.randn(4, 32, device=DEVICE).half())


@pytest.mark.parametrize("op", ["triton", "vendor"])
def test_an_op_refuses_what_does_not_fit(op):
    forward, backward = ops.FORWARD[op], ops.BACKWARD[op]
    case = make(6, 8, gate="channel", residual=8, dropout=0.5)
    operands = [case.tensors.get(name) for name in NAMES]
    seed = torch.tensor([1], device=DEVICE)
    rest = (None, None, seed, 1, str(case.spec))
    y, z, stats = forward(*operands, *rest, True)
    for i, t in enumerate(operands):
        for wrong in (t.new_empty(9, *t.shape[1:]), t.int(), t.to("meta")):
            call = [*operands[:i], wrong, *operands[i + 1 :], *rest]
            with pytest.raises(RuntimeError, match="fusedres: "):
                forward(*call, True)
            with pytest.raises(RuntimeError, match="fusedres: "):
                backward(y, [z, stats], *call, 1)
    for wrong in ((y[:3], z), (y, z[:, :3])):
        with pytest.raises(RuntimeError, match=r"fusedres: (dy|z) has shape"):
            backward(wrong[0], [wrong[1], stats], *operands, *rest, 1)
    for missing in ((None, None, None, 1, str(case.spec)), (*rest[:4], f"{case.spec} norm=batch")):
        with pytest.raises(RuntimeError, match="is None, needed by"):
            forward(*operands, *missing, True)


# Promises.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("M, N", [(37, 70), (129, 39), (16, 128)])
def test_nothing_outside_is_written_and_nothing_inside_is_left(M, N, family, monkeypatch):
    case = make_family(family, monkeypatch, M, 48, N, residual=min(N - 3, 48), pad=True)
    margin, canary, frames = 4096, 12345.0, []

    def framed(shape, stride, dtype, device):
        count = torch.empty_strided(shape, stride, device="meta").untyped_storage().nbytes() // 4
        frames.append(torch.full((count + 2 * margin,), canary, dtype=dtype, device=device))
        inside = frames[-1][margin : margin + count].fill_(float("nan"))
        return inside.as_strided(shape, stride, margin)

    def new_empty(self, shape, dtype=None, **interpreter):
        if interpreter:  # the interpreter's own copies
            return torch.empty(shape, dtype=dtype or self.dtype, **interpreter)
        contiguous = torch.empty(shape, device="meta").stride()
        return framed(shape, contiguous, dtype or self.dtype, self.device)

    def new_empty_strided(self, shape, stride, dtype=None):
        return framed(shape, stride, dtype or self.dtype, self.device)

    def empty_strided(shape, stride, dtype=None, device=None):
        if device == "meta":
            return strided(shape, stride, device=device)
        return framed(shape, stride, dtype, device)

    strided = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    monkeypatch.setattr(torch, "empty_like", lambda t: new_empty(t, t.shape))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", new_empty_strided)
    outputs, grads = call(case)
    for t in (*outputs, *grads):
        assert t.isfinite().all()
    assert len(frames) >= len(outputs) + len(grads)
    for frame in frames:
        assert (frame[:margin] == canary).all() and (frame[-margin:] == canary).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_gradient_alone_is_the_same(family, monkeypatch):
    force(monkeypatch, WIDEST_PRODUCT=0)  # else whether dx is asked for decides how sums are cut
    case = make_family(family, monkeypatch, 37, 48, gate="channel", dropout=0.2, residual=48)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")
    bits = [i for i, name in enumerate(names) if name in case.tensors]
    _, together = call(case)
    for i, grad in zip(bits, together, strict=True):
        (alone,) = call(case, 1 << i)[1]
        if names[i] not in ("weight", "bias") and "order" in FAMILIES[family][0]:
            close = {"rtol": 1e-3, "atol": 1e-3} if grad.dtype == F16 else {}
            torch.testing.assert_close(alone, grad, **close)  # then dt is the library's product
        else:
            assert torch.equal(alone, grad), names[i]


@pytest.mark.parametrize("family", ["tile", "rows", "wide"])
def test_dx_alone_is_the_same_where_one_launch_makes_it(family, monkeypatch):
    case = make_family(family, monkeypatch, 37, 48, gate="channel", dropout=0.2, residual=48)
    N, K = case.tensors["weight"].shape
    device = planner.device_of(case.x.device)
    assert backend.plan_whole(case.spec, case.x.dtype, 37, N, K, device)
    _, (together, *_) = call(case)
    assert torch.equal(call(case, 1)[1][0], together)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_call_twice_is_bitwise_equal_and_leaves_its_inputs(family, monkeypatch):
    monkeypatch.setattr("fusedres.backends.plan.BACKWARD_TILE", 256)
    case = make_family(family, monkeypatch, 70, 24, 40, residual=40, dropout=0.3)
    before = {name: (t.clone(), t._version) for name, t in {**case.tensors, "dy": case.dy}.items()}
    first = call(case)
    for _ in range(2):
        again = call(case)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b)
    for name, t in {**case.tensors, "dy": case.dy}.items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_call_looks_at_its_own_tensors(family, monkeypatch):
    """Also where tensors of the first one, and not of the later one, are the same."""
    first = make_family(family, monkeypatch, 37, 24, residual=24, gate="channel")
    one = {"weight": first.tensors["weight"]}
    if "norm_weight" in first.tensors:
        one |= dict.fromkeys(("norm_weight", "norm_bias", "bias"), first.tensors["gate"])
    shared = first.with_tensors(dy=first.x, residual=first.x, **one)
    for later in (
        first,
        make_family(family, monkeypatch, 37, 24, residual=24, gate="channel", draw=5),
    ):
        forget()
        alone = call(later)
        forget()
        call(shared)
        again = call(later)
        for a, b in zip((*again[0], *again[1]), (*alone[0], *alone[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["tile", "rows", "rows, rms", "wide", "prologue", "algebraic"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(poison, activation, family, monkeypatch):
    settings = {"activation": activation, "residual": 30}
    case = make_family(family, monkeypatch, 20, 24, 30, **settings)
    case.x[3, 5] = poison
    (y, *_), (dx, *_) = call(case)
    others = torch.arange(20, device=DEVICE) != 3
    assert y[others].isfinite().all() and dx[others].isfinite().all()
    if poison != poison:
        assert y[3].isnan().all()
    else:
        assert torch.equal(y[3].isfinite(), eager(case)["y"][3].isfinite())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", (None, "layer"))
def test_nan_comes_out_of_every_activation(activation, norm):
    case = make(20, 24, 30, norm=norm, activation=activation, residual=30)
    case.x[3, 5] = float("nan")
    assert call(case)[0][0][3].isnan().all()


def test_what_is_saved():
    def saved(save=True, **settings):
        case = make(5, 8, activation="gelu", **settings)
        names = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")
        operands = [case.tensors.get(name) for name in names]
        outputs = torch.ops.fusedres.triton_residual_forward(
            *operands, None, None, None, 1, str(case.spec), save
        )
        return tuple(tuple(t.shape) for t in outputs[1:])

    assert saved() == ((5, 8), (10,))
    assert saved(save=False) == saved(order="linear-add") == ()
    assert saved(order="norm-linear-add") == ((10,),)
    assert saved(norm="batch") == ((5, 8), (2, 8))
    assert saved(norm="batch", save=False) == ((2, 8),)


def test_products_of_fp32_are_tf32_only_where_torch_says_so():
    assert backend._precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert backend._precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
