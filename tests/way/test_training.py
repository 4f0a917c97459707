"""Layers in training: optimizers, train and eval, autocast, and 32 steps beside the reference."""

import copy

import pytest
import torch
from torch import nn

from cases import ALIASES
from fusedres import NORMS, FusedResidual, Residual
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


@pytest.mark.parametrize("norm", [None, *NORMS])
def test_autocast(norm):
    layer, plain = (cls(32, norm=norm, activation="gelu") for cls in (FusedResidual, Residual))
    plain.load_state_dict(layer.state_dict())
    low = copy.deepcopy(plain).bfloat16()
    x, dy = torch.randn(128, 32), torch.randn(128, 32).bfloat16()
    results = []
    for module, enabled in ((layer, True), (low, False), (double(plain), False)):
        dtype = module.linear.weight.dtype
        leaf = x.to(dtype).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(leaf)
        y.backward(dy.to(y.dtype))
        grads = {"dx": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
        results.append({"y": y.detach(), **grads})
    assert results[0]["y"].dtype == torch.bfloat16
    assert all(results[0][name].dtype == torch.float32 for name in results[0] if name != "y")
    as_low = {name: t.bfloat16() for name, t in results[0].items()}
    assert_as_accurate(as_low, results[1], results[2], f"autocast, {norm}")


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
