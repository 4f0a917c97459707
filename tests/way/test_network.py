"""FusedSequential: the same numbers as nn.Sequential of the same layers, in one call a run."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from cases import ALIASES
from fusedres import FusedResidual, FusedResidualMLP, FusedSequential, Residual, chain
from fusedres.mlp import MLP_ORDERS
from fusedres.spec import Spec
from oracle import assert_as_accurate

pytestmark = pytest.mark.usefixtures("native")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture
def calls(monkeypatch):
    """How many links each call joins that is not refused."""
    joined, run = [], chain.run

    def counted(x, links, *more):
        found = run(x, links, *more)
        joined.append(len(links))
        return found

    monkeypatch.setattr(chain, "run", counted)
    return joined


def results(net, x, dy):
    leaf = x.clone().requires_grad_()
    for p in net.parameters():
        p.grad = None
    y = net(leaf)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **grads}


def three(layers, dtype=F32):
    """Fused, plain in the same dtype, and exact."""
    plain = nn.Sequential(*layers).to(dtype)
    fused = FusedSequential(
        *(copy.deepcopy(m) if not isinstance(m, Residual) else as_fused(m) for m in plain)
    )
    return fused, plain, copy.deepcopy(plain).double()


def as_fused(layer):
    spec = layer.spec
    settings = {"order": "-".join(spec.stages), "norm": spec.norm}
    settings |= {"activation": spec.activation, "gate": spec.gate}
    fused = FusedResidual(layer.in_features, layer.out_features, **settings)
    fused.load_state_dict(layer.state_dict())
    return fused.to(layer.linear.weight.dtype)


def by_kind(result, true):
    """y, dx, and the gradients of all layers' parameters of a kind as one, since few elements have
    no RMS: each over its size to the next power of two, which rounds nothing.
    """
    kinds = {}
    for name, t in result.items():
        scale = 2.0 ** true[name].square().mean().sqrt().clamp_min(1e-30).log2().round()
        kinds.setdefault(name.partition(".")[2] or name, []).append((t / scale).flatten())
    return {kind: torch.cat(parts).to(parts[0].dtype) for kind, parts in kinds.items()}


def check(layers, M, dtype=F32):
    torch.manual_seed(1)
    K = layers[0].in_features
    fused, plain, true = three(layers, dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, layers[-1].out_features).to(dtype)
    found = [results(fused, x, dy), results(plain, x, dy), results(true, x.double(), dy.double())]
    found = [by_kind(result, found[-1]) for result in found]
    assert_as_accurate(*found, what=f"{len(layers)} layers of {layers[0].spec}, {M} rows")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("order", ALIASES)
def test_a_chain_of_three(order, norm, dtype, calls):
    torch.manual_seed(0)
    gate = "channel" if order == "note" else "scalar" if order == "prenorm" else None
    layers = [
        Residual(40, order=order, norm=norm, activation="gelu", gate=gate, gate_init=0.7)
        for _ in range(3)
    ]
    check(layers, 37, dtype)
    assert calls == [3]


@pytest.mark.parametrize("M", [17, 130, 1100])
def test_widths_that_differ(M, calls):
    torch.manual_seed(0)
    widths = (24, 70, 33, 33, 96)
    layers = [
        Residual(k, n, order="norm-linear-act", activation="silu") for k, n in pairwise(widths)
    ]
    check(layers, M)
    assert calls == [4]


@pytest.mark.parametrize("depth, width, M", [(200, 64, 64), (40, 256, 96), (1000, 16, 20)])
def test_deep_nets(depth, width, M, calls):
    """Also where the weights of all layers fit no cache together."""
    torch.manual_seed(0)
    check([Residual(width, activation="silu") for _ in range(depth)], M)
    assert sum(calls) == depth


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_linear_shortcut_is_a_link_of_its_own(scale, order, norm, autocast, calls):
    """At the start, where x needs no gradient or one, and between others; wide ones, too."""
    torch.manual_seed(0)
    settings = {"order": order, "norm": norm, "activation": "silu", "residual_scale": scale}
    widths = (24, 40, 40, 40, 57)
    layers = [FusedResidual(k, n, **settings) for k, n in pairwise(widths)]
    layers.insert(2, FusedResidualMLP(40, 24, activation="silu"))
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    plain[2].parts = lambda: None
    true = copy.deepcopy(plain).double()
    x, dy, found = torch.randn(60, 24), torch.randn(60, 57), []
    with torch.autocast("cpu", BF16, enabled=autocast):
        found = [results(m, x, dy) for m in (net, plain)]
        assert calls == [8] and net.chains(x) == ["0 to 4: one call"]
        y = net(x)
        parameters = list(net.parameters())
        grads = torch.autograd.grad(y, parameters, dy.to(y.dtype))
    for (name, _), g in zip(net.named_parameters(), grads, strict=True):
        assert norm == "batch" or torch.equal(g, found[0][name]), name
    found.append(results(true, x.double(), dy.double()))
    assert_as_accurate(*(by_kind(result, found[-1]) for result in found), what=f"{order} {norm}")


def test_gradients_of_gradients_through_a_shortcut():
    torch.manual_seed(0)
    net = FusedSequential(FusedResidual(3, 4, activation="tanh"), FusedResidual(4)).double()
    x = torch.randn(3, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x) and torch.autograd.gradgradcheck(net, x)


def test_a_shortcut_with_a_hook_or_of_another_kind_is_called():
    for change in (
        lambda s: s.register_forward_hook(lambda _m, _x, y: 2 * y),
        lambda s: nn.utils.parametrizations.weight_norm(s),
    ):
        torch.manual_seed(0)
        net = FusedSequential(FusedResidual(8, 12), FusedResidual(12), FusedResidual(12))
        change(net[0].shortcut)
        x = torch.randn(5, 8)
        assert torch.equal(net(x), nn.Sequential(*net)(x))
        assert "its shortcut" in net.chains(x)[0]


@pytest.mark.parametrize("order", ["note", "resnet-v1", "preact"])
def test_a_padded_shortcut(order, calls):
    torch.manual_seed(0)
    widths = (24, 40, 40, 57)
    settings = {"order": order, "shortcut": "pad", "activation": "silu", "residual_scale": 0.5}
    layers = [FusedResidual(k, n, **settings) for k, n in pairwise(widths)]
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    x, dy = torch.randn(30, 24), torch.randn(30, 57)
    ours, alone = results(net, x, dy), results(plain, x, dy)
    assert calls == [3]
    for name, t in alone.items():
        torch.testing.assert_close(ours[name], t, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("order", ["note", "resnet-v1", "add-norm-linear"])
def test_a_scaled_residual(order, calls):
    torch.manual_seed(0)
    net = FusedSequential(*(FusedResidual(40, order=order, residual_scale=0.3) for _ in range(3)))
    x, dy = torch.randn(20, 40), torch.randn(20, 40)
    ours, alone = results(net, x, dy), results(nn.Sequential(*copy.deepcopy(list(net))), x, dy)
    assert calls == [3]
    for name, t in alone.items():
        torch.testing.assert_close(ours[name], t, msg=lambda text, name=name: f"{name}: {text}")


def test_a_link_that_cannot_be_joined_costs_itself_alone(calls):
    layers = [FusedResidual(16) for _ in range(7)]
    layers[3].linear.register_forward_hook(lambda *_: None)
    net = FusedSequential(nn.Linear(8, 16), *layers, nn.Linear(16, 4))
    x = torch.randn(5, 8)
    y = net(x)
    assert calls == [3, 3]
    torch.testing.assert_close(y, nn.Sequential(*net)(x))
    told = net.chains(x)
    assert [line.split(":")[0] for line in told] == ["0", "1 to 3", "4", "5 to 7", "8"]
    assert "has hooks" in told[2] and "it is a Linear" in told[0]


@pytest.mark.parametrize("order", [*MLP_ORDERS, "linear-norm-act-linear-gate-add-norm"])
def test_blocks_of_two_matmuls_are_joined(order, calls):
    """By themselves, and in a net between layers of another width."""
    torch.manual_seed(0)
    gate = "channel" if "gate" in order else None
    block = FusedResidualMLP(24, 40, order=order, activation="silu", gate=gate)
    x, dy = torch.randn(30, 24), torch.randn(30, 24)
    alone = copy.deepcopy(block)
    alone.parts = lambda: None  # two calls
    nets = [nn.Sequential(m) for m in (block, alone)]
    ours, theirs = (results(net, x, dy) for net in nets)
    assert calls == [2]
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, msg=lambda text, name=name: f"{name}: {text}")
    layers = [FusedResidual(24), block, copy.deepcopy(block), FusedResidual(24)]
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    for i in (1, 2):
        plain[i].parts = lambda: None
    calls.clear()
    ours, theirs = results(net, x, dy), results(plain, x, dy)
    assert calls == [6]
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, msg=lambda text, name=name: f"{name}: {text}")
    assert net.chains(x) == ["0 to 3: one call"]


def test_a_block_that_cannot_be_joined_parts_a_run(calls):
    blocks = [FusedResidualMLP(16, 24) for _ in range(4)]
    blocks[1].fc2.register_forward_hook(lambda *_: None)
    last = FusedResidual(16, shortcut=nn.Identity())
    net, x = FusedSequential(FusedResidual(16), *blocks, last), torch.randn(9, 16)
    net.train()(x)
    assert calls == [3, 4]
    told = net.chains(x)
    assert [line.split(":")[0] for line in told] == ["0 to 1", "2", "3 to 4", "5"]
    assert "hooks" in told[1] and "shortcut" in told[3]


@pytest.mark.parametrize("again", [False, True])
def test_masks_are_those_of_the_layers(again, calls):
    """Drawn in their order, with layers between that draw none; the same in backward, and when a
    checkpoint runs forward again.
    """
    torch.manual_seed(0)
    layers = [
        FusedResidual(16, dropout=0.3),
        FusedResidual(16, order="preact"),
        FusedResidualMLP(16, 24, hidden_dropout=0.4, drop_path=0.5, activation="silu"),
        FusedResidual(16, 20, order="norm-dropout-linear-act", dropout=0.2, drop_path=0.1),
    ]
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    plain[2].parts = lambda: None
    x, dy, found, after = torch.randn(6, 4, 16), torch.randn(6, 4, 20), [], []
    for module in (net, plain):
        call = module
        if again:
            call = nn.Module()
            call.forward = lambda x, module=module: torch.utils.checkpoint.checkpoint(
                module, x, use_reentrant=False
            )
            call.module = module
        torch.manual_seed(5)
        found.append(results(call, x, dy))
        after.append(torch.rand(1))
    assert calls == [5] and after[0] == after[1]  # a checkpoint stops its second run halfway
    assert torch.equal(found[0]["y"], found[1]["y"])
    for name, t in found[1].items():
        torch.testing.assert_close(found[0][name], t, msg=lambda text, name=name: f"{name}: {text}")


def test_mixed_precision_is_that_of_the_layers(calls):
    """Of layers whose streams are in fp32 and in bf16, and of the same net with autocast off."""
    torch.manual_seed(0)
    layers = [
        FusedResidual(16, order="preact", activation="silu"),
        FusedResidual(16, 24, order="norm-linear-act", activation="silu"),
        FusedResidualMLP(24, 40),
        FusedResidual(24, order="bert-output"),
        FusedResidual(24, activation="silu", residual_scale=0.5),
    ]
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    plain[2].parts = lambda: None
    true = copy.deepcopy(plain).double()
    x, dy = torch.randn(60, 16), torch.randn(60, 24)
    for on, joined in ((True, [6]), (False, [6]), (True, [6])):
        calls.clear()
        with torch.autocast("cpu", BF16, enabled=on):
            found = [results(m, x, dy) for m in (net, plain)]
        assert calls == joined and found[0]["y"].dtype == (F32 if not on else found[1]["y"].dtype)
        assert torch.equal(found[0]["y"], found[1]["y"])
        found.append(results(true, x.double(), dy.double()))
        assert_as_accurate(*(by_kind(result, found[-1]) for result in found))


def test_another_dtype_parts_a_run(calls):
    """Where torch's product would refuse, the layer says so."""
    net = FusedSequential(FusedResidual(8), FusedResidual(8), FusedResidual(8).double())
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float64, x has torch\.float32"):
        net(torch.randn(4, 8))
    assert calls == [2] and "float64" in net.chains(torch.randn(4, 8))[1]
    half = FusedSequential(FusedResidual(8), FusedResidual(8)).bfloat16()
    with torch.autocast("cpu", F16):  # bf16 and fp16 make fp32
        y = half(torch.randn(4, 8).bfloat16())
        assert y.dtype == nn.Sequential(*half)(torch.randn(4, 8).bfloat16()).dtype == F32
    assert calls == [2, 2]


BATCH_NORMS = {
    "training": lambda norm: None,
    "frozen": lambda norm: norm.eval(),
    "momentum": lambda norm: setattr(norm, "momentum", 0.7),
    "cumulative": lambda norm: setattr(norm, "momentum", None),
    "untracked": lambda norm: setattr(norm, "track_running_stats", False),
    "half": lambda norm: norm.bfloat16(),
    "uncounted": lambda norm: setattr(norm, "num_batches_tracked", None),
    "no statistics": lambda norm: norm.__init__(norm.num_features, track_running_stats=False),
    "not affine": lambda norm: norm.__init__(norm.num_features, affine=False),
}


@pytest.mark.parametrize("change", BATCH_NORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_batch_norm_is_that_of_the_layers(change, autocast, calls):
    """Of every kind of order, with other norms between, in several calls."""
    torch.manual_seed(0)
    layers = [
        FusedResidual(16, 24, order="norm-linear-act", norm="batch", activation="silu"),
        FusedResidual(24, norm="batch", activation="silu"),
        FusedResidual(24, activation="silu"),
        FusedResidualMLP(24, 40, order="resnet-v1", norm="batch", activation="silu", dropout=0.2),
        FusedResidual(24, order="preact", norm="batch", activation="silu"),
        FusedResidual(24, order="linear-act-add-norm", norm="batch", activation="silu"),
    ]
    for layer in layers[1:2] + layers[4:]:
        BATCH_NORMS[change](layer.norm)
    net, plain = FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    plain[3].parts = lambda: None
    true = copy.deepcopy(plain).double()
    for _ in range(3):
        x, dy, found = torch.randn(12, 5, 16) + 1, torch.randn(12, 5, 24), []
        for module in (net, plain):
            torch.manual_seed(5)
            with torch.autocast("cpu", BF16, enabled=autocast):
                found.append(results(module, x, dy))
        torch.manual_seed(5)
        found.append(results(true, x.double(), dy.double()))
        assert all(found[0][name].dtype == t.dtype for name, t in found[1].items())
        assert_as_accurate(*(by_kind(result, found[-1]) for result in found), what=change)
        close = {"rtol": 0.02, "atol": 0.02} if autocast or change == "half" else {}
        for (name, t), u in zip(net.named_buffers(), plain.buffers(), strict=True):
            assert t.dtype == u.dtype
            torch.testing.assert_close(t, u, msg=lambda text, name=name: f"{name}: {text}", **close)
    assert calls == [7] * 3
    for module in (net, plain):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert calls == [7] * 4


def test_batch_norm_of_one_row_is_refused_and_changes_nothing():
    net = FusedSequential(*(FusedResidual(8, norm="batch") for _ in range(3)))
    with pytest.raises(ValueError, match="more than 1 row"):
        net(torch.randn(1, 8))
    assert not any(m.norm.num_batches_tracked.any() for m in net)
    assert "one row" in net.chains(torch.randn(1, 8))[0]


def test_gradients_of_gradients_through_batch_statistics():
    torch.manual_seed(0)
    net = FusedSequential(
        FusedResidual(4, norm="batch", activation="tanh"),
        FusedResidual(4, order="preact", norm="batch", activation="tanh"),
    ).double()
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x) and torch.autograd.gradgradcheck(net, x)


CHANGES = {
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "linear": lambda m: setattr(m, "linear", nn.Linear(16, 16)),
    "weight": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.randn(16, 16))),
    "weight in place": lambda m: m.linear.weight.data.mul_(2),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "activation": lambda m: setattr(m, "activation", "tanh"),
    "order": lambda m: setattr(m, "order", "preact"),
    "no bias": lambda m: setattr(m.linear, "bias", None),
    "backend": lambda m: setattr(m, "backend", "reference"),
    "dropout": lambda m: setattr(m, "dropout", 1.0),
    "forward": lambda m: setattr(m, "forward", lambda x: x + 1),
    "batch norm": lambda m: setattr(m, "norm", nn.BatchNorm1d(16)),
    "norm without weight": lambda m: setattr(m, "norm", nn.LayerNorm(16, elementwise_affine=False)),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.linear),
    "frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_counts(change):
    torch.manual_seed(0)
    net = FusedSequential(*(FusedResidual(16) for _ in range(4)))
    x, dy = torch.randn(9, 16), torch.randn(9, 16)
    net(x)
    CHANGES[change](net[2])
    alone = nn.Sequential(*copy.deepcopy(list(net)))
    ours, plain = results(net, x, dy), results(alone, x, dy)
    assert ours.keys() == plain.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], msg=lambda t, n=name: f"{n}: {t}")


def test_looks_like_nn_sequential():
    net = FusedSequential(nn.Linear(8, 16), *(FusedResidual(16) for _ in range(3)))
    plain = nn.Sequential(nn.Linear(8, 16), *(Residual(16) for _ in range(3)))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(net(x), plain(x))
    assert isinstance(net[1:3], FusedSequential) and len(net) == 4
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        twin[1].linear.weight.data.zero_()
        assert not torch.equal(twin(x), net(x))


@pytest.mark.parametrize("order", ["note", "preact"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("depth", [3, 30])
def test_the_same_bits_again_and_with_any_number_of_threads(depth, norm, order):
    torch.manual_seed(0)
    settings = {"norm": norm, "order": order, "activation": "gelu", "dropout": 0.1}
    net = FusedSequential(*(FusedResidual(48, **settings) for _ in range(depth)))
    x, dy = torch.randn(300, 48), torch.randn(300, 48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            found.append(results(net, x, dy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_each_gradient_alone():
    torch.manual_seed(0)
    net = FusedSequential(*(FusedResidual(16, order="prenorm") for _ in range(3)))
    x, dy = torch.randn(6, 16), torch.randn(6, 16)
    together = results(net, x, dy)
    net.requires_grad_(False)
    for name, p in net.named_parameters():
        p.requires_grad_()
        (alone,) = torch.autograd.grad(net(x), p, dy)
        p.requires_grad_(False)
        torch.testing.assert_close(alone, together[name])
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(net(leaf), leaf, dy)[0], together["dx"])


def test_gradcheck_and_double_backward():
    torch.manual_seed(0)
    net = FusedSequential(*(FusedResidual(5, activation="tanh") for _ in range(2))).double()
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    names, tensors = zip(*net.named_parameters(), strict=True)

    def call(x, *values):
        for name, value in zip(names, values, strict=True):
            owner, _, last = name.rpartition(".")
            module = net.get_submodule(owner)
            module._parameters[last] = value
        return net(x)

    assert torch.autograd.gradcheck(call, (x, *tensors))
    assert torch.autograd.gradgradcheck(call, (x, *tensors))


@pytest.mark.parametrize("how", ["autocast", "func", "compile", "vmap", "checkpoint"])
def test_where_something_looks_inside(how):
    torch.manual_seed(0)
    net = FusedSequential(*(FusedResidual(16) for _ in range(3)))
    plain = nn.Sequential(*copy.deepcopy(list(net)))
    x = torch.randn(4, 16)

    def call(net):
        if how == "autocast":
            with torch.autocast("cpu", BF16):
                return net(x)
        if how == "func":
            return torch.func.grad(lambda x: net(x).square().sum())(x)
        if how == "vmap":
            return torch.vmap(net)(x)
        if how == "checkpoint":
            leaf = x.clone().requires_grad_()
            y = torch.utils.checkpoint.checkpoint(net, leaf, use_reentrant=False)
            return torch.autograd.grad(y.square().sum(), leaf)[0]
        return torch.compile(net, backend="aot_eager", fullgraph=True)(x)

    ours, theirs = call(net), call(plain)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_what_does_not_fit_is_an_error_of_the_layer():
    net = FusedSequential(FusedResidual(8), FusedResidual(8), FusedResidual(9))
    with pytest.raises(ValueError, match="in_features=9"):
        net(torch.randn(4, 8))
    with pytest.raises(ValueError, match="in_features=8"):
        net(torch.randn(4, 7))


def test_a_wide_link_among_narrow_ones_leaves_their_gradients():
    """Its weight gradient is taken by itself, while the others' still wait for their operands."""
    torch.manual_seed(0)
    widths = [16] * 9 + [520, 520]
    weights = [torch.randn(n, k, requires_grad=True) for k, n in pairwise(widths)]
    x = torch.randn(40, 16)
    y, _ = chain.run(x, [chain.Link.of(Spec.parse("norm-linear norm=layer"), w) for w in weights])
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, weights, dy)
    h = x
    for w in weights:
        h = nn.functional.linear(nn.functional.layer_norm(h, h.shape[1:]), w)
    for a, b in zip(found, torch.autograd.grad(h, weights, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
