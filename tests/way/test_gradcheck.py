"""NUMERICS 4: first and second derivatives in float64 against finite differences, for every recipe.

`fast_mode` compares random projections of the Jacobians. Also checked: batched cotangents,
forward-mode AD, that no output depends on undefined gradients. Points lie away from the kinks of
the activations and of their derivatives.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import oracle
from fusedres import ACTIVATIONS, NORMS, ORDERS, fused_residual
from fusedres.spec import make_spec

KINKS = (-3.0, 0.0, 3.0, 6.0)
AWAY = 1e-3  # finite differences step by 1e-6


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tensors this small, a second thread is a loss
    yield
    torch.set_num_threads(threads)


def case_away_from_kinks(**settings):
    """A small case in float64. Its large eps keeps rows that an activation zeroed conditioned."""
    for draw in range(100):
        case = oracle.make_case(3, 4, eps=0.1, dtype=torch.float64, draw=draw, **settings)
        if case.spec.activation is None:
            return case
        h = oracle.pre_activation(case, torch.float64)
        if min((h - kink).abs().min() for kink in KINKS) > AWAY:
            return case
    raise AssertionError(f"no draw away from the kinks: {settings}")


def check(case):
    statistics = {name: t for name, t in case.tensors.items() if name in oracle.STATISTICS}
    names = tuple(name for name in case.tensors if name not in statistics)
    inputs = tuple(case.tensors[name].clone().requires_grad_() for name in names)
    settings = {name: value for name, value in case.settings.items() if name != "gate"}

    def call(*tensors):
        if case.spec.random:
            torch.manual_seed(5)
        running = {name: t.clone() for name, t in statistics.items()}  # the same for every call
        return fused_residual(
            **dict(zip(names, tensors, strict=True)),
            **running,
            **settings,
            shortcut="pad" if case.pad else None,
        )

    assert gradcheck(
        call,
        inputs,
        fast_mode=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_undefined_grad=True,
    )
    assert gradgradcheck(call, inputs, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("order", ORDERS)
def test_every_recipe(order, norm):
    checked = set()
    for activation, bias in itertools.product([None, *ACTIVATIONS], [True, False]):
        recipe = make_spec(order, norm, activation).text, bias
        if recipe not in checked:
            checked.add(recipe)
            check(case_away_from_kinks(order=order, norm=norm, activation=activation, bias=bias))
    assert len(checked) == 2 * (1 + len(ACTIVATIONS) if "act" in ORDERS[order] else 1)


EXTRAS = {
    "channel gate": {"gate": "channel"},
    "scalar gate in the prologue": {"gate": "scalar", "order": "gate-norm-linear-act-add"},
    "gate after the sum": {"order": "linear-act-add-gate-norm", "gate": "channel"},
    "dropout": {"dropout": 0.4},
    "drop-path": {"drop_path": 0.4, "order": "postnorm", "lead": (3, 2)},
    "dropout first": {"dropout": 0.4, "order": "dropout-linear-norm-act-add"},
    "residual scale": {"residual_scale": 0.5, "order": "resnet-v1"},
    "explicit residual": {"residual": 4, "order": "preact"},
    "wider": {"N": 5},
    "padded": {"N": 6, "pad": True, "order": "postnorm"},
    "running statistics": {"norm": "batch", "training": False},
    "running statistics first": {"norm": "batch", "training": False, "order": "preact"},
    "no affine parameters": {"affine": False},
    "norm bias of rms": {"norm": "rms", "norm_bias": True},
}


@pytest.mark.parametrize("settings", EXTRAS.values(), ids=EXTRAS)
def test_other_stages(settings):
    check(case_away_from_kinks(**{"activation": "silu", **settings}))


@pytest.mark.parametrize("order", ["note", "resnet-v1", "preact"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_whole_jacobians(order, norm):
    """Without projections."""
    case = case_away_from_kinks(order=order, norm=norm, activation="gelu", gate="channel")
    names = case.asked
    inputs = tuple(case.tensors[name].clone().requires_grad_() for name in names)

    def call(*tensors):
        settings = {name: value for name, value in case.settings.items() if name != "gate"}
        return fused_residual(**dict(zip(names, tensors, strict=True)), **settings)

    assert gradcheck(call, inputs, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(call, inputs, check_batched_grad=True)
