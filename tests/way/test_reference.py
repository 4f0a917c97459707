"""The oracle itself, against formulas written out by hand: nothing here calls run_stages."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from cases import ALIASES, DIFFERENTIABLE, STATISTICS, make_case
from fusedres import ACTIVATIONS, NORMS, Residual
from fusedres.reference import ACTIVATION_FUNCTIONS, draw_seed, philox, rows_per_sample
from oracle import exact, gradients

SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
BY_HAND = {
    "relu": lambda h: (h + h.abs()) / 2,
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    "relu2": lambda h: h * (h + h.abs()) / 2,
    "relu6": lambda h: h.clamp(0, 6),
    "elu": lambda h: torch.where(h > 0, h, h.exp() - 1),
    "selu": lambda h: SELU_SCALE * torch.where(h > 0, h, SELU_ALPHA * (h.exp() - 1)),
    "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
    "gelu_tanh": lambda h: h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h * (0.5 + 0.5 * torch.tanh(h / 2)),
    "mish": lambda h: h * torch.tanh(torch.log(1 + h.exp())),
    "softplus": lambda h: torch.log(1 + h.exp()),
    "hardswish": lambda h: h * (h + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda h: (h + 3).clamp(0, 6) / 6,
    "sigmoid": lambda h: 1 / (1 + (-h).exp()),
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
    "sin": lambda h: (torch.exp(1j * h) - torch.exp(-1j * h)).imag / 2,
    "softsign": lambda h: h / (1 + h.abs()),
}


def norm_by_hand(kind, gamma, beta, eps, t):
    if kind is None:
        return t
    if kind == "rms":
        h = t / (t.square().mean(1, keepdim=True) + eps).sqrt() * gamma
        return h if beta is None else h + beta
    dim = 1 if kind == "layer" else 0
    centred = t - t.mean(dim, keepdim=True)
    return gamma * centred / (centred.square().mean(dim, keepdim=True) + eps).sqrt() + beta


def layer_by_hand(alias, x, W, b, norm, act, r, s):
    """Each alias as its paper draws it."""
    return {
        "note": lambda: act(norm(x @ W.T + b)) + s * r,
        "resnet-v1": lambda: act(norm(x @ W.T + b) + s * r),
        "preact": lambda: act(norm(x)) @ W.T + b + s * r,
        "prenorm": lambda: act(norm(x) @ W.T + b) + s * r,
        "postnorm": lambda: norm(act(x @ W.T + b) + s * r),
        "bert-output": lambda: norm(x @ W.T + b + s * r),
        "branch-norm": lambda: norm(act(x @ W.T + b)) + s * r,
    }[alias]()


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("given", [False, True], ids=["x", "residual"])
def test_every_alias_is_its_formula(alias, norm, given):
    eps, s = 1e-3, 0.5
    for activation in ("gelu", "tanh"):
        case = make_case(
            9,
            11,
            order=alias,
            norm=norm,
            activation=activation,
            eps=eps,
            residual_scale=s,
            dtype=torch.float64,
            residual=11 if given else None,
            norm_bias=norm is not None,
        )
        leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
        x, W, b, gamma, beta = (leaves.get(name) for name in DIFFERENTIABLE[:5])
        y = layer_by_hand(
            alias,
            x,
            W,
            b,
            partial(norm_by_hand, norm, gamma, beta, eps),
            BY_HAND[activation],
            leaves.get("residual", x),
            s,
        )
        ours, by_hand = exact(case), gradients(leaves, case.asked, y, case.dy)
        for name in by_hand:
            torch.testing.assert_close(ours[name], by_hand[name], rtol=1e-11, atol=1e-12)


def test_batch_norm_in_evaluation_is_a_fixed_scale_and_shift():
    case = make_case(9, 11, norm="batch", training=False, dtype=torch.float64, activation="silu")
    t = case.tensors
    z = t["x"] @ t["weight"].T + t["bias"]
    h = (z - t["running_mean"]) / (t["running_var"] + 1e-5).sqrt() * t["norm_weight"] + t[
        "norm_bias"
    ]
    torch.testing.assert_close(
        exact(case)["y"], BY_HAND["silu"](h) + t["x"], rtol=1e-12, atol=1e-13
    )


def test_gate_pad_and_a_wider_sum():
    case = make_case(
        9,
        5,
        8,
        norm="rms",
        activation="sin",
        gate="channel",
        residual_scale=-2.0,
        pad=True,
        dtype=torch.float64,
    )
    t = case.tensors
    h = norm_by_hand("rms", t["norm_weight"], None, 1e-5, t["x"] @ t["weight"].T + t["bias"])
    shortcut = torch.cat([t["x"], torch.zeros(9, 3, dtype=torch.float64)], 1)
    y = t["gate"] * torch.sin(h) - 2.0 * shortcut
    torch.testing.assert_close(exact(case)["y"], y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_formula(name):
    assert BY_HAND.keys() == ACTIVATION_FUNCTIONS.keys() == set(ACTIVATIONS)
    h = torch.linspace(-8, 8, 1000, dtype=torch.float64, requires_grad=True)  # no kink among them
    dy = torch.randn(1000, dtype=torch.float64)
    (ours,) = torch.autograd.grad(ACTIVATION_FUNCTIONS[name](h), h, dy)
    (by_hand,) = torch.autograd.grad(BY_HAND[name](h), h, dy)
    torch.testing.assert_close(
        ACTIVATION_FUNCTIONS[name](h), BY_HAND[name](h), rtol=1e-9, atol=1e-13
    )
    torch.testing.assert_close(ours, by_hand, rtol=1e-8, atol=1e-12)


def philox4x32_10(key, counter):
    """Salmon et al. 2011 in Python's own integers; all four words in, all four out."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


FULL = 0xFFFFFFFF
KNOWN_ANSWERS = [  # philox4x32 10 in Random123's tests/kat_vectors: key, counter, output
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL), (FULL,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "output"), KNOWN_ANSWERS)
def test_philox_in_integers_gives_the_published_answers(key, counter, output):
    assert philox4x32_10(key, counter) == output


def test_philox_is_philox():
    """Counter (index low, index high, stream, 0), first word; known answers among them."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, 0).item() == 0x6627E8D5
    seeds = torch.cat(
        [torch.randint(-(2**63), 2**63 - 1, (20,)), torch.tensor([-1, -(2**63), 2**63 - 1])]
    )
    index = torch.tensor([0, 1, 338, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, 2**62])
    for seed in seeds:
        for stream in (0, 1):
            key = (int(seed) & FULL, (int(seed) >> 32) & FULL)
            words = [philox4x32_10(key, (int(i) & FULL, int(i) >> 32, stream, 0))[0] for i in index]
            assert philox(seed, index, stream).tolist() == words


def dropped(dropout=0.0, drop_path=0.0, lead=(400, 5), features=64):
    """Which elements a layer whose branch is all ones drops, and what it makes of the others."""
    layer = Residual(
        features,
        order="linear",
        norm=None,
        activation=None,
        bias=False,
        dropout=dropout,
        drop_path=drop_path,
    )
    nn.init.eye_(layer.linear.weight)
    y = layer(torch.ones(*lead, features)).detach()
    return y == 0, y[y != 0].unique().tolist()


def test_dropout_statistics():
    """The share kept, scaled, is binomial: within 5 sigma of 1 - p; neighbours are independent."""
    for p in (0.1, 0.5, 0.9):
        mask, values = dropped(dropout=p)
        mask = mask.double()
        assert abs(mask.mean() - p) <= 5 * math.sqrt(p * (1 - p) / mask.numel())
        assert values == pytest.approx([1 / (1 - p)], rel=1e-6)
        for a, b in ((mask[..., 1:], mask[..., :-1]), (mask[:, 1:], mask[:, :-1])):
            covariance = ((a - p) * (b - p)).mean()
            assert abs(covariance) <= 5 * p * (1 - p) / math.sqrt(a.numel())
    assert dropped(dropout=1.0)[0].all() and not dropped(dropout=0.0)[0].any()


def test_drop_path_drops_whole_samples():
    for lead in ((2000,), (2000, 3), (2000, 2, 3)):
        mask, values = dropped(drop_path=0.3, lead=lead, features=4)
        samples = mask.reshape(lead[0], -1)
        assert torch.equal(samples.any(1), samples.all(1)), (
            "a sample is dropped as a whole or not at all"
        )
        assert abs(samples[:, 0].double().mean() - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / 2000)
        assert values == pytest.approx([1 / 0.7], rel=1e-6)


def test_masks_follow_torchs_generator_and_the_streams_differ():
    torch.manual_seed(3)
    first, _ = dropped(dropout=0.5)
    second, _ = dropped(dropout=0.5)
    torch.manual_seed(3)
    again, _ = dropped(dropout=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    seed, index = draw_seed(torch.device("cpu")), torch.arange(1000)
    assert not torch.equal(philox(seed, index, 0), philox(seed, index, 1))


@pytest.mark.parametrize(
    ("shape", "rows"), [((7, 5), 1), ((5,), 1), ((2, 3, 5), 3), ((2, 3, 4, 5), 12), ((0, 3, 5), 3)]
)
def test_rows_per_sample(shape, rows):
    assert rows_per_sample(torch.empty(shape)) == rows


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
@pytest.mark.parametrize("order", ["linear-norm", "norm-linear"])
def test_running_statistics_are_those_of_torch(momentum, order):
    layer = Residual(6, order=order, norm="batch", activation=None, momentum=momentum).double()
    torchs = nn.BatchNorm1d(6, momentum=momentum).double()
    for _ in range(3):
        x = 3 + 2 * torch.randn(4, 5, 6, dtype=torch.float64)
        layer(x)
        torchs((layer.linear(x) if order == "linear-norm" else x).reshape(-1, 6))
    for name, expected in torchs.state_dict().items():
        torch.testing.assert_close(layer.norm.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    assert layer.norm.num_batches_tracked == 3
    before = {name: t.clone() for name, t in layer.norm.state_dict().items()}
    layer.eval()(x)
    assert all(torch.equal(layer.norm.state_dict()[name], t) for name, t in before.items())


def test_composite_updates_running_statistics_with_the_unbiased_variance():
    case = make_case(7, 5, norm="batch", dtype=torch.float64)
    t = case.tensors
    z = t["x"] @ t["weight"].T + t["bias"]
    result = exact(case)
    for name, batch in zip(STATISTICS, (z.mean(0), z.var(0, correction=1)), strict=True):
        torch.testing.assert_close(
            result[name], 0.9 * t[name] + 0.1 * batch, rtol=1e-12, atol=1e-12
        )
