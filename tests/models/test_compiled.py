"""torch.compile(backend="fusedres"): what it finds, what it leaves; eager's values all the way."""

import copy
import importlib.metadata
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from blocks import BLOCKS, LEFT, NOT_RESIDUAL, TWICE, K, drop_path, linear
from blocks import _make as make
from fusedres.models import gain, proof
from fusedres.models.compiled import backend

ALWAYS = {"when": "always"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.set_num_threads(1)


def compiled(model, **settings):
    return torch.compile(
        model, backend=backend, options={**ALWAYS, **settings.pop("options", {})}, **settings
    )


def step(call, model, x, seed=0):
    """y and the gradients of x and the parameters, from a random cotangent."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = call(x)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    asked = [x, *model.parameters()]
    return [y.detach(), *torch.autograd.grad(y, asked, dy, allow_unused=True)]


def assert_same(ours, plain, tolerance=2e-6):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_found_and_equal(name):
    make_block, recipes = BLOCKS[name]
    block, x = make_block(), torch.randn(3, 6, K)
    fast = compiled(block)
    assert_same(step(fast, block, x), step(block, block, x))
    report = fusedres.report(fast)
    assert report.found == len(report.fused) == (2 if name in TWICE else 1)
    assert report.fused[-1].what.split(" in ")[0].split(", ") == recipes


@pytest.mark.parametrize("name", LEFT)
def test_left_with_the_reason(name):
    make_block, word = LEFT[name]
    block, x = make_block(), torch.randn(3, 6, K)
    if name == "the caller's memory":
        with torch.no_grad():
            y, given, other = block(x.clone()), x.clone(), x.clone()
            fast = compiled(block)
            assert torch.equal(fast(given), y) and torch.equal(given, y)
            assert torch.equal(block(other), given)
    elif name == "overwritten in between":  # what autograd refuses in either
        fast = compiled(block)
        with torch.no_grad():
            assert_same([fast(x)], [block(x)])
    else:
        fast = compiled(block)
        assert_same(step(fast, block, x), step(block, block, x))
    report = fusedres.report(fast)
    assert not report.fused and word in report.left[0].what


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_other_sums_are_not_counted(name):
    block = NOT_RESIDUAL[name]()
    block.extra = nn.Linear(K, K)  # a parameter to know the graph by
    twin = make(lambda s, x: s.block(x) * s.block.extra.bias.sum(), block=lambda: block)
    fast = compiled(twin)
    fast(torch.randn(6, K))
    assert fusedres.report(fast).adds == ()


def test_convolutions_are_counted_apart():
    net = make(lambda s, x: x + s.conv(x), conv=lambda: nn.Conv1d(3, 3, 1))
    fast = compiled(net)
    fast(torch.randn(2, 3, 4))
    report = fusedres.report(fast)
    assert report.found == 0 and len(report.adds) == 1 and "1 of convolutions" in str(report)


def test_chance_is_as_likely():
    """Dropout and drop-path draw other masks than torch's, as many zeros; none in evaluation."""
    net = make(
        lambda s, x: x + drop_path(s.drop(s.fc(x)), 0.25, s.training),
        fc=linear(), drop=lambda: nn.Dropout(0.5),
    )  # fmt: skip
    fast, x = compiled(net), torch.randn(500, 4, K)
    dropped = (fast(x) == x).view(500, -1)
    assert "dropout=0.5 drop_path=0.25" in str(fusedres.report(fast))
    whole = dropped.all(1)
    assert abs(whole.double().mean() - 0.25) < 0.08
    assert abs(dropped[~whole].double().mean() - 0.5) < 0.03
    assert_same([fast.eval()(x)], [net.eval()(x)])


def test_batch_norm_updates_once():
    net = make(
        lambda s, x: x + s.fc2(torch.relu(s.fc1(s.norm(x)))),
        norm=lambda: nn.BatchNorm1d(K), fc1=linear(12), fc2=linear(K, 12),
    )  # fmt: skip
    plain, x = copy.deepcopy(net), torch.randn(20, K)
    fast = compiled(net)
    assert_same(step(fast, net, x), step(plain, plain, x))
    assert "norm=batch" in str(fusedres.report(fast))
    assert_same(list(net.buffers())[:2], list(plain.buffers())[:2])
    assert net.norm.num_batches_tracked == 1
    assert_same([fast.eval()(x)], [plain.eval()(x)])


@pytest.mark.parametrize("then", ["eager", "inductor"])
def test_autocast(then):
    """The fp32 stream of eager under autocast stays one."""
    block, x = BLOCKS["layer scale"][0](), torch.randn(3, 6, K)
    fast = compiled(block, options={"then": then})
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = step(fast, block, x), step(block, block, x)
    assert ours[0].dtype == torch.float32
    assert_same(ours, plain, tolerance=2e-2)
    assert len(fusedres.report(fast).fused) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    block, x = BLOCKS["prenorm"][0]().to(dtype), torch.randn(3, 6, K, dtype=dtype)
    fast = compiled(block)
    assert_same(step(fast, block, x), step(block, block, x), 2e-2 if dtype.itemsize == 2 else 1e-12)
    assert len(fusedres.report(fast).fused) == 1


@pytest.mark.parametrize("then", ["eager", "inductor"])
def test_batch_sizes(then):
    """Five of them in at most two graphs, as eager's."""
    from torch._dynamo.utils import counters

    counters.clear()
    block = BLOCKS["layer scale"][0]()
    fast = compiled(block, options={"then": then})
    for rows in (4, 3, 7, 16, 5):
        x = torch.randn(rows, 6, K)
        assert_same(step(fast, block, x), step(block, block, x))
    assert counters["stats"]["unique_graphs"] <= 2


def test_the_ops_stand_in_inductors_graph():
    """Forward and backward by our ops, not by the composite's."""
    from unittest import mock

    from fusedres import ops

    block, x = BLOCKS["prenorm"][0](), torch.randn(3, 6, K)
    name = "cpu" if "cpu" in ops.FORWARD else pytest.skip("no C++ extension")
    seen = []
    backward = ops.BACKWARD[name]
    with mock.patch.dict(ops.BACKWARD, {name: lambda *a: seen.append(a) or backward(*a)}):
        step(compiled(block, options={"then": "inductor"}), block, x)
    assert len(seen) == 2


def test_inside_checkpointing():
    block, x = BLOCKS["prenorm"][0](), torch.randn(3, 6, K)
    net = make(lambda s, x: checkpoint(s.block, x, use_reentrant=False), block=lambda: block)
    fast = compiled(net)
    assert_same(step(fast, net, x), step(net, net, x))
    assert len(fusedres.report(fast).fused) == 1


def test_transforms_inside():
    """Per-sample gradients, compiled: what a transform looks into is left alone."""
    block, x = BLOCKS["prenorm"][0](), torch.randn(5, 6, K)

    def loss(parameters, row):
        return torch.func.functional_call(block, parameters, (row[None],)).square().sum()

    def grads(parameters, x):
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    parameters = {name: p.detach() for name, p in block.named_parameters()}
    fast = torch.compile(grads, backend=backend, options=ALWAYS)
    assert_same(list(fast(parameters, x).values()), list(grads(parameters, x).values()))


def test_graph_breaks():
    def forward(s, x):
        x = s.a(x)
        torch._dynamo.graph_break()
        return s.b(x)

    net = make(forward, a=BLOCKS["prenorm"][0], b=BLOCKS["postnorm"][0])
    fast, x = compiled(net), torch.randn(3, 6, K)
    assert_same(step(fast, net, x), step(net, net, x))
    report = fusedres.report(fast)
    assert [add.where for add in report.fused] == ["a", "b"]


def test_report_counts_an_add_once():
    """Graphs of training, evaluation and another size are of the same adds."""
    net, x = nn.Sequential(BLOCKS["prenorm"][0](), BLOCKS["prenorm"][0]()), torch.randn(3, 6, K)
    fast = compiled(net)
    fast(x)
    with torch.no_grad():
        fast.eval()(x[:2])
    report = fusedres.report(fast)
    assert report.found == 2 and [add.where for add in report.adds] == ["0", "1"]
    assert str(report).splitlines()[0].endswith("2 of 2 residual adds fused")
    assert fusedres.report(net) == report


def test_report_counts_modules_of_one_path():
    """Where their caller is not compiled, each is a model to its own graph."""

    @torch._dynamo.disable(recursive=False)
    def forward(s, x):
        for layer in s.layers:
            x = layer(x)
        return x

    layers = (make(lambda s, x: s.inner(x), inner=BLOCKS["prenorm"][0]) for _ in range(3))
    net = make(forward, layers=lambda: nn.ModuleList(layers))
    fast, x = compiled(net), torch.randn(3, 6, K)
    fast(x)
    with torch.no_grad():
        fast(x)
    report = fusedres.report(fast)
    assert report.found == len(report.fused) == 3


def test_report_of_nothing():
    with pytest.raises(ValueError, match="no graph of this model"):
        fusedres.report(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        fusedres.report(3)


def test_log(monkeypatch, caplog):
    monkeypatch.setenv("FUSEDRES_LOG", "1")
    with caplog.at_level(logging.WARNING, "fusedres"):
        compiled(BLOCKS["no norm"][0]())(torch.randn(3, K))
    assert "1 of 1 residual adds fused" in caplog.text


@pytest.mark.parametrize("options", [{"then": "later"}, {"when": "never"}, {"wehn": "always"}])
def test_unknown_options(options):
    fast = torch.compile(nn.Linear(2, 2), backend=backend, options=options)
    with pytest.raises(Exception, match=r"known: (eager, inductor|faster, always|then, when)"):
        fast(torch.randn(1, 2))


def test_a_mode_is_inductor_s():
    fast = torch.compile(nn.Linear(2, 2), backend=backend, mode="max-autotune")
    told = r"mode='max-autotune' is Inductor's.*options=\{'then': 'inductor'\}"
    with pytest.raises(Exception, match=told):
        fast(torch.randn(1, 2))


@pytest.mark.parametrize(
    "times, told",
    [
        ((2.0, 1.0), None),
        ((1.0, 2.0), "2000 ms fused, 1000 ms by torch"),
        ((4.5678e-6, 0.00123456), "1.23 ms fused, 4.57 us by torch"),
    ],
)
def test_only_what_is_measured_to_be_faster(monkeypatch, times, told):
    monkeypatch.setattr(gain, "_measure", lambda pair: times)
    monkeypatch.setattr(gain, "_MEASURED", {})
    fast = torch.compile(BLOCKS["prenorm"][0](), backend=backend)
    fast(torch.randn(3, 6, K))
    report = fusedres.report(fast)
    assert len(report.fused) == (told is None)
    if told is not None:
        assert f"no faster here: {told}" in report.left[0].what


def test_a_wrong_replacement_is_not_made(monkeypatch):
    """The proof by numbers catches what the proof by the graph would let pass."""
    monkeypatch.setattr(proof, "_PROVED", {})
    original = proof.emit

    def wrong(graph, owner, block, look, chance=True):
        block.layers[-1].settings["residual_scale"] = 1.0001
        return original(graph, owner, block, look, chance)

    monkeypatch.setattr(proof, "emit", wrong)
    fast = compiled(BLOCKS["prenorm"][0]())
    fast(torch.randn(3, 6, K))
    assert "differs from torch" in fusedres.report(fast).left[0].what


def test_entry_point():
    """By name, where the package is installed with its metadata."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (target,) = re.findall(r'torch_dynamo_backends"\]\nfusedres = "(.*?)"', project)
    point = importlib.metadata.EntryPoint("fusedres", target, "torch_dynamo_backends")
    assert point.load() is backend
    if "fusedres" not in torch._dynamo.list_backends(exclude_tags=()):
        pytest.skip("fusedres is not installed with this entry point")
    fast = torch.compile(BLOCKS["prenorm"][0](), backend="fusedres", options=ALWAYS)
    fast(torch.randn(3, 6, K))
    assert len(fusedres.report(fast).fused) == 1
