"""What PyTorch programs do to modules after building them, done to `Residual` and `FusedResidual`
alike: both must go on as one layer. And when a fused call may go past a submodule, told by explain.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fusedres import FusedResidual, Residual, explain

K = 8


class Softplus(nn.Module):
    def forward(self, t):
        return nn.functional.softplus(t)


class LoRA(nn.Module):
    """As adapters do: a module in the place of the linear, without its attributes."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(K, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def put(path, value):
    """Sets layer.`path` to value, or to value(what it was)."""

    def change(layer):
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, layer)
        plain = not callable(value) or isinstance(value, nn.Module)
        setattr(owner, name, copy.deepcopy(value) if plain else value(getattr(owner, name)))

    return change


def tensor_for_parameter(*paths):
    """As a hyper-network, FSDP or DataParallel does: a plain tensor, computed, in its place."""

    def change(layer):
        for path in paths:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, layer)
            value = getattr(owner, name)
            delattr(owner, name)
            tensor = (value.detach() * 1.5).requires_grad_(value.requires_grad)
            setattr(owner, name, tensor)

    return change


def hook(path, kind, *args, **settings):
    """Registers a hook that changes what it sees, so that it cannot be missed."""

    def double(*seen):
        values = seen[2] if kind == "forward" else seen[1]
        if isinstance(values, tuple):
            return tuple(v if v is None else 2 * v for v in values)
        return 2 * values

    def change(layer):
        module = layer.get_submodule(path)
        getattr(module, f"register_{kind}_hook")(double, *args, **settings)

    return change


def own_forward(path):
    def change(layer):
        module = layer.get_submodule(path)
        forward = module.forward
        module.forward = lambda t: 3 * forward(t)

    return change


def eval_of(path):
    return lambda layer: layer.get_submodule(path).eval()


BATCH, GATE, WIDE = {"norm": "batch"}, {"gate": "channel", "gate_init": 0.5}, {"out_features": 12}
FUSED, STAGES = True, False  # what must become of the call
SURGERY = {
    "eps": ({}, put("norm.eps", 0.5), FUSED),
    "eps of batch norm": (BATCH, put("norm.eps", 0.5), FUSED),
    "eps None": ({"norm": "rms", "eps": 0.5}, put("norm.eps", None), FUSED),
    "momentum": (BATCH, put("norm.momentum", 0.5), FUSED),
    "momentum None": (BATCH, put("norm.momentum", None), FUSED),
    "no statistics": (BATCH, put("norm.track_running_stats", False), FUSED),
    "no buffers": (
        BATCH,
        lambda m: [setattr(m.norm, n, None) for n in ("running_mean", "running_var")],
        FUSED,
    ),
    "frozen statistics": (BATCH, eval_of("norm"), FUSED),
    "no norm": ({}, put("norm", None), FUSED),
    "no norm, preact": ({"order": "preact"}, put("norm", None), FUSED),
    "a norm where none was": ({"norm": None}, put("norm", nn.RMSNorm(K, 0.1)), FUSED),
    "layer to rms": ({}, put("norm", nn.RMSNorm(K)), FUSED),
    "layer to batch": ({}, put("norm", nn.BatchNorm1d(K, 0.1)), FUSED),
    "layer without affine": ({}, put("norm", nn.LayerNorm(K, elementwise_affine=False)), FUSED),
    "a foreign norm": ({"norm": None}, put("norm", nn.GroupNorm(2, K)), STAGES),
    "rms norm is given a bias": ({"norm": "rms"}, put("norm.bias", torch.ones(K)), FUSED),
    "Identity": (BATCH, put("norm", nn.Identity()), STAGES),
    "no gate": (GATE, put("gate", None), FUSED),
    "a gate where none was": ({}, put("gate", nn.Parameter(torch.full((K,), 0.3))), FUSED),
    "channel to scalar": (GATE, put("gate", nn.Parameter(torch.tensor([0.3]))), FUSED),
    "gate of no dimension": (GATE, put("gate", nn.Parameter(torch.tensor(0.3))), STAGES),
    "a wider linear": ({"order": "linear-act"}, put("linear", nn.Linear(K, 20)), FUSED),
    "a lazy linear": ({}, put("linear", nn.LazyLinear(K)), FUSED),
    "a lazy norm": (BATCH, put("norm", lambda _: nn.LazyBatchNorm1d()), FUSED),
    "LoRA": ({}, put("linear", LoRA), STAGES),
    "LoRA on the shortcut": (WIDE, put("shortcut", LoRA), FUSED),
    "another shortcut": (WIDE, put("shortcut", nn.Sequential(nn.Linear(K, 12), nn.Tanh())), FUSED),
    "a shortcut where none was": ({}, put("shortcut", nn.Linear(K, K)), FUSED),
    "activation": ({}, put("activation", "tanh"), FUSED),
    "activation by a module": ({}, put("activation", nn.GELU("tanh")), FUSED),
    "no activation": ({}, put("activation", None), FUSED),
    "order": (BATCH, put("order", "preact"), FUSED),
    "dropout off": ({"dropout": 0.5}, put("dropout", 0.0), FUSED),
    "drop-path off": ({"drop_path": 0.5}, put("drop_path", 0.0), FUSED),
    "dropout on": ({}, put("dropout", 0.5), FUSED),
    "residual_scale": ({}, put("residual_scale", 0.25), FUSED),
    "backend": ({}, put("backend", "reference"), FUSED),
    "tensors for parameters": (
        {**BATCH, **GATE},
        tensor_for_parameter(
            "linear.weight",
            "linear.bias",
            "norm.weight",
            "norm.bias",
            "gate",
            "norm.running_mean",
            "norm.running_var",
        ),
        FUSED,
    ),
    "tensors for the shortcut's": (
        WIDE,
        tensor_for_parameter("shortcut.weight", "shortcut.bias"),
        FUSED,
    ),
    "parametrized gate": (
        GATE,
        lambda m: parametrize.register_parametrization(m, "gate", Softplus()),
        FUSED,
    ),
    "parametrized weight": ({}, lambda m: parametrizations.weight_norm(m.linear), FUSED),
    "spectral norm": ({}, lambda m: parametrizations.spectral_norm(m.linear), FUSED),
    "spectral norm, eps None": (
        {"norm": None},
        lambda m: (put("norm", nn.RMSNorm(K))(m), parametrizations.spectral_norm(m.linear)),
        FUSED,
    ),
    "parametrized norm": (
        {},
        lambda m: parametrize.register_parametrization(m.norm, "weight", Softplus()),
        FUSED,
    ),
    "parametrized shortcut": (WIDE, lambda m: parametrizations.spectral_norm(m.shortcut), FUSED),
    "weight_norm by hooks": ({}, lambda m: nn.utils.weight_norm(m.linear), STAGES),
    "pruned linear": ({}, lambda m: prune.l1_unstructured(m.linear, "weight", 0.5), STAGES),
    "pruned for good": (
        {},
        lambda m: prune.remove(prune.l1_unstructured(m.linear, "weight", 0.5), "weight"),
        FUSED,
    ),
    "pruned norm": ({}, lambda m: prune.random_unstructured(m.norm, "weight", 0.5), STAGES),
    "pruned gate": (GATE, lambda m: prune.l1_unstructured(m, "gate", 0.5), FUSED),
    "frozen": ({}, lambda m: m.linear.requires_grad_(False), FUSED),
    "deepcopy": (GATE, put("linear", copy.deepcopy), FUSED),
    "forward of its own": ({}, own_forward("linear"), STAGES),
    "a norm with a forward": ({}, own_forward("norm"), STAGES),
    "a shortcut with a forward": (WIDE, own_forward("shortcut"), FUSED),
    **{
        f"{kind} hook of {path}": (
            {**BATCH, **WIDE, "order": "linear-norm-act-add"},
            hook(path, kind),
            FUSED if path == "shortcut" else STAGES,
        )
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
        for path in ("linear", "norm", "shortcut")
    },
    "hook, always called": ({}, hook("norm", "forward", always_call=True), STAGES),
}


def pair(settings):
    torch.manual_seed(1)
    plain = Residual(K, **copy.deepcopy(settings))
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.2 * torch.randn(p.shape)
    fused = FusedResidual(K, **copy.deepcopy(settings))
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def assert_same(plain, fused, *inputs, steps=2):
    """y, every gradient and every buffer, for some calls in training and one in evaluation."""
    found = []
    for layer in (plain, fused):
        torch.manual_seed(3)
        for _ in range(steps):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = layer(*leaves)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            layer.zero_grad()
            y.backward(dy)
        grads = {name: p.grad for name, p in layer.named_parameters()}
        state = {name: b.clone() for name, b in layer.named_buffers()}
        for path, module in layer.named_modules():
            plain = {
                f"{path}.{k}": t for k, t in vars(module).items() if isinstance(t, torch.Tensor)
            }
            grads |= {f"{k}.grad": t.grad for k, t in plain.items() if t.is_leaf}
            state |= {k: t.detach().clone() for k, t in plain.items()}
        grads |= {f"d{i}": t.grad for i, t in enumerate(leaves)}
        modes = {module: module.training for module in layer.modules()}
        found.append({"y": y, "eval": layer.eval()(*inputs), **grads, **state})
        for module, training in modes.items():
            module.training = training
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", SURGERY)
@pytest.mark.filterwarnings("ignore")  # of lazy modules and the old weight_norm
def test_both_layers_live_on_as_one(name):
    settings, change, fused_after = SURGERY[name]
    plain, fused = pair(settings)
    x = torch.randn(16, K)
    assert_same(
        plain, fused, x
    )  # what a layer keeps of its first calls must not outlive the change
    for layer in (plain, fused):
        torch.manual_seed(4)
        change(layer)
    assert_same(plain, fused, x)
    assert (fused.not_fused() is None) == (fused_after is FUSED), fused.not_fused()
    assert (explain(fused, x).calls[-1].backend == "eager") == (fused_after is STAGES)
