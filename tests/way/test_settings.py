"""Settings as users write them: other kinds of number, names with a slip, modules for names."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres import (
    FusedResidual,
    FusedResidualMLP,
    FusedResidualStack,
    FusedSequential,
    Residual,
    explain,
    fused_residual,
    register_activation,
)

LAYERS = [Residual, FusedResidual, FusedResidualMLP, lambda n, **s: FusedResidualStack(n, 2, **s)]
each = pytest.mark.parametrize("make", LAYERS, ids=["Residual", "FusedResidual", "MLP", "Stack"])


@each
def test_numbers_of_numpy(make):
    settings = {"eps": np.float32(1e-3), "dropout": np.float64(0.25), "momentum": np.float32(0.5)}
    layer = make(np.int64(8), residual_scale=np.float16(0.5), bias=np.bool_(True), **settings)
    own = make(8, eps=float(np.float32(1e-3)), dropout=0.25, momentum=0.5, residual_scale=0.5)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(layer.eval()(x), own.eval()(x))


MEANT = [
    ({"norm": "leyer"}, "unknown norm 'leyer'; did you mean 'layer'"),
    ({"norm": "LayerNorm"}, "did you mean 'layer'"),
    ({"norm": nn.LayerNorm}, "unknown norm LayerNorm, not a name; did you mean 'layer'"),
    ({"norm": nn.BatchNorm1d(8)}, "unknown norm BatchNorm1d, not a name; did you mean 'batch'"),
    ({"norm": ["rms"]}, "unknown norm list, not a name"),
    ({"activation": "GeLU"}, "unknown activation 'GeLU'; did you mean 'gelu'"),
    ({"activation": nn.SiLU()}, "unknown activation SiLU, not a name; did you mean 'silu'"),
    ({"activation": "swish"}, "unknown activation 'swish'; did you mean 'silu'"),
    ({"activation": F.leaky_relu}, "did you mean 'leaky_relu'"),
    ({"activation": torch.tanh}, "did you mean 'tanh'"),
    ({"gate": "scaler"}, "did you mean 'scalar'"),
    ({"backend": "cuda:0"}, "unknown backend 'cuda:0'; did you mean 'cuda'"),
    ({"order": "pre-act"}, "unknown stage 'pre' in order 'pre-act'"),
    ({"order": "prenorn"}, "did you mean 'prenorm'"),
    ({"order": ["linear", "norm", "act", "add"]}, "order must be a string"),
    ({"order": None}, "order must be a string"),
    ({"bias": "no"}, "bias must be True or False, got 'no'"),
    ({"bias": torch.zeros(8)}, "bias must be True or False"),
    ({"momentum": -0.1}, "momentum must be None or between 0 and 1, got -0.1"),
    ({"eps": "small"}, "eps must be a finite number >= 0, got 'small'"),
    ({"dropout": [0.1]}, r"dropout must be a probability between 0 and 1, got \[0.1\]"),
]


@each
@pytest.mark.parametrize("settings, message", MEANT)
def test_what_is_refused_by_name(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(8, **settings)


@each
def test_a_gate_s_value_without_a_gate_is_warned_of(make):
    with pytest.warns(UserWarning, match=r"gate_init=0\.5 does nothing, since gate is None"):
        make(8, gate_init=0.5)


@pytest.mark.parametrize("shortcut", [nn.Linear, "Linear", lambda x: x])
def test_a_shortcut_that_is_none(shortcut):
    with pytest.raises(ValueError, match=r"unknown shortcut .*known: identity, linear"):
        FusedResidual(8, shortcut=shortcut)


def test_from_layers_takes_modules():
    with pytest.raises(TypeError, match=r"norm must be a module such as .*, got 'layer'"):
        FusedResidual.from_layers(nn.Linear(8, 8), "layer")
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got int"):
        FusedResidual.from_layers(8)


@pytest.mark.parametrize("name, value", [("eps", 0.1), ("momentum", 0.5), ("bias", False)])
def test_from_layers_refuses_what_its_modules_decide(name, value):
    with pytest.raises(
        TypeError, match=f"{name} is what the given modules have, got {name}={value}"
    ):
        FusedResidual.from_layers(nn.Linear(8, 8), nn.LayerNorm(8), **{name: value})


def test_messages_blame_the_argument_that_was_given():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 8\): features=8"):
        FusedResidualMLP(8)(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"shortcut_weight has shape \(6, 7\), expected \(R, 8\)"):
        fused_residual(x, weight, shortcut_weight=torch.randn(6, 7))
    with pytest.raises(ValueError, match=r"shortcut_bias has shape \(5,\), expected \(6,\)"):
        fused_residual(x, weight, shortcut_weight=weight, shortcut_bias=torch.randn(5))
    with pytest.raises(TypeError, match=r"shortcut_weight must be a torch\.Tensor, got ndarray"):
        fused_residual(x, weight, shortcut_weight=np.zeros((6, 8)))
    with pytest.raises(ValueError, match="shortcut='pad' uses no shortcut_weight"):
        fused_residual(x, weight, shortcut="pad", shortcut_weight=weight)


ASSIGNED = {  # what of a layer may change once it is there; the rest is refused
    "order": ("preact", "foo"),
    "activation": ("silu", "gleu"),
    "dropout": (0.5, 2),
    "drop_path": (0.9, -1),
    "residual_scale": (0.5, "x"),
}
REFUSED = ("norm", "bias", "gate", "shortcut", "eps", "momentum", "gate_init")


@pytest.mark.parametrize("name", ASSIGNED)
@pytest.mark.parametrize("make", [Residual, FusedResidual, LAYERS[3]], ids=lambda m: m.__name__)
def test_what_may_be_assigned_counts_at_the_next_call(make, name):
    layer, x = make(8), torch.randn(64, 8)
    before, (good, bad) = layer(x), ASSIGNED[name]
    setattr(layer, name, good)
    assert not torch.equal(layer(x), before)
    with pytest.raises((ValueError, TypeError)):  # at once, or at the call
        setattr(layer, name, bad)
        layer(x)
    setattr(layer, name, good)
    assert layer(x).shape == before.shape


@each
def test_a_backend_may_be_assigned(make):
    layer, x = make(8), torch.randn(3, 8)
    before = layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x), before)
    with pytest.raises(ValueError, match="unknown backend 'gpu'; did you mean 'cuda'"):
        layer.backend = "gpu"
    assert layer.backend == "reference"


def test_a_stack_s_norm_and_eps_may_be_assigned():
    layer, x = FusedResidualStack(8, 2), torch.randn(64, 8)
    before = layer(x)
    layer.eps = 0.5
    assert not torch.equal(layer(x), before)
    layer.norm = None
    assert torch.equal(layer(x), FusedResidualStack.from_layers(layer.to_layers())(x))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "make", [LAYERS[0], LAYERS[1], LAYERS[2]], ids=["Residual", "Fused", "MLP"]
)
def test_what_only_a_constructor_reads_is_refused(make, name):
    layer, x = make(8), torch.randn(3, 8)
    before = layer(x)
    with pytest.raises((AttributeError, TypeError), match=name):
        setattr(layer, name, "pad" if name == "shortcut" else "scalar")
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "name", ["features", "hidden_features", "out_features", "order", "dropout"]
)
def test_a_block_s_settings_are_its_layers(name):
    block, x = FusedResidualMLP(8), torch.randn(3, 8)
    with pytest.raises(AttributeError, match=f"FusedResidualMLP: {name} cannot be assigned"):
        setattr(block, name, getattr(block, name, 0.5))
    block.backend = "reference"
    assert block.fc1.backend == block.fc2.backend == "reference"
    before = block(x)
    block.fc1.activation = "relu"
    assert not torch.equal(block(x), before)


@pytest.mark.parametrize("name", ["features", "depth", "layers_per_block", "gate_kind"])
def test_a_stack_s_shapes_stay(name):
    stack = FusedResidualStack(8, 2)
    with pytest.raises(AttributeError, match=f"FusedResidualStack: {name} cannot be assigned"):
        setattr(stack, name, 4)
    assert stack(torch.randn(3, 8)).shape == (3, 8)


VECTORS = ("bias", "norm_weight", "norm_bias", "gate", "running_mean")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["x", "weight", "residual", "shortcut_weight", *VECTORS])
def test_a_sparse_tensor_is_refused_by_name(name, backend):
    operands = {"x": torch.randn(4, 8), "weight": torch.randn(8, 8)}
    if name == "running_mean":
        operands |= {"norm": "batch", "running_var": torch.ones(8)}
    rows = {"x": 4, "residual": 4}.get(name, 8)
    sparse = torch.randn((8,) if name in VECTORS else (rows, 8)).to_sparse()
    with pytest.raises(TypeError, match=rf"{name} must be dense \(torch.strided\), got torch.sp"):
        fused_residual(**operands | {name: sparse}, backend=backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@each
def test_a_nested_tensor_is_refused(make, layout):
    layer, parts = make(8), [torch.randn(2, 8), torch.randn(3, 8)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    for call in (layer, FusedSequential(layer, nn.Identity()), partial(explain, layer)):
        with pytest.raises(TypeError, match=r"x must be dense .* got a nested tensor"):
            call(nested)
    if make in (Residual, FusedResidual, FusedResidualMLP):
        with pytest.raises(TypeError, match=r"residual must be dense .* got a nested tensor"):
            layer(torch.randn(5, 8), nested)


def test_the_environment_is_named_where_it_refuses(monkeypatch, native):
    monkeypatch.setenv("FUSEDRES_BACKEND", "cuda")
    from fusedres import backends

    backends.choose.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match="FUSEDRES_BACKEND='cuda' cannot run"):
            FusedResidual(8)(torch.randn(3, 8))
    finally:
        backends.choose.cache_clear()


WEIGHTS = torch.ones(3)


@pytest.mark.parametrize(
    "function, error, message",
    [
        (nn.SiLU, TypeError, "must be a function, got the class SiLU"),
        (np.tanh, TypeError, "must be of torch ops, got a numpy function"),
        ("tanh", TypeError, "must be a function of a tensor, got str"),
        (lambda h: h if h.sum() > 0 else -h, ValueError, "it reads a number out of h"),
        (lambda h: h * torch.ones(15), ValueError, "a tensor of one shape meets h"),
        (lambda h: h * WEIGHTS.sum(), ValueError, r"it captures a Tensor of shape \(3,\)"),
        (nn.PReLU(), ValueError, "it captures a Parameter"),
        (lambda h: torch.tensor(np.tanh(h.numpy())), ValueError, "it calls numpy"),
    ],
)
def test_no_activation(function, error, message):
    with pytest.raises(error, match=message):
        register_activation("not_an_activation", function)


@pytest.mark.parametrize("cls", [FusedResidual, FusedResidualMLP, FusedResidualStack])
def test_help_says_it_all(cls):
    for word in ("Args:", "Shapes:", "Raises", "Source", "norm", "activation", "dropout"):
        assert word in cls.__doc__, word


@pytest.mark.parametrize("make", [FusedResidual, lambda n: FusedResidualMLP(n, n)])
@pytest.mark.parametrize("autocast", [False, True])
def test_integers_are_refused_by_their_dtype(make, autocast):
    layer = make(8)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=r"x has dtype torch.int64, expected one of torch.float32"),
    ):
        layer(torch.ones(4, 8, dtype=torch.int64))


def test_an_activation_module_is_not_told_to_be_registered():
    with pytest.raises(ValueError, match="did you mean 'gelu'") as told:
        FusedResidual(8, activation=nn.GELU())
    assert "register_activation" not in str(told.value)
