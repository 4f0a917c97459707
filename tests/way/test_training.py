"""Layers in training: optimizers, train and eval, autocast, and 32 steps beside the reference."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases import ALIASES
from fusedres import NORMS, ORDERS, FusedResidual, Residual
from oracle import assert_as_accurate, double


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop],
    ids=lambda o: o.__name__,
)
def test_optimizers_train_it(optimizer):
    layer = FusedResidual(16, 4, norm="batch", gate="channel", gate_init=1.0)
    step, x = optimizer(layer.parameters(), lr=1e-2), torch.randn(128, 16)
    target = torch.tanh(x[:, :4] * x[:, 4:8])
    losses = []
    for _ in range(60):
        step.zero_grad()
        losses.append((layer(x) - target).square().mean())
        losses[-1].backward()
        step.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("order", ALIASES)
def test_train_and_eval(order):
    layer = FusedResidual(16, order=order, norm="batch", dropout=0.3, drop_path=0.3)
    plain = Residual(16, order=order, norm="batch", dropout=0.3, drop_path=0.3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, 16)
    for _ in range(2):
        results = []
        for module in (layer, plain):
            torch.manual_seed(1)
            results.append(module.train()(x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert not torch.equal(layer(x), layer(x)), "masks differ from call to call"
    assert torch.equal(layer.eval()(x), layer(x)), "evaluation is deterministic"
    assert layer.norm.num_batches_tracked == 6 and plain.norm.num_batches_tracked == 2
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


X_DTYPES, LOW = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_mixed_precision(order, norm, activation):
    """x, weight and residual in every dtype that eager takes, with autocast and without: the same
    dtypes, and as accurate as the eager twin in the same context.
    """
    settings = {"order": order, "norm": norm, "activation": activation}
    tried = 0
    for x_dtype, w_dtype, r_dtype, autocast in itertools.product(
        X_DTYPES, X_DTYPES[:2], (None, *X_DTYPES), (None, *LOW)
    ):
        torch.manual_seed(0)
        plain = Residual(24, **settings)
        plain.linear.to(w_dtype)
        fused, true = FusedResidual(24, **settings), double(plain)
        fused.linear.to(w_dtype)
        fused.load_state_dict(plain.state_dict())
        x, r, dy = (torch.randn(40, 24) for _ in range(3))
        found = []
        for module in (fused, plain, true):
            up = torch.float64 if module is true else None
            leaves = {"dx": x.to(x_dtype).to(up or x_dtype, copy=True).requires_grad_()}
            if r_dtype is not None:
                leaves["dresidual"] = r.to(r_dtype).to(up or r_dtype, copy=True).requires_grad_()
            on = autocast is not None and up is None
            with torch.autocast("cpu", autocast or LOW[0], enabled=on):
                try:
                    y = module(*leaves.values())
                except (RuntimeError, TypeError) as error:
                    found.append(error)
                    continue
            y.backward(dy.to(torch.bfloat16).to(y.dtype))
            grads = {name: leaf.grad for name, leaf in leaves.items()}
            grads |= {name: p.grad for name, p in module.named_parameters()}
            found.append({"y": y.detach(), **grads})
        what = f"{settings} {x_dtype} {w_dtype} {r_dtype} {autocast}"
        if isinstance(found[1], Exception):
            assert isinstance(found[0], TypeError), what
            continue
        tried += 1
        assert {n: t.dtype for n, t in found[0].items()} == {
            n: t.dtype for n, t in found[1].items()
        }, what
        assert_as_accurate(*found, what)
        for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=what)
    assert tried >= 48


@pytest.mark.parametrize("order", ["note", "prenorm", "postnorm"])
@pytest.mark.parametrize("depth", [1, 20, 200])
@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("mean, sigma", [(0, 1), (2000, 10)])
def test_deep_nets_under_autocast(order, depth, autocast, mean, sigma):
    """The residual stream stays in fp32, as in eager: depth adds no rounding. Rows diverge at their
    own rate, so their median is compared.
    """
    torch.manual_seed(0)
    nets = [
        nn.Sequential(*(cls(32, order=order, activation="gelu") for _ in range(depth)))
        for cls in (FusedResidual, Residual)
    ]
    nets[0].load_state_dict(nets[1].state_dict())
    x = mean + sigma * torch.randn(512, 32)
    with torch.no_grad():
        true = copy.deepcopy(nets[1]).double()(x.double())
        with torch.autocast("cpu", autocast):
            ours, eager = (net(x) for net in nets)
    assert ours.dtype == eager.dtype
    errors = [(y - true).square().mean(1).sqrt().median().item() for y in (ours, eager)]
    assert errors[0] <= 1.1 * errors[1] + 1e-6 * true.abs().max().item()


def test_a_stream_of_1e5_is_finite_in_fp16():
    layers = [cls(32, order="prenorm") for cls in (FusedResidual, Residual)]
    layers[0].load_state_dict(layers[1].state_dict())
    x = 1e5 * torch.randn(8, 32)
    with torch.autocast("cpu", torch.float16):
        ours, eager = (layer(x) for layer in layers)
    assert ours.isfinite().all() and torch.allclose(ours, eager, rtol=1e-5)


class Net(nn.Module):
    def __init__(self, block, **settings):
        super().__init__()
        blocks = [block(24, **settings) for _ in range(3)]
        self.layers = nn.Sequential(nn.Linear(10, 24), *blocks, nn.LayerNorm(24), nn.Linear(24, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_both_layers_train_alike_for_32_steps(order, norm):
    """NUMERICS 12: fp32 loss within 1e-5 relative; gelu, as a ReLU's kink lets runs part."""
    nets = [
        Net(block, order=order, norm=norm, activation="gelu") for block in (Residual, FusedResidual)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    steps = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    data = torch.randn(32, 64, 10)
    for x in data:
        target = (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0).long()
        losses = []
        for net, step in zip(nets, steps, strict=True):
            step.zero_grad()
            losses.append(nn.functional.cross_entropy(net(x), target))
            losses[-1].backward()
            step.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


class Launches(TorchDispatchMode):
    """Ops that would launch a kernel, and the bytes that they read and write."""

    VIEWS = ("detach", "view", "t", "transpose", "expand", "_unsafe_view", "alias", "new_empty")

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ not in self.VIEWS:
            self.count += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors if any(t.stride()))
        return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_launches_and_moves_no_more_than_eager(order, autocast, native):
    """Under autocast weight and bias are cast by two launches a call, as in eager; x by none."""
    counts = []
    for cls in (FusedResidual, Residual):
        layer, x = cls(64, order=order, activation="gelu"), torch.randn(512, 64, requires_grad=True)
        dy = torch.randn(512, 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x)  # what is worked out once
        with Launches() as step:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            forward = step.count
            y.backward(dy.to(y.dtype))
        counts.append((forward, step.count, step.bytes))
    ours, eager = counts
    assert ours[0] == (3 if autocast else 1)
    assert all(a <= b for a, b in zip(ours, eager, strict=True)), counts
