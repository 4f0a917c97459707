"""The whole grid on the Triton backend: every cell is one launch forward, at most three backward.

Run by test_triton_interpreter.py with TRITON_INTERPRET=1.
"""

import itertools
import math

import pytest
import torch

from fusedres import explain, fused_residual
from fusedres.backends import plan as planner
from fusedres.backends import triton as backend
from fusedres.spec import ACTIVATIONS, GATES, ORDERS, make_spec
from oracle import assert_close, eager, exact, make_case
from triton_run import (
    DEVICE,
    DTYPES,
    F16,
    F32,
    FAMILIES,
    INTERPRET,
    MARKS,
    Launches,
    _clean,  # noqa: F401
    call,
    make,
    make_family,
    on_device,
    ours,
)

pytestmark = MARKS
NORMS = ((None, True), ("layer", True), ("rms", True), ("batch", True), ("batch", False))
DROPS = ((0.0, 0.0), (0.25, 0.0), (0.0, 0.25), (0.25, 0.125))
GRID = tuple(itertools.product(ORDERS, NORMS, (None, *ACTIVATIONS), (None, *GATES), DROPS))


def settings_of(cell):
    order, (norm, training), activation, gate, (dropout, drop_path) = cell
    return {
        "order": order,
        "norm": norm,
        "training": training,
        "activation": activation,
        "gate": gate,
        "dropout": dropout,
        "drop_path": drop_path,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_cell_is_one_launch_forward_and_at_most_three_backward(order, dtype, monkeypatch):
    """All 7,560 cells, by launching without running."""
    launches, cells = Launches(monkeypatch), 0
    device = torch.device(DEVICE)
    for cell in GRID:
        if cell[0] != order:
            continue
        settings, cells = settings_of(cell), cells + 1
        spec = make_spec(**settings)
        assert backend.why_not(spec, dtype, device, 24, 24) is None or DEVICE == "cpu", str(spec)
        case = on_device(make_case(5, 24, dtype=dtype, **settings))
        seen, _ = launches.of(call, case)
        forward = [name for name in seen if "forward" in name]
        back = seen[seen.index(forward[0]) + 1 :]
        assert len(forward) == 1 and seen[0] == forward[0], f"'{spec}': {seen}"
        assert 1 <= len(back) <= 3, f"'{spec}': {seen}"
    assert cells == len(GRID) // len(ORDERS) == 1080


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_one_launch_or_two_if_they_are_apart(family, monkeypatch):
    case = make_family(family, monkeypatch, 40, 24, residual=None)
    seen, _ = Launches(monkeypatch).of(call, case)
    if family.endswith("apart"):
        assert seen.pop(0) == "residual_prologue_kernel"
        assert seen.count("residual_prologue_kernel") == 1 and seen.count("mm.out") == 2
        seen.remove("residual_prologue_kernel"), seen.remove("mm.out")
    assert seen[0] == planner.FAMILIES[family.split(",")[0]][0]
    assert len([name for name in seen if "forward" in name]) == 1 and len(seen) <= 4


@pytest.mark.parametrize("i", range(math.ceil(len(ORDERS) * len(NORMS) * 3 * 4 / 20)))
def test_numbers_over_order_norm_gate_and_drops(i):
    """Every order x norm x gate x drop, forward and backward; activations and dtypes take turns."""
    cells = list(itertools.product(ORDERS, NORMS, (None, *GATES), DROPS))
    smooth = ("gelu", "silu", "tanh", "mish", "gelu_tanh", "sigmoid", "softplus", None)
    for j, (order, norm, gate, drop) in list(enumerate(cells))[20 * i : 20 * i + 20]:
        settings = settings_of((order, norm, smooth[j % len(smooth)], gate, drop))
        case = make(17, 24, dtype=(F32, F16)[j // 3 % 2], eps=1e-2, **settings)
        assert_close(ours(case), eager(case), exact(case), terms=600, what=str(case.spec))


@pytest.mark.parametrize("order", ORDERS)
def test_numbers_over_order_norm_and_activation(order):
    """Every order x norm x activation, forward."""
    for j, (norm, activation) in enumerate(itertools.product(NORMS, (None, *ACTIVATIONS))):
        settings = settings_of((order, norm, activation, None, (0.0, 0.0)))
        case = on_device(make_case(9, 20, dtype=(F32, F16)[j % 2], eps=1e-2, **settings))
        results = (run(case, ()) for run in (ours, eager, exact))
        assert_close(*results, terms=600, what=str(case.spec))


def test_what_is_refused_says_why():
    def why(N=64, K=64, dtype=F32, device=DEVICE, **settings):
        return backend.why_not(make_spec(**settings), dtype, torch.device(device), N, K)

    assert why() is None and why(1 << 20) is None and why(K=1 << 20, order="prenorm") is None
    assert "1048577 features" in why((1 << 20) + 1, norm=None)
    assert "float64" in why(dtype=torch.float64)
    assert "meta" in why(device="meta")
    if INTERPRET:
        x = torch.zeros(2, 8, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            fused_residual(x, x.new_zeros(8, 8), norm=None, backend="triton")


@pytest.mark.skipif(not INTERPRET, reason="the default backend on a GPU is tested there")
def test_explain_names_the_launches(monkeypatch):
    import fusedres

    for family in FAMILIES:
        case = make_family(family, monkeypatch, 40, 24, residual=None)
        settings = {k: v for k, v in case.settings.items() if k != "training"}
        layer = fusedres.FusedResidual(24, **settings, backend="triton", dtype=case.x.dtype)
        told = explain(layer.train(case.settings["training"]), case.x)
        with monkeypatch.context() as patch:
            seen, _ = Launches(patch).of(call, case)
        torch.use_deterministic_algorithms(True)
        (layer_call,) = told.calls
        assert layer_call.kernel.startswith(seen[0]), family
        forward = 1 + family.endswith("apart")
        assert layer_call.forward_launches == forward
        assert layer_call.backward_launches == len(seen) - forward, (family, seen)
