"""The modules as users meet them: checkpoints, copies, devices, optimizers, other submodules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import NORMS, FusedResidual, Residual, fused_residual
from oracle import assert_close, double

VARIANTS = {
    "note": {},
    "batch": {"norm": "batch", "momentum": 0.01, "eps": 1e-3},
    "rms prenorm": {"norm": "rms", "order": "prenorm", "bias": False},
    "channel gate": {"gate": "channel", "gate_init": 0.5},
    "scalar gate": {"gate": "scalar", "gate_init": 0.5, "order": "preact"},
    "wider": {"out_features": 24},
    "padded": {"out_features": 24, "shortcut": "pad", "norm": None},
    "module shortcut": {
        "out_features": 24,
        "shortcut": nn.Sequential(nn.Linear(16, 24), nn.Tanh()),
    },
}


def make(cls, variant):
    """Layer `variant` with 16 features and parameters all different from their defaults."""
    layer = cls(16, **copy.deepcopy(VARIANTS[variant]))
    generator = torch.Generator().manual_seed(len(variant))
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return layer


def agree(ours, plain, x, residual=None):
    """Output and every gradient of two layers with the same parameters."""
    true = double(plain)
    dy = torch.randn(*x.shape[:-1], ours.out_features)
    results = []
    for layer in (ours, plain, true):
        dtype = layer.linear.weight.dtype
        leaf = x.detach().to(dtype).requires_grad_()
        y = layer(leaf) if residual is None else layer(leaf, residual.to(dtype))
        layer.zero_grad()
        y.backward(dy.to(dtype))
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "dx": leaf.grad, **grads})
    assert_close(*results, terms=x.numel() + dy.numel(), what=repr(ours))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("to", "source"), [(FusedResidual, Residual), (Residual, FusedResidual)])
def test_checkpoints_move_both_ways(variant, to, source):
    first, second = make(source, variant), make(to, variant)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    assert list(first.state_dict()) == list(second.state_dict())
    assert second.load_state_dict(first.state_dict()) == ([], [])
    fused, plain = (first, second) if source is FusedResidual else (second, first)
    agree(fused, plain, torch.randn(64, 16))
    for name, t in fused.state_dict().items():
        torch.testing.assert_close(t, plain.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_state_dict_keys_are_those_of_the_submodules():
    layer = FusedResidual(4, 6, norm="batch", gate="channel")
    assert set(layer.state_dict()) == {
        "linear.weight",
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "gate",
        "shortcut.weight",
        "shortcut.bias",
    }
    assert [type(m) for m in (layer.linear, layer.norm, layer.shortcut)] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.Linear,
    ]
    assert (
        type(FusedResidual(4).norm) is nn.LayerNorm
        and type(FusedResidual(4, norm="rms").norm) is nn.RMSNorm
    )
    assert set(FusedResidual(4, norm=None, bias=False).state_dict()) == {"linear.weight"}


def test_initialisation_is_that_of_torch():
    torch.manual_seed(5)
    layer = FusedResidual(16, gate="scalar")
    torch.manual_seed(5)
    linear = nn.Linear(16, 16)
    assert torch.equal(layer.linear.weight, linear.weight) and torch.equal(
        layer.linear.bias, linear.bias
    )
    assert layer.gate.tolist() == [0.0]
    assert FusedResidual(3, gate="channel").gate.tolist() == pytest.approx([1e-5] * 3)
    assert FusedResidual(3, gate="channel", gate_init=0.1).gate.tolist() == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("norm", "activation", "order"),
    [
        (nn.LayerNorm(16, eps=1e-3), nn.GELU(), "note"),
        (nn.RMSNorm(16, eps=1e-2), nn.GELU("tanh"), "prenorm"),
        (nn.RMSNorm(16), nn.SiLU(), "note"),
        (nn.BatchNorm1d(16, eps=1e-3, momentum=0.01), nn.Tanh(), "preact"),
        (nn.LayerNorm(16, elementwise_affine=False), "silu", "postnorm"),
        (nn.LayerNorm(16, bias=False), nn.Identity(), "note"),
        (nn.BatchNorm1d(16, momentum=None, affine=False), nn.Mish(), "note"),
        (nn.BatchNorm1d(16, track_running_stats=False), None, "note"),
        (None, nn.ELU(), "note"),
    ],
)
def test_from_layers_shares_parameters_and_computes_what_the_layers_compute(
    norm, activation, order
):
    linear = nn.Linear(16, 16)
    layer = FusedResidual.from_layers(linear, norm, activation, order=order)
    assert layer.linear is linear and layer.norm is norm
    act = activation or nn.Identity()
    act = nn.functional.silu if act == "silu" else act
    norm_fn = norm or nn.Identity()
    by_hand = {
        "note": lambda x: act(norm_fn(linear(x))) + x,
        "prenorm": lambda x: act(linear(norm_fn(x))) + x,
        "preact": lambda x: linear(act(norm_fn(x))) + x,
        "postnorm": lambda x: norm_fn(act(linear(x)) + x),
    }[order]
    x = torch.randn(32, 16)
    state = copy.deepcopy(norm.state_dict()) if norm else {}
    expected = by_hand(x)
    after = copy.deepcopy(norm.state_dict()) if norm else {}
    if norm:
        norm.load_state_dict(state)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    for name, t in after.items():
        torch.testing.assert_close(norm.state_dict()[name], t, rtol=1e-6, atol=1e-6)
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_compute_the_same(variant):
    layer, x = make(FusedResidual, variant), torch.randn(5, 16)
    y = layer.eval()(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is FusedResidual and repr(other) == repr(layer)
        assert torch.equal(other(x), y)
        assert other.linear.weight.data_ptr() != layer.linear.weight.data_ptr()
        other.train()(x).square().mean().backward()
        assert other.linear.weight.grad is not None and layer.linear.weight.grad is None


def test_extra_repr_says_the_settings():
    text = repr(
        FusedResidual(4, 6, order="prenorm", norm="rms", activation="gelu", dropout=0.1, eps=1e-6)
    )
    for words in (
        "4, 6",
        "prenorm",
        "'rms'",
        "'gelu'",
        "0.1",
        "1e-06",
        "shortcut='linear'",
        "backend='auto'",
    ):
        assert words in text, text
    assert "drop_path" not in text and "residual_scale" not in text


def test_meta_device_then_to_empty():
    layer = FusedResidual(16, norm="batch", gate="channel", device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(7, 16, device="meta")).shape == (7, 16)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(FusedResidual(16, norm="batch", gate="channel").state_dict())
    assert layer(torch.randn(7, 16)).isfinite().all()
    with torch.device("meta"):
        assert FusedResidual(4).linear.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_to_another_dtype(norm, dtype):
    layer, plain = (
        cls(16, norm=norm, activation="gelu").to(dtype) for cls in (FusedResidual, Residual)
    )
    plain.load_state_dict(layer.state_dict())
    y = layer(torch.randn(9, 16, dtype=dtype))
    assert y.dtype == dtype and FusedResidual(4, dtype=dtype).linear.weight.dtype == dtype
    if dtype != torch.float64:
        agree(layer, plain, torch.randn(256, 16, dtype=dtype))


def test_an_explicit_residual_skips_only_the_default_linear_shortcut():
    x, r = torch.randn(32, 8), torch.randn(32, 12)
    default = FusedResidual(8, 12, activation="tanh")
    branch = default(x) - nn.functional.linear(x, default.shortcut.weight, default.shortcut.bias)
    torch.testing.assert_close(default(x, r), branch + r, rtol=1e-5, atol=1e-5)
    source = torch.randn(32, 8)
    projected = nn.functional.linear(source, default.shortcut.weight, default.shortcut.bias)
    torch.testing.assert_close(default(x, source), branch + projected, rtol=1e-5, atol=1e-5)
    module = FusedResidual(8, 12, activation="tanh", shortcut=nn.Linear(12, 12))
    module.linear, module.norm = default.linear, default.norm
    torch.testing.assert_close(module(x, r), branch + module.shortcut(r), rtol=1e-5, atol=1e-5)
    identity = FusedResidual(8, 12, activation="tanh", shortcut="identity")
    identity.linear, identity.norm = default.linear, default.norm
    torch.testing.assert_close(identity(x, r), branch + r, rtol=1e-5, atol=1e-5)


def test_replaced_submodules_are_run_not_ignored():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, layer = torch.randn(5, 6), FusedResidual(6, norm=None, activation=None, bias=False)
    assert layer.not_fused() is None
    doubled = Doubled(6, 6, bias=False)
    doubled.weight, layer.linear = layer.linear.weight, doubled
    assert "Doubled" in layer.not_fused()
    torch.testing.assert_close(layer(x), 2 * x @ doubled.weight.T + x)


def test_sync_batch_norm():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(
        FusedResidual(6, norm="batch", activation="gelu")
    )
    assert type(layer.norm) is nn.SyncBatchNorm and "SyncBatchNorm" in layer.not_fused()
    plain = Residual(6, norm="batch", activation="gelu").eval()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer.eval()(x), plain(x))


def test_functional_and_module_are_the_same_layer():
    layer, x = (
        FusedResidual(16, norm="batch", activation="silu", eps=1e-3).eval(),
        torch.randn(4, 3, 16),
    )
    y = fused_residual(
        x,
        layer.linear.weight,
        layer.linear.bias,
        layer.norm.weight,
        layer.norm.bias,
        norm="batch",
        activation="silu",
        eps=1e-3,
        running_mean=layer.norm.running_mean,
        running_var=layer.norm.running_var,
    )
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_running_statistics_are_those_of_torch(dtype: torch.dtype, momentum: float | None) -> None:
    layer = FusedResidual(24, norm="batch", dtype=dtype)
    theirs = nn.BatchNorm1d(24, momentum=momentum, dtype=dtype)
    layer.norm.momentum = momentum
    for rows in (7, 40, 300):
        x = 3 * torch.randn(rows, 24, dtype=dtype) + 5
        version = layer.norm.running_mean._version
        layer(x)
        theirs(layer.linear(x))
        assert layer.norm.running_mean._version > version
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(layer.norm.get_buffer(name), buffer, **close)


def test_running_statistics_of_another_dtype_and_layout() -> None:
    layer = FusedResidual(24, norm="batch")
    layer.norm.running_mean = torch.zeros(24, dtype=torch.float64)
    layer.norm.running_var = torch.ones(48)[::2]
    x = torch.randn(50, 24)
    layer(x)
    z = layer.linear(x)
    torch.testing.assert_close(layer.norm.running_mean, 0.1 * z.mean(0).double())
    torch.testing.assert_close(layer.norm.running_var, 0.9 + 0.1 * z.var(0))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_by_torch_where_ops_are_watched(momentum: float | None) -> None:
    """A mode, as any tracer, sees torch's ops in place of one that writes to its arguments."""
    layer = FusedResidual(24, norm="batch")
    theirs = nn.BatchNorm1d(24, momentum=momentum)
    layer.norm.momentum = momentum
    for rows in (7, 40):
        x = 3 * torch.randn(rows, 24) + 5
        with Watching() as ops:
            layer(x)
        theirs(layer.linear(x))
        assert "fusedres.residual_forward.default" in ops.seen
        assert "fusedres.update_running_.default" not in ops.seen
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(layer.norm.get_buffer(name), buffer)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
