"""The grid of single layers through a chain of one link and of three; chains drawn at random."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cases import ALIASES
from fusedres import ACTIVATIONS, FusedResidual, FusedResidualMLP, FusedSequential, Residual
from fusedres.links import Part, joined, links_of

pytestmark = pytest.mark.usefixtures("native")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def gradients(call, layers, x, dy):
    leaf = x.clone().requires_grad_()
    for p in layers.parameters():
        p.grad = None
    y = call(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad, {n: p.grad for n, p in layers.named_parameters()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
@pytest.mark.parametrize("order", ALIASES)
def test_every_order_norm_activation_and_dtype(order, norm, dtype, count):
    """As the layers one by one, whose accuracy has tests of its own: y and dx have the same bits,
    but for fp64, where the library multiplies for a single layer, and where rows are summed up.
    """
    settings = {"order": order, "norm": norm, "dtype": dtype}
    exact = dtype is not F64 and norm != "batch"
    eps = torch.finfo(dtype).eps
    for activation in (None, "gelu") if dtype is F64 else (None, *ACTIVATIONS):
        layers = nn.Sequential(
            *(FusedResidual(24, activation=activation, **settings) for _ in range(count))
        )
        x = (0.3 * torch.randn(40, 24)).to(dtype)  # relu2 squares three times
        dy = (0.01 * torch.randn(40, 24)).to(dtype)
        twin = copy.deepcopy(layers)

        def call(x, layers=layers):
            links = links_of([Part(layer) for layer in layers], x)
            assert len(links) == count
            return joined(x, links)

        y, dx, found = gradients(call, layers, x, dy)
        y_twin, dx_twin, expected = gradients(twin, twin, x, dy)
        what = f"{activation}, {order}, {norm}"
        if exact:
            assert torch.equal(y, y_twin) and torch.equal(dx, dx_twin), what
        pairs = {"y": (y, y_twin), "dx": (dx, dx_twin)}
        pairs |= {name: (found[name], t) for name, t in expected.items()}
        pairs |= dict(
            zip(
                dict(twin.named_buffers()),
                zip(layers.buffers(), twin.buffers(), strict=True),
                strict=True,
            )
        )
        for name, (ours, theirs) in pairs.items():
            assert ours.dtype == theirs.dtype
            # three layers of batch norm amplify a rounding; sums of rows are in another order
            error = (ours.double() - theirs.double()).norm()
            size = theirs.double().norm() + dy.double().norm()
            assert error <= 100 * eps * size, f"{name}: {what}, {error} of {size}"


class PlainBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.fc1, self.fc2, self.shortcut = plain(block.fc1), plain(block.fc2), None
        self.shortcut = copy.deepcopy(block.shortcut)

    def forward(self, x):
        return self.fc2(self.fc1(x), x if self.shortcut is None else self.shortcut(x))


def plain(module):
    """The same layer or block stage by stage."""
    if isinstance(module, FusedResidualMLP):
        twin = PlainBlock(module)
    elif isinstance(module, FusedResidual):
        twin = copy.deepcopy(module)
        twin.__class__ = Residual
    else:
        twin = copy.deepcopy(module)
    return twin


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_any_chain_is_nn_sequential_of_residual(data):
    """Widths, orders, norms, masks, shortcuts, gates, blocks; hooks and other modules between."""
    draw = data.draw
    dtype = draw(st.sampled_from([F64, F64, F32]))
    width, modules = draw(st.integers(1, 40)), []
    first = width
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["layer"] * 5 + ["block", "linear", "act"]))
        settings = {
            "norm": draw(st.sampled_from(["layer", "rms", "batch", None])),
            "activation": draw(st.sampled_from(["silu", "tanh", "gelu"])),
            "dropout": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "drop_path": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "residual_scale": draw(st.sampled_from([1.0, 1.0, 0.5])),
            "bias": draw(st.booleans()),
        }
        gate = draw(st.sampled_from([None, None, "scalar", "channel"]))
        settings |= {"gate": gate, "gate_init": None if gate is None else 0.7}
        wider = draw(st.sampled_from([width, width, draw(st.integers(1, 40))]))
        if kind == "linear":
            modules.append(nn.Linear(width, width := wider))
        elif kind == "act":
            modules.append(nn.Tanh())
        elif kind == "block":
            order = draw(st.sampled_from(["prenorm", "postnorm", "resnet-v1", "preact"]))
            modules.append(
                FusedResidualMLP(width, draw(st.integers(1, 40)), order=order, **settings)
            )
        else:
            order = draw(st.sampled_from(ALIASES))
            pad = {"shortcut": "pad"} if wider > width and draw(st.booleans()) else {}
            modules.append(FusedResidual(width, width := wider, order=order, **pad, **settings))
    training = draw(st.booleans())
    samples = draw(st.integers(4, 30))
    lead = draw(st.sampled_from([(2 * samples,), (samples, 3)]))
    net = FusedSequential(*modules).to(dtype).train(training)
    twin = nn.Sequential(*map(plain, net))
    for i, module in enumerate(net):
        if draw(st.integers(0, 7)) == 0:
            for hooked in (module, twin[i]):
                hooked.register_forward_hook(lambda _m, _x, y: 2 * y)
    x, dy = torch.randn(*lead, first, dtype=dtype), torch.randn(*lead, width, dtype=dtype)
    results = []
    for module in (net, twin):
        torch.manual_seed(2)
        results.append(gradients(module, module, x, dy))
        results[-1][-1].update(module.named_buffers(), drawn=torch.rand(1))
    (y, dx, rest), (y_twin, dx_twin, rest_twin) = results
    near = 1e-9 if dtype is F64 else 2e-3
    pairs = {"y": (y, y_twin), "dx": (dx, dx_twin)}
    pairs |= {name: (rest[name], t) for name, t in rest_twin.items()}
    for name, (ours, theirs) in pairs.items():
        error = (ours.double() - theirs.double()).norm()
        assert error <= near * (theirs.double().norm() + 1), f"{name}: {error} of {theirs.norm()}"
