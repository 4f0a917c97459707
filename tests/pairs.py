"""FusedResidual beside Residual with the same parameters, for the tests of transforms."""

import torch
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from fusedres import FusedResidual, Residual

K, N, M = 5, 5, 4
LAYERS = {
    "note": {},
    "preact-rms-channel-gate": {
        "order": "preact",
        "norm": "rms",
        "activation": "gelu",
        "gate": "channel",
    },
    "postnorm-scalar-gate": {
        "order": "postnorm",
        "activation": "tanh",
        "gate": "scalar",
        "gate_init": 0.7,
    },
    "bert-pad": {
        "order": "bert-output",
        "out_features": 7,
        "shortcut": "pad",
        "residual_scale": 0.5,
    },
    "resnet-linear-shortcut": {"order": "resnet-v1", "activation": "silu", "out_features": 3},
}


def assert_same(ours, plain, tolerance=1e-6):
    """Trees of tensors, each within `tolerance` of the other's largest value."""
    ours, plain = tree_leaves(ours), tree_leaves(plain)
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert b.abs().max() > 0, "nothing to compare"
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def make_pair(settings):
    fused, plain = FusedResidual(K, **settings), Residual(K, **settings)
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(0.3 * torch.randn_like(p))
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def weights(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


def loss_of(layer, cotangent):
    """(parameters, x) -> number."""
    return lambda params, x: (functional_call(layer, params, (x,)) * cotangent).sum()


def both(pair, check, tolerance=1e-6):
    """The results of `check(layer)` agree; it sees the same random numbers for each layer."""
    results = []
    for layer in pair:
        torch.manual_seed(1)
        results.append(check(layer))
    assert_same(*results, tolerance)


def per_sample(layer):
    c = torch.randn(layer.out_features)
    return vmap(grad(lambda p, x: (functional_call(layer, p, (x[None],)) * c).sum()), (None, 0))
