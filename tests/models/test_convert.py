"""convert and revert: same function, same parameters, same keys; nothing unsafe is touched."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fusedres import FusedResidual, FusedSequential, Residual, chain, convert, revert
from fusedres.models.report import ConversionReport
from fusedres.models.sequential import ConvertedSequential

STACKS = {
    "linear-norm-act": lambda: [nn.Linear(12, 20), nn.LayerNorm(20), nn.GELU()],
    "linear-act-norm": lambda: [nn.Linear(12, 20), nn.SiLU(), nn.RMSNorm(20, eps=1e-6)],
    "norm-act-linear": lambda: [nn.BatchNorm1d(12, momentum=0.3), nn.Tanh(), nn.Linear(12, 20)],
    "norm-linear-act": lambda: [nn.LayerNorm(12, 1e-3), nn.Linear(12, 20, bias=False), nn.Mish()],
    "linear-act": lambda: [nn.Linear(12, 20), nn.GELU("tanh")],
    "linear-norm": lambda: [nn.Linear(12, 20), nn.BatchNorm1d(20, affine=False)],
    "act-linear": lambda: [nn.ELU(), nn.Linear(12, 20)],
    "linear-norm-act-dropout": lambda: [
        nn.Linear(12, 20),
        nn.LayerNorm(20),
        nn.ReLU(inplace=True),
        nn.Dropout(0.0),
    ],
}


def step(model, x):
    """One training step's result: y, gradients and buffers, in float64."""
    model = copy.deepcopy(model).double()
    x = x.double().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [y, *grads, *(b.double() for b in model.buffers())]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", STACKS)
def test_stack_is_the_same_function(order):
    model, x = nn.Sequential(*STACKS[order](), nn.PReLU()), torch.randn(16, 12)
    before, ids, keys = (
        step(model, x),
        [id(p) for p in model.parameters()],
        list(model.state_dict()),
    )
    modules = list(model)
    report = convert(model)
    assert f"order '{order.removesuffix('-dropout')}" in str(report) and len(report.fused) == 1
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == keys
    assert list(model) == modules
    calls = []
    for stack in model._stacks.values():
        stack.layer.register_forward_hook(lambda *_: calls.append(1))
    assert_same(step(model, x), before)
    model.eval()(x)
    assert calls, "the fused layer did not run"
    revert(model)
    assert type(model) is nn.Sequential and not hasattr(model, "_stacks") and list(model) == modules
    assert_same(step(model.train(), x), before)


def test_eval_mode_and_dropout_follow_the_model():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5))
    convert(model)
    x = torch.randn(400, 64)
    zeros = (model(x) == 0).double().mean() - (model[1](model[0](x)) == 0).double().mean() / 2
    assert abs(zeros - 0.5) < 0.02
    torch.testing.assert_close(model.eval()(x), model[1](model[0](x)))
    model[2].train()  # Monte-Carlo dropout: only this module is in training
    assert not torch.equal(model(x), model(x))
    model.train()[2].eval()
    torch.testing.assert_close(model(x), model[1](model[0](x)))


def test_residual_changes_class_and_comes_back():
    model = nn.ModuleDict({"a": Residual(12, norm="batch"), "b": FusedResidual(12)})
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    x, report = torch.randn(16, 12), convert(model)
    assert type(model["a"]) is FusedResidual and [c.name for c in report.fused] == ["a"]
    before = model["a"].linear.weight.clone()
    model["a"](x).sum().backward()
    optimiser.step()
    assert not torch.equal(model["a"].linear.weight, before)
    assert model["a"].norm.num_batches_tracked == 1
    assert len(convert(model).fused) == 0  # nothing left to do
    revert(model)
    assert type(model["a"]) is Residual and type(model["b"]) is FusedResidual


def test_residual_is_the_same_function():
    model = Residual(12, 20, norm="batch", activation="gelu", gate="scalar", gate_init=0.5)
    x = torch.randn(16, 12)
    before = step(model, x)
    report = convert(model)
    assert type(model) is FusedResidual and report.changes[0].name == "(the model)"
    assert_same(step(model, x), before)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(x + self.net(x))


def test_report_says_what_and_why():
    model = nn.Sequential(Block(), Block())
    report = convert(model)
    assert isinstance(report, ConversionReport)
    assert [c.name for c in report.fused] == ["0.net.0", "1.net.0"]
    assert [c.name for c in report.left] == ["0.net.3", "0.head", "1.net.3", "1.head"]
    lines = str(report).splitlines()
    assert lines[0] == "fusedres.convert: 2 changed, 4 left alone" and len(lines) == 7
    assert "order 'norm-linear-act'" in lines[1] and "convert(model, x)" in lines[3]
    assert "2 changed" in str(revert(model))


def test_linear_stacks_can_be_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Residual(8))
    convert(model, linear_stacks=False)
    assert type(model) is nn.Sequential and type(model[2]) is FusedResidual


def hooked(linear):
    linear.register_forward_hook(lambda m, args, y: y + 1)
    return linear


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(linear):
    forward = linear.forward
    linear.forward = lambda x: 3 * forward(x)
    return linear


@pytest.mark.parametrize(
    "modules, why",
    [
        (lambda: [hooked(nn.Linear(8, 8)), nn.ReLU()], "hooks"),
        (lambda: [replaced(nn.Linear(8, 8)), nn.ReLU()], "forward was replaced"),
        (lambda: [Doubled(8, 8), nn.ReLU()], "Doubled"),
        (lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()], "Parametr"),
        (lambda: [nn.Linear(8, 8), nn.LeakyReLU(0.2)], "negative_slope=0.01"),
        (lambda: [nn.Linear(8, 8), nn.RMSNorm(8)], "eps=None"),
        (lambda: [nn.Linear(8, 8), nn.SyncBatchNorm(8)], "SyncBatchNorm"),
        (lambda: [nn.ReLU(inplace=True), nn.Linear(8, 8)], "no norm or activation"),
        (lambda: [nn.Linear(8, 8), nn.PReLU()], "no norm or activation"),
        (lambda: [nn.Linear(8, 8), nn.Softplus(threshold=1.0)], "threshold"),
    ],
)
def test_unsafe_is_left_alone(modules, why):
    model, x = nn.Sequential(*modules()), torch.randn(5, 8)
    model.eval()
    before = model(x.clone())
    report = convert(model)
    assert type(model) is nn.Sequential and not report.fused
    assert why in str(report)
    assert torch.equal(model(x.clone()), before)


def test_changes_after_convert_are_honoured():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()), torch.randn(5, 8)
    convert(model)
    handle = model[0].register_forward_hook(lambda m, args, y: torch.zeros_like(y))
    assert (model(x) == 0).all()
    handle.remove()
    assert (model(x) != 0).any()
    model[2] = nn.Tanh()
    torch.testing.assert_close(model(x), torch.tanh(model[1](model[0](x))))
    model[1].eps = 10.0
    torch.testing.assert_close(model(x), torch.tanh(model[1](model[0](x))))
    assert type(model[:2]) is ConvertedSequential
    torch.testing.assert_close(model[:2](x), model[1](model[0](x)))


def test_batch_norm_over_sequences_stays_torchs():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(4), nn.ReLU())
    assert not convert(model).fused  # 4 features are no width of the linear
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
    convert(model)
    x = torch.randn(3, 6, 8)  # torch takes dimension 1 for the features
    plain = copy.deepcopy(model)
    revert(plain)
    torch.testing.assert_close(model(x), plain(x))


def test_shared_and_repeated_modules():
    act, linear = nn.ReLU(), nn.Linear(8, 8)
    model, x = nn.Sequential(linear, act, nn.LayerNorm(8), linear, act), torch.randn(5, 8)
    before = step(model, x)
    assert len(convert(model).fused) == 2
    assert_same(step(model, x), before)


def test_copies_and_pickles_are_whole():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Residual(8)), torch.randn(5, 8)
    convert(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._stacks[0].layer.linear is twin[0] is not model[0]
        torch.testing.assert_close(twin(x), expected)
        with torch.no_grad():
            twin[0].weight.zero_()
        assert not torch.allclose(twin(x), expected)
        revert(twin)
        assert type(twin) is nn.Sequential and type(twin[2]) is Residual
    torch.testing.assert_close(model(x), expected)


def test_convert_draws_no_random_numbers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Residual(8))
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_subclass_of_residual_is_left_alone():
    class Mine(Residual):
        def forward(self, x, residual=None):
            return -super().forward(x, residual)

    model = nn.Sequential(Mine(8))
    assert "subclass" in str(convert(model)) and type(model[0]) is Mine


@pytest.mark.parametrize("function", [convert, revert])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        function([nn.Linear(2, 2)])


def test_layers_in_a_row_become_one_call(native, monkeypatch):
    torch.manual_seed(0)
    layers = [Residual(16, activation="silu") for _ in range(4)]
    model = nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(16, 2))
    plain, x, joined, run = copy.deepcopy(model), torch.randn(5, 8), [], chain.run
    monkeypatch.setattr(
        chain, "run", lambda x, links, *more: joined.append(len(links)) or run(x, links, *more)
    )
    names = list(model.state_dict())
    report = convert(model)
    assert type(model) is FusedSequential and "layers in a row are one call" in str(report)
    torch.testing.assert_close(model(x), plain(x))
    assert joined == [4] and list(model.state_dict()) == names
    assert not [c for c in convert(model).changes if c.fused]
    revert(model)
    assert type(model) is nn.Sequential and type(model[1]) is Residual
    own = FusedSequential(FusedResidual(8), FusedResidual(8))  # a user's stays
    revert(own)
    assert type(own) is FusedSequential


def test_stacks_in_a_row_are_one_call(native, monkeypatch):
    torch.manual_seed(0)
    layers = [
        (nn.Linear(n, m), nn.LayerNorm(m), nn.SiLU()) for n, m in ((8, 16), (16, 24), (24, 4))
    ]
    model = nn.Sequential(*(m for layer in layers for m in layer))
    plain, x, joined, run = copy.deepcopy(model), torch.randn(5, 8), [], chain.run
    monkeypatch.setattr(
        chain, "run", lambda x, links, *more: joined.append(len(links)) or run(x, links, *more)
    )
    convert(model)
    for net in (model, plain):
        net(x).square().sum().backward()
    assert joined == [3]
    torch.testing.assert_close(model(x), plain(x))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    model[4].register_forward_hook(lambda *_: None)  # of the second layer's norm
    joined.clear()
    torch.testing.assert_close(model(x), plain(x))
    assert not joined
