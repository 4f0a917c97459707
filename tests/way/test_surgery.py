"""NUMERICS 13: nobody can tell our layers from eager ones, whatever is done to them.

tests/surgeries.py says what is drawn, done and compared.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from surgeries import BF16, F64, OPERATIONS, Case, Difference, Run, build, check, draw_case, places

LAYER = {"gate": "channel", "activation": "gelu"}
SEQUENTIAL = {"order": "norm-linear-act", "norm": "batch", "activation": "softplus", "bias": True}
MODELS = (
    Case("layer", {**LAYER, "norm": "batch"}, N=7),
    Case("layer", {**LAYER, "norm": "rms", "order": "prenorm", "drop_path": 0.4}, warm=True),
    Case("stack", {**LAYER, "order": "postnorm", "dropout": 0.4}, dtype=BF16),
    Case("mlp", {**LAYER, "norm": "layer"}, N=7, lead=(2, 3)),
    Case("sequential", SEQUENTIAL, warm=True),
)


@st.composite
def cases(draw):
    return draw_case(lambda sequence: draw(st.sampled_from(sequence)))


@given(case=cases())
@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_done_nobody_can_tell(case):
    check(case)


@pytest.mark.parametrize("model", MODELS, ids=lambda case: case.kind)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_alone(name, model):
    """Every choice, everywhere in a model."""
    of = OPERATIONS[name]
    for where in places(build(model), of.target):
        for choice in of.choices:
            check(Case(**{**vars(model), "operations": ((name, where, choice),)}))


# --- the check itself, on eager layers that are broken on purpose ---


def broken(change, seed=0):
    """How many of 40 drawn cases are told from an eager twin that `change(run)` has altered."""

    def twin(case, ours):
        run = Run(case)
        change(run)
        return run

    pick, told = random.Random(seed).choice, 0
    for _ in range(40):
        try:
            check(draw_case(pick), twin)
        except Difference:
            told += 1
    return told


def around(f):
    """A change of what a run's call gives."""

    def change(run):
        call = run.call
        run.call = lambda *args: f(call, *args)

    return change


def other_eps(run):
    for m in run.model.modules():
        if hasattr(m, "eps"):
            m.eps = 0.1


def refuse(call, *args):
    raise OSError


BROKEN = {
    "eps": (other_eps, 8),
    "operations ignored": (lambda run: setattr(run, "operate", lambda *_: None), 8),
    "dtype": (around(lambda call, *args: call(*args).to(F64)), 20),
    "value": (around(lambda call, *args: call(*args) * 1.01), 20),
    "gradient": (around(lambda call, m, x, r: call(m, x.detach(), r)), 20),
    "scaled gradient": (around(lambda call, m, x, r: call(m, 1.01 * x - 0.01 * x.detach(), r)), 8),
    "called twice": (around(lambda call, *args: (call(*args), call(*args))[1]), 2),
    "an error": (around(refuse), 30),
}


@pytest.mark.parametrize(("change", "least"), BROKEN.values(), ids=BROKEN)
def test_the_check_tells_a_broken_twin(change, least):
    assert broken(change) >= least


def test_the_check_tells_no_eager_layer_from_itself():
    assert broken(lambda run: None) == 0


def test_the_check_tells_silence_from_an_error():
    case = Case(operations=(("assigned", "linear.weight", True),))
    with pytest.raises(Difference, match=r"^error: no error, eager RuntimeError"):
        check(case, lambda case, ours: Run(Case()))


def test_the_check_counts_bytes():
    case = Case(settings={"activation": "gelu"}, operations=(("measured", "", "bytes"),))
    keeps = around(lambda call, m, x, r: call(m, x, r) + 0 * x.sin().cos())
    with pytest.raises(Difference, match=r"^bytes"):
        check(case, lambda case, ours: (run := Run(case), keeps(run))[0])


@pytest.mark.parametrize("change", ("eps", "hook", "norm"))
def test_a_compiled_layer_notices_surgery(change):
    results = []
    for ours in (False, True):
        run = Run(Case(dtype=F64), ours)
        f = torch.compile(run.model, backend="aot_eager")
        f(run.x)
        if change == "eps":
            run.model.norm.eps = 0.5
        elif change == "hook":
            run.model.linear.register_forward_hook(lambda module, args, y: 2 * y)
        else:
            run.model.norm = nn.Identity()
        results.append(f(run.x))
    torch.testing.assert_close(*results)
