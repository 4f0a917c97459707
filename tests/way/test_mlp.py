"""FusedResidualMLP against the same block written with torch.nn layers."""

import pytest
import torch
from torch import nn

from fusedres import FusedResidual, FusedResidualMLP
from fusedres.mlp import MLP_ORDERS, split_order
from oracle import assert_as_accurate

NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "rms": nn.RMSNorm}
K, H = 37, 53


class Eager(nn.Module):
    """Every order of the table, in eager torch. Submodule names are its own."""

    def __init__(self, order, norm, act, K, H, N=None, gate=None, scale=1.0):
        super().__init__()
        N = K if N is None else N
        self.order, self.act, self.scale = order, act, scale
        widths = {
            "prenorm": (K,),
            "postnorm": (N,),
            "branch-norm": (N,),
            "bro": (H, N),
            "note": (H, N),
            "resnet-v1": (H, N),
            "preact": (K, H),
        }[order]
        kind = NORMS[norm]
        eps = {"eps": 1e-5}
        self.norms = nn.ModuleList(kind(width, **eps) for width in widths)
        self.w1, self.w2 = nn.Linear(K, H), nn.Linear(H, N)
        self.gate = None if gate is None else nn.Parameter(torch.full((N,), gate))
        self.skip = nn.Linear(K, N) if K != N else nn.Identity()

    def forward(self, x, residual=None):
        n, act, w1, w2 = [*self.norms, None][:2], self.act, self.w1, self.w2
        r = self.scale * (self.skip(x) if residual is None else residual)
        branch = {
            "prenorm": lambda: w2(act(w1(n[0](x)))),
            "postnorm": lambda: w2(act(w1(x))),
            "branch-norm": lambda: n[0](w2(act(w1(x)))),
            "bro": lambda: n[1](w2(act(n[0](w1(x))))),
            "note": lambda: act(n[1](w2(act(n[0](w1(x)))))),
            "resnet-v1": lambda: n[1](w2(act(n[0](w1(x))))),
            "preact": lambda: w2(act(n[1](w1(act(n[0](x)))))),
        }[self.order]()
        t = r + (branch if self.gate is None else self.gate * branch)
        return {"postnorm": n[0], "resnet-v1": act}.get(self.order, lambda t: t)(t)


def names_of(order):
    """Eager's parameters by FusedResidualMLP's documented state-dict keys."""
    first, second = split_order(order)
    norms = [f"fc{i}.norm" for i, half in ((1, first), (2, second)) if "norm" in half]
    names = {f"norms.{i}": name for i, name in enumerate(norms)}
    return names | {"w1": "fc1.linear", "w2": "fc2.linear", "gate": "fc2.gate", "skip": "shortcut"}


def copied(eager, fused, order):
    """Loads eager's state into fused, strictly; returns the map of keys."""
    names = names_of(order)
    keys = {}
    for key in eager.state_dict():
        prefix = max((p for p in names if key == p or key.startswith(p + ".")), key=len)
        keys[key] = names[prefix] + key[len(prefix) :]
    fused.load_state_dict({keys[key]: t for key, t in eager.state_dict().items()})
    return keys


def step(block, x, dy, keys=None, residual=None):
    x = x.clone().requires_grad_()
    y = block(x) if residual is None else block(x, residual)
    y.backward(dy)
    result = {"y": y.detach(), "x": x.grad}
    for name, p in block.named_parameters():
        result[keys[name] if keys else name] = p.grad
    for name, b in block.named_buffers():
        if b.is_floating_point():
            result[keys[name] if keys else name] = b.clone()
    return result


@pytest.mark.parametrize("norm", ["layer", "batch", "rms"])
@pytest.mark.parametrize("order", MLP_ORDERS)
def test_order_is_its_formula(order, norm):
    eager = Eager(order, norm, nn.functional.silu, K, H).double()
    fused = FusedResidualMLP(K, H, order=order, norm=norm, activation="silu").double()
    keys = copied(eager, fused, order)
    x, dy = torch.randn(2, 64, K, dtype=torch.float64)
    ours, theirs = step(fused, x, dy), step(eager, x, dy, keys)
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_eager(dtype):
    eager = Eager("prenorm", "layer", nn.functional.gelu, K, H).to(dtype)
    exact = Eager("prenorm", "layer", nn.functional.gelu, K, H).double()
    exact.load_state_dict(eager.state_dict())
    fused = FusedResidualMLP(K, H, dtype=dtype)
    keys = copied(eager, fused, "prenorm")
    x, dy = torch.randn(2, 256, K, dtype=dtype)
    true = step(exact, x.double(), dy.double(), keys)
    assert_as_accurate(step(fused, x, dy), step(eager, x, dy, keys), true, str(dtype))


def test_shape_gate_scale_and_linear_shortcut():
    settings = {"gate": 0.3, "scale": 0.5}
    eager = Eager("prenorm", "layer", nn.functional.gelu, K, H, 20, **settings).double()
    fused = FusedResidualMLP(
        K, H, 20, gate="channel", residual_scale=0.5, dtype=torch.float64, activation="gelu"
    )
    copied(eager, fused, "prenorm")
    x = torch.randn(2, 5, K, dtype=torch.float64)
    torch.testing.assert_close(fused(x), eager(x))
    r = torch.randn(2, 5, 20, dtype=torch.float64)  # skips the linear shortcut
    torch.testing.assert_close(fused(x, r), eager(x, r))
    assert fused.shortcut.weight.shape == (20, K)
    assert not torch.allclose(fused(x, r), fused(x))


def test_eval_of_batch_norm_uses_running_statistics():
    fused = FusedResidualMLP(K, norm="batch", activation="relu").double()
    x = torch.randn(64, K, dtype=torch.float64)
    for _ in range(3):
        fused(x)
    fused.eval()
    bn, w1, w2 = fused.fc1.norm, fused.fc1.linear, fused.fc2.linear
    assert bn.num_batches_tracked == 3
    torch.testing.assert_close(fused(x[:1]), x[:1] + w2(torch.relu(w1(bn(x[:1])))))


def test_rtdl_drops_at_both_places():
    block = FusedResidualMLP(64, 64, norm=None, activation=None, hidden_dropout=0.25, dropout=0.5)
    for layer in (block.fc1, block.fc2):
        nn.init.eye_(layer.linear.weight)
        nn.init.zeros_(layer.linear.bias)
    branch = block(torch.ones(1000, 64)) - 1
    kept = (branch != 0).double().mean().item()
    assert abs(kept - 0.75 * 0.5) < 0.01
    torch.testing.assert_close(branch[branch != 0].unique(), torch.tensor([1 / (0.75 * 0.5)]))
    assert (block.eval()(torch.ones(3, 64)) == 2).all()


def test_drop_path_drops_samples():
    block = FusedResidualMLP(8, drop_path=0.5)
    x = torch.randn(200, 4, 8)
    dropped = (block(x) == x).flatten(1)
    assert (dropped.all(1) == dropped.any(1)).all()
    assert 0.3 < dropped.all(1).double().mean() < 0.7


def test_identity_shortcut_of_other_width_wants_a_residual():
    block = FusedResidualMLP(8, 16, 16, shortcut="identity")  # hidden = out: h must not be taken
    with pytest.raises(ValueError, match="pass residual"):
        block(torch.randn(3, 8))
    x, r = torch.randn(3, 8), torch.randn(3, 16)
    torch.testing.assert_close(block(x, r) - block(x, torch.zeros(3, 16)), r)


def test_module_shortcut_gets_its_input():
    block = FusedResidualMLP(8, 16, 4, shortcut=nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    plain = FusedResidualMLP(8, 16, 4, order="norm-linear-act-linear")
    plain.load_state_dict({k: t for k, t in block.state_dict().items() if "shortcut" not in k})
    x = torch.randn(3, 8)
    torch.testing.assert_close(block(x), plain(x) + block.shortcut(x))


def test_double_backward_and_autocast():
    block = FusedResidualMLP(5, activation="tanh", norm=None).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert FusedResidualMLP(8, 16, 4)(torch.randn(3, 8)).dtype == torch.bfloat16
        assert FusedResidualMLP(8)(torch.randn(3, 8)).dtype == torch.float32  # + x


def test_defaults_and_keys():
    block = FusedResidualMLP(8)
    assert block.fc1.linear.weight.shape == (32, 8)
    assert isinstance(block.fc1, FusedResidual) and isinstance(block.fc2, FusedResidual)
    assert list(block.state_dict()) == [
        "fc1.linear.weight",
        "fc1.linear.bias",
        "fc1.norm.weight",
        "fc1.norm.bias",
        "fc2.linear.weight",
        "fc2.linear.bias",
    ]


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"order": "linear-act-add"}, "1 'linear' stages"),
        ({"order": "linear-linear-linear-add"}, "3 'linear' stages"),
        ({"order": "linear-foo-linear"}, "unknown stage 'foo'"),
        ({"order": "linear-add-linear"}, "'add' must follow"),
        ({"order": "linear-gate-linear-add"}, "'gate' must follow"),
        ({"order": "linear-act-norm-act-norm-act-linear"}, "does not split"),
        ({"order": 3}, "must be a string"),
        ({"shortcut": "pad"}, "unknown shortcut 'pad'"),
        ({"hidden_features": 0}, "hidden_features must be a positive int"),
        ({"hidden_dropout": 2.0}, "probability"),
        ({"activation": "foo"}, "unknown activation"),
    ],
)
def test_nonsense_is_a_clear_error(settings, match):
    with pytest.raises(ValueError, match=match):
        FusedResidualMLP(8, **settings)


def test_bad_tensors():
    block = FusedResidualMLP(8)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 8\)"):
        block(torch.randn(3, 7))
    with pytest.raises(TypeError, match="residual must be"):
        block(torch.randn(3, 8), "x")
    with pytest.raises(ValueError, match="residual has shape"):
        block(torch.randn(3, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match="no 'add' stage"):
        FusedResidualMLP(8, order="linear-act-linear")(torch.randn(3, 8), torch.randn(3, 8))


NORM_ORDERS = [
    ("prenorm", (K,)),
    ("postnorm", (K,)),
    ("bro", (H, K)),
    ("preact", (K, H)),
    ("linear-act-linear-add", ()),
    ("linear-norm-act-linear-norm-act", (H, K)),  # two equal halves
]


@pytest.mark.parametrize("order, widths", NORM_ORDERS)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.BatchNorm1d])
def test_from_layers_shares_and_computes_what_they_compute(order, widths, kind):
    eps = (1e-3, 1e-1)
    norms = [kind(width, eps=e) for width, e in zip(widths, eps, strict=False)]
    linears, gate = (nn.Linear(K, H), nn.Linear(H, K)), nn.Parameter(torch.rand(K))
    gated = {"gate": gate} if "add" in split_order(order)[1] else {}
    norm = norms[0] if len(norms) == 1 else norms or None
    block = FusedResidualMLP.from_layers(*linears, norm, nn.SiLU(), order=order, **gated)
    assert [block.fc1.linear, block.fc2.linear] == [*linears]
    assert [m for m in block.modules() if isinstance(m, kind)] == norms
    assert block.fc2.gate is (gate if gated else None)
    assert {*block.parameters()} == {
        *(p for m in (*linears, *norms) for p in m.parameters()),
        *gated.values(),
    }
    x, left, steps = torch.randn(19, K), iter(linears), iter(norms)
    stages = {
        "linear": lambda h: next(left)(h),
        "norm": lambda h: next(steps)(h),
        "act": nn.functional.silu,
        "add": lambda h: h + x,
    }
    y = block(x)
    for norm in norms:
        norm.reset_running_stats() if kind is nn.BatchNorm1d else None
    expected = x
    for stage in MLP_ORDERS.get(order, order).split("-"):
        if stage == "add" and gated:
            expected = gate * expected
        expected = stages[stage](expected)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_from_layers_takes_the_other_settings():
    linears = nn.Linear(K, H).eval(), nn.Linear(H, 5)
    block = FusedResidualMLP.from_layers(
        *linears, nn.RMSNorm(K, eps=1e-2), "gelu", hidden_dropout=0.5, dropout=0.25,
        drop_path=0.125, residual_scale=2.0, gate="scalar", gate_init=0.5, backend="reference",
    )  # fmt: skip
    assert isinstance(block.shortcut, nn.Linear) and block.shortcut.weight.shape == (5, K)
    assert not any(m.training for m in block.modules())
    assert (block.fc1.dropout, block.fc2.dropout, block.fc2.drop_path) == (0.5, 0.25, 0.125)
    assert block.fc2.gate.tolist() == [0.5] and block.fc1.gate is None
    assert {block.backend, block.fc1.backend, block.fc2.backend} == {"reference"}
    x = torch.randn(3, K)
    h = nn.functional.gelu(linears[0](nn.functional.rms_norm(x, (K,), eps=1e-2)))
    torch.testing.assert_close(block(x), 2 * block.shortcut(x) + 0.5 * linears[1](h))


fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 4)


@pytest.mark.parametrize(
    "layers, settings, error, message",
    [
        ((fc1, nn.ReLU()), {}, TypeError, "linear2 must be an nn.Linear, got ReLU"),
        ((fc1, nn.Linear(9, 4)), {}, ValueError, "takes 9 features, linear1 gives 8"),
        ((fc1, fc2, nn.LayerNorm(4)), {"order": "preact"}, ValueError, "needs 2 norms, got 1"),
        ((fc1, fc2, nn.LayerNorm(5)), {}, ValueError, "norm has 5 features"),
        ((fc1, fc2, "layer"), {}, TypeError, "norm must be a module"),
        ((fc1, fc2), {"gate": nn.Parameter(torch.ones(3))}, ValueError, r"\(1,\) or \(4,\)"),
        ((fc1, fc2), {"eps": 0.1}, TypeError, "eps"),
    ],
)
def test_from_layers_refuses(layers, settings, error, message):
    with pytest.raises(error, match=message):
        FusedResidualMLP.from_layers(*layers, **settings)
