"""Operands of several dtypes on the Triton backend: each as it comes, one launch as ever.

FusedResidual against Residual in the same context: FIDELITY 3. Run by test_triton_interpreter.py
with TRITON_INTERPRET=1. There is autocast to fp16 on a CPU too, so that one test serves both.
"""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from fusedres import FusedResidual, Residual, explain, ops
from fusedres.backends import vendor
from fusedres.dtypes import typed
from fusedres.spec import ORDERS, Spec, make_spec
from oracle import assert_as_accurate, double, make_case
from triton_run import (
    DEVICE,
    F16,
    F32,
    FAMILIES,
    INTERPRET,
    MARKS,
    Launches,
    _clean,  # noqa: F401
    call,
    force,
    on_device,
)

pytestmark = MARKS
on_cpu = pytest.mark.skipif(not INTERPRET, reason="on a GPU torch takes fewer dtypes together")
MORE_ORDERS = ("linear", "linear-add", "linear-act", "act-linear-add", "add-norm-act-linear")
NORMS = ((None, True), ("layer", True), ("rms", True), ("batch", True), ("batch", False))
DTYPES = tuple(itertools.product((F32, F16), (F32, F16), (None, F32, F16), (False, True)))
SMOOTH = ("gelu", "silu", None, "tanh")


def product_of(spec, x, weight, residual, autocast):
    """The recipe and the product's dtype; None where torch multiplies nothing of these dtypes."""
    try:
        return typed(spec.text, x, weight, residual, F16 if autocast else None, DEVICE)
    except TypeError:
        return None


def results(layer, tensors, dy, autocast, asked):
    """{"y": y, "dx": ...} of a layer's call; leaves have the dtypes that `tensors` have."""
    torch.manual_seed(7)
    leaves = {name: t.clone().requires_grad_(asked(name)) for name, t in tensors.items()}
    with torch.autocast(DEVICE, F16, enabled=autocast):
        y = layer(leaves["x"], leaves.get("residual"))
    leaves |= dict(layer.named_parameters())
    wanted = {name: t for name, t in leaves.items() if asked(name)}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    found = {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}
    return found | {name: t.clone() for name, t in layer.named_buffers() if t.is_floating_point()}


def three(settings, sizes, dtypes, asked=lambda name: True):
    """Of FusedResidual, of Residual, and the truth."""
    M, K, N = sizes
    x, weight, residual, autocast = dtypes
    settings = dict(settings)
    training = settings.pop("training", True)
    torch.manual_seed(1)
    fused = FusedResidual(K, N, shortcut="pad", backend="triton", **settings).to(DEVICE, weight)
    for name, t in fused.named_parameters():
        if t.dim() == 1:
            torch.nn.init.normal_(t, float("norm.weight" in name), 0.3)
    if fused.norm is not None and F32 in dtypes:
        fused.norm.float()  # torch takes no others for a norm of fp32
    fused.train(training)
    eager = copy.deepcopy(fused)
    eager.__class__ = Residual
    tensors = {"x": torch.randn(M, K, device=DEVICE).to(x)}
    if residual is not None and fused.spec.adds:
        width = fused.spec.width("add", K, N)
        tensors["residual"] = torch.randn(M, width, device=DEVICE).to(residual)
    dy = torch.randn(M, N, device=DEVICE)
    if fused.spec.batch_stats and "norm" in fused.spec.epilogue:
        inner, asked = asked, lambda name: name != "linear.bias" and inner(name)  # 0, and noise
    wide = {name: t.double() for name, t in tensors.items()}
    return (
        results(fused, tensors, dy, autocast, asked),
        results(eager, tensors, dy, autocast, asked),
        results(double(fused), wide, dy.double(), False, asked),
    )


def close(results, what):
    """`assert_close`, where every tensor may hold roundings of the coarsest dtype."""
    ours, plain, true = results
    for name in plain:
        assert ours[name].dtype == plain[name].dtype, f"{name} of {what}"
        step = 4 * torch.finfo(F16).eps * max(3.0, true[name].abs().max())
        error, allowed = ((t[name].double() - true[name]).abs().max() for t in (ours, plain))
        assert error <= 2 * allowed + step, f"{name} of {what}: error {error:.3g}, {allowed:.3g}"


@on_cpu
@pytest.mark.parametrize("order", [*ORDERS, *MORE_ORDERS])
def test_every_order_norm_and_dtype(order, monkeypatch):
    """A third of all cells; activations, families and the ways of backward take turns."""
    cells = list(itertools.product(NORMS, DTYPES))
    first = [*ORDERS, *MORE_ORDERS].index(order) % 3
    for i, ((norm, training), dtypes) in enumerate(cells[first::3]):
        settings = {"order": order, "norm": norm, "activation": SMOOTH[i % 4]}
        settings |= {"training": training, "eps": 1e-2}
        if i % 5 == 0:
            settings |= {"gate": "channel", "dropout": 0.25, "residual_scale": 0.5}
        spec = make_spec(**settings)
        if spec.text in ("linear", "linear-add") and norm is not None:
            continue
        found = product_of(spec, *dtypes)
        if found is None:
            continue
        wide, split = i % 2, i // 2 % 2
        force(
            monkeypatch,
            WIDEST_ROW=0 if wide else 256,
            TALLEST_COLUMN=0 if wide else 512,
            WIDEST_PRODUCT=0 if split else 512,
            BACKWARD_ROW=16 if split else 2048,
        )
        M, K, N = 17, 20, (20, 33)[i % 3 == 1]
        close(three(settings, (M, K, N), dtypes), f"'{found[0]}', {dtypes}")


@pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32, None, True),
        (F32, F32, F16, True),
        pytest.param((F16, F16, F32, False), marks=on_cpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_accurate_as_eager(family, dtypes, monkeypatch):
    """NUMERICS 1: RMS and largest error."""
    settings, constants = FAMILIES[family]
    settings = {name: value for name, value in settings.items() if name != "dtype"}
    force(monkeypatch, **constants)
    assert_as_accurate(*three({"activation": "gelu", **settings}, (96, 130, 130), dtypes), family)


@pytest.mark.parametrize("frozen", ["linear.weight", "x", "residual", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_gradient_looks_at_is_not_kept(family, frozen, monkeypatch):
    """Stand-ins without memory come to backward instead."""
    settings, constants = FAMILIES[family]
    settings = {"activation": "gelu", "residual_scale": 0.5, **settings}
    settings.pop("dtype", None)
    force(monkeypatch, WIDEST_PRODUCT=0, **constants)
    for dtypes in ((F32, F32, F16, True), (F32, F32, None, True)):
        forward = FusedResidual.forward

        def freeze(layer, *inputs, forward=forward):
            for name, t in layer.named_parameters():
                t.requires_grad_(not name.startswith(frozen))
            return forward(layer, *inputs)

        asked = lambda name: not name.startswith(frozen)  # noqa: E731
        monkeypatch.setattr(FusedResidual, "forward", freeze)
        close(three(settings, (17, 20, 33), dtypes, asked), f"{family}, {dtypes}")
        monkeypatch.setattr(FusedResidual, "forward", forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_the_same(family, monkeypatch):
    """There z has no tensor of its own and may lie in y, of another dtype."""
    settings, constants = FAMILIES[family]
    settings = {
        name: value for name, value in settings.items() if name not in ("dtype", "training")
    }
    force(monkeypatch, **constants)
    layer = FusedResidual(24, 70, shortcut="pad", activation="gelu", backend="triton", **settings)
    layer, x = layer.to(DEVICE), torch.randn(17, 24, device=DEVICE)
    with torch.autocast(DEVICE, F16):
        y = layer(x)
        with torch.no_grad():
            assert y.dtype == F32 and torch.equal(layer(x), y)


@pytest.mark.parametrize("order", ["note", "prenorm", "resnet-v1"])
def test_twenty_layers_in_a_row(order):
    """The stream stays as exact as eager's, and finite where eager's is."""
    torch.manual_seed(3)
    stack = [FusedResidual(24, order=order, activation="gelu", backend="triton") for _ in range(20)]
    x, ways = torch.randn(64, 24, device=DEVICE), {}
    for way in ("eager", "forward", "exact"):
        y = x.double() if way == "exact" else x
        with torch.no_grad(), torch.autocast(DEVICE, F16, enabled=way != "exact"):
            for layer in stack:
                layer = double(layer) if way == "exact" else layer
                y = getattr(layer.to(DEVICE), "forward" if way == "exact" else way)(y)
        ways[way] = {"y": y}
    assert_as_accurate(ways["forward"], ways["eager"], ways["exact"], order)


@pytest.mark.parametrize("order", ["note", "postnorm", "linear-add"])
def test_the_library_s_product_and_a_residual_of_its_own_dtype(order, monkeypatch):
    spec, device = make_spec(order), torch.device(DEVICE)
    assert vendor.why_not(replace(spec, residual_dtype="float16"), F32, device, 24, 24) is None
    assert "x" in vendor.why_not(replace(spec, x_dtype="float16"), F32, device, 24, 24)
    monkeypatch.setitem(ops.FORWARD, "triton", ops.FORWARD["vendor"])
    settings = {"order": order, "activation": "gelu"}
    assert_as_accurate(*three(settings, (64, 40, 40), (F32, F32, F16, False)), order)


def mixed_case(settings, sizes, dtypes):
    """A case whose operands have these dtypes, and its recipe; None where there is none."""
    x, weight, residual, autocast = dtypes
    M, K, N = sizes
    spec = make_spec(**settings)
    residual = residual if spec.adds else None
    found = product_of(spec, x, weight, residual, autocast)
    if found is None:
        return None
    recipe, product = found
    width = spec.width("add", K, N) if residual else None
    case = on_device(make_case(M, K, N, residual=width, **settings))
    to = {"x": x, "weight": product, "bias": product, "residual": residual}
    cast = {name: t.to(to.get(name, weight)) for name, t in case.tensors.items()}
    y = Spec.parse(recipe).y_dtype
    return case.with_tensors(case.dy.to(getattr(torch, y) if y else product), **cast), recipe


@on_cpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_one_launch_forward_and_at_most_three_backward(dtypes, monkeypatch):
    launches, cells = Launches(monkeypatch), 0
    orders = (*ORDERS, *MORE_ORDERS)
    for order, (norm, training), split in itertools.product(orders, NORMS, (False, True)):
        settings = {"order": order, "norm": norm, "training": training, "activation": "gelu"}
        found = mixed_case(settings, (5, 24, 24), dtypes)
        if found is None:
            continue
        case, recipe = found
        force(monkeypatch, WIDEST_PRODUCT=0 if split else 512)
        seen, (_, grads) = launches.of(partial(call, recipe=recipe), case)
        cells += 1
        assert "forward" in seen[0] and sum("forward" in name for name in seen) == 1, seen
        assert 1 <= len(seen[1:]) <= 3, f"'{recipe}': {seen}"
        for name, grad in zip(case.asked, grads, strict=True):
            assert grad.dtype == case.tensors[name].dtype, name
    assert cells or not dtypes[-1]


@on_cpu
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("family", ["rows", "wide", "prologue", "columns", "batch", "prebatch"])
def test_a_variance_that_overflows_is_torch_s(family, norm, monkeypatch):
    """FIDELITY 10: NaN of layer norm (of torch's by the width), 0 of the others."""
    settings, constants = FAMILIES[family]
    settings = {**settings, "norm": norm, "activation": None}
    force(monkeypatch, **constants)
    for columns in (24, 90):
        fused = FusedResidual(24, columns, shortcut="pad", **settings, backend="triton").to(DEVICE)
        eager = copy.deepcopy(fused)
        eager.__class__ = Residual
        x = torch.randn(6, 24, device=DEVICE)
        x[2] *= 1e20
        with torch.no_grad():
            ours, plain = fused(x), eager(x)
        if norm == "layer":
            assert ours[2].isnan().all()
            ours[2] = plain[2] = 0
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_explain_says_what_is_cast():
    layer = FusedResidual(24, order="linear-norm-add", backend="triton", device=DEVICE)
    with torch.autocast(DEVICE, F16):
        told = explain(layer, torch.randn(4, 24, device=DEVICE))
    (layer_call,) = told.calls
    assert layer_call.recipe.endswith("x_dtype=float32 y_dtype=float32")
    assert (layer_call.forward_launches, layer_call.backend) == (1, "triton")
    assert "x" not in layer_call.saved and layer_call.saved["cast of x"] == 4 * 24 * 2
    assert any("casts the weight and the bias to torch.float16" in note for note in told.notes)
