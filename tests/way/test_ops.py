"""The registered ops by themselves: torch.library.opcheck, and that an op's fake tells the truth.

The ops have no autograd of their own: FusedResidualFunction above them has it, and passes them
detached tensors. So opcheck gets tensors that require no gradient, with which its
test_autograd_registration has nothing to say; schema (no mutation, no aliasing), fakes and AOT
dispatch with dynamic shapes are what it checks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import oracle
from fusedres import ops
from fusedres.backends import native
from fusedres.operands import DIFFERENTIABLE

UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = {
    "note": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "batch": {"norm": "batch"},
    "batch, running statistics": {"norm": "batch", "training": False},
    "preact batch": {"order": "preact", "norm": "batch", "N": 7},
    "prenorm rms": {"order": "prenorm", "norm": "rms", "activation": "gelu"},
    "postnorm, explicit residual": {"order": "postnorm", "residual": 6},
    "resnet-v1, padded": {"order": "resnet-v1", "N": 9, "pad": True},
    "channel gate": {"gate": "channel", "residual_scale": 0.5},
    "dropout and drop-path": {"dropout": 0.3, "drop_path": 0.2, "gate": "scalar"},
    "linear alone": {"order": "linear", "norm": None, "activation": None, "N": 4},
    "linear and add": {"order": "linear-add", "norm": None, "activation": None},
    "add before linear": {"order": "add-linear", "norm": None, "activation": None, "residual": 6},
    "no bias, no affine": {"bias": False, "affine": False},
    "no rows": {"M": 0},
}


def forward_arguments(case, save=True):
    tensors = [case.tensors.get(name) for name in (*oracle.DIFFERENTIABLE, *oracle.STATISTICS)]
    if case.spec.batch_stats:
        tensors[-2:] = None, None
    seed = torch.tensor([7]) if case.spec.random else None
    return (*tensors, seed, 1, case.spec.text, save)


def backward_arguments(case, outputs, needs):
    *operands, recipe, _save = forward_arguments(case)
    return (case.dy, outputs[1:], *operands, recipe, needs)


def all_needs(case):
    return sum((name in case.tensors) << i for i, name in enumerate(oracle.DIFFERENTIABLE))


def make(name):
    return oracle.make_case(**{"M": 5, "K": 6, **CASES[name]})


@pytest.fixture
def tables(native):
    return ops.FORWARD[native], ops.BACKWARD[native]


@pytest.mark.parametrize("name", CASES)
def test_opcheck(tables, name):
    forward, backward = tables
    case = make(name)
    for save in (True, False):
        opcheck(forward, forward_arguments(case, save), test_utils=UTILS)
    outputs = forward(*forward_arguments(case))
    for needs in {all_needs(case), 1, 2} - {0}:
        opcheck(backward, backward_arguments(case, outputs, needs), test_utils=UTILS)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_fresh(tables, name):
    """No output shares memory with anything; fakes have the sizes, strides and dtypes of them."""
    forward, backward = tables
    case = make(name)
    arguments = forward_arguments(case)
    outputs = forward(*arguments)
    arguments_back = backward_arguments(case, outputs, all_needs(case))
    calls = (
        (arguments, outputs, ops.forward_fake),
        (arguments_back, backward(*arguments_back), ops.backward_fake),
    )
    for given, results, fake in calls:
        flat = [t for a in given for t in (a if isinstance(a, list) else [a])]
        storages = [
            t.untyped_storage().data_ptr()
            for t in (*flat, *results)
            if torch.is_tensor(t) and t.numel()
        ]
        inputs = {t.untyped_storage().data_ptr() for t in flat if torch.is_tensor(t) and t.numel()}
        assert len(set(storages)) == len(inputs) + sum(1 for t in results if t.numel())
        for real, meta in zip(results, fake(*given), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (
                meta.shape,
                meta.stride(),
                meta.dtype,
            )


def test_gradients_in_the_order_asked(tables):
    """Every subset of `needs` gives the gradients that all of them together give."""
    forward, backward = tables
    case = oracle.make_case(M=5, K=6, gate="channel", residual=6)
    outputs = forward(*forward_arguments(case))
    everything = 2 ** len(DIFFERENTIABLE) - 1
    assert all_needs(case) == everything
    every = backward(*backward_arguments(case, outputs, everything))
    for needs in range(1, everything):
        some = backward(*backward_arguments(case, outputs, needs))
        expected = [g for i, g in enumerate(every) if needs >> i & 1]
        assert len(some) == len(expected)
        for a, b in zip(some, expected, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_fakes_with_symbols():
    """make_fx with symbolic shapes: one trace, every batch size."""
    from torch.fx.experimental.proxy_tensor import make_fx

    if native.missing:
        pytest.skip(native.missing)
    case = oracle.make_case(M=5, K=6, bias=False)
    recipe = case.spec.text

    def call(x, weight, gamma, beta):
        return ops.FORWARD["cpu"](x, weight, None, gamma, beta, *(None,) * 5, 1, recipe, False)[0]

    others = tuple(case.tensors[name] for name in ("weight", "norm_weight", "norm_bias"))
    graph = make_fx(call, tracing_mode="symbolic")(case.x, *others)
    for rows in (5, 9):
        x = torch.randn(rows, 6)
        assert torch.equal(graph(x, *others), call(x, *others))


TRITON = """
import sys
sys.path[:0] = sys.argv[1:]
import test_ops, torch
from fusedres import backends, ops
assert backends.choose("triton", "linear-norm-act-add norm=layer activation=relu",
                       torch.float32, torch.device("cpu"), 6, 6) == "triton"
NAMES = ("note", "linear and add", "no bias, no affine", "batch", "preact batch", "prenorm rms")
for name in NAMES:
    case = test_ops.make(name)
    forward, backward = ops.FORWARD["triton"], ops.BACKWARD["triton"]
    arguments = test_ops.forward_arguments(case)
    test_ops.opcheck(forward, arguments, test_utils=test_ops.UTILS)
    arguments = test_ops.backward_arguments(case, forward(*arguments), test_ops.all_needs(case))
    test_ops.opcheck(backward, arguments, test_utils=test_ops.UTILS)
"""


def test_opcheck_of_the_triton_ops():
    """In the interpreter, to be chosen before Triton is imported: in a process of its own."""
    pytest.importorskip("triton")
    here = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", TRITON, str(here), str(here / "way")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(here.parent),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
