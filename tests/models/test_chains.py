"""Blocks that follow one another in a model's graph are one call; eager's values all the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from blocks import _make as make
from blocks import drop_path, linear
from fusedres import chain
from fusedres.models.chains import fused_chain
from fusedres.models.compiled import backend
from test_compiled import assert_same, step

K, H = 8, 12
ALWAYS = {"when": "always"}
pytestmark = pytest.mark.usefixtures("native")
LN = {"norm": lambda: nn.LayerNorm(K)}
MLP = {"fc1": linear(H, K), "fc2": linear(K, H)}

# kind -> a block, links, whether x has rows of rows
KINDS = {
    "layer": (lambda: make(lambda s, x: x + F.gelu(s.fc(s.norm(x))), fc=linear(), **LN), 1, True),
    "prenorm": (
        lambda: make(lambda s, x: x + s.fc2(F.relu(s.fc1(s.norm(x)))), **MLP, **LN), 2, True,
    ),
    "postnorm": (
        lambda: make(lambda s, x: s.norm(x + torch.tanh(s.fc(x))), fc=linear(), **LN), 1, True,
    ),
    "layer scale": (
        lambda: make(
            lambda s, x: x + s.gamma * s.fc(s.norm(x)),
            fc=linear(), gamma=lambda: nn.Parameter(torch.rand(K)), **LN,
        ),
        1, True,
    ),
    "batch norm": (
        lambda: make(
            lambda s, x: x + s.fc2(F.relu(s.fc1(s.norm(x)))), **MLP,
            norm=lambda: nn.BatchNorm1d(K),
        ),
        2, False,
    ),
    "0.5": (lambda: make(lambda s, x: x + 0.5 * s.fc(s.norm(x)), fc=linear(), **LN), 1, True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def joined(monkeypatch):
    """How many links each call of a chain had, those of one block's proof among them."""
    counts, run = [], chain.run
    monkeypatch.setattr(
        chain, "run", lambda x, links, *more: counts.append(len(links)) or run(x, links, *more)
    )
    return counts


def net_of(*blocks):
    return make(lambda s, x: s.last(s.blocks(s.first(x))), first=linear(K, 5), last=linear(3),
                blocks=lambda: nn.Sequential(*blocks))  # fmt: skip


def compiled(net, **options):
    return torch.compile(net, backend=backend, options=ALWAYS | options)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call(kind, joined):
    torch.manual_seed(0)
    block, links, deep = KINDS[kind]
    net = net_of(*(block() for _ in range(4)))
    plain, x = copy.deepcopy(net), torch.randn((3, 6, 5) if deep else (18, 5))
    fast = compiled(net)
    for _ in range(2):  # the second call finds its links known
        assert_same(step(fast, net, x), step(plain, plain, x), 5e-6)
    assert joined[-2:] == [4 * links] * 2
    assert_same(list(net.buffers()), list(plain.buffers()))
    report = fusedres.report(fast)
    assert len(report.fused) == report.found == 4
    assert all("one fused call for 4 residual adds" in add.what for add in report.fused)
    assert_same([fast.eval()(x)], [plain.eval()(x)])


@pytest.mark.parametrize("then", ["eager", "inductor"])
def test_autocast_and_dtypes(then, joined):
    torch.manual_seed(1)
    net, x = net_of(*(KINDS["prenorm"][0]() for _ in range(3))), torch.randn(4, 6, 5)
    fast = compiled(net, then=then)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(fast, net, x), step(net, net, x), 4e-2)
    net, x = net.double(), x.double()
    assert_same(step(fast, net, x), step(net, net, x), 1e-11)
    of_all = [count for count in joined if count > 2]
    assert of_all == ([6, 6] if then == "eager" else [])  # Inductor gets them link by link


def test_what_is_read_in_between_ends_a_run(joined):
    a, b, c = (KINDS["layer"][0]() for _ in range(3))

    def forward(s, x):
        y = s.b(s.a(x))
        return s.c(y).sum() + y.square().sum()

    net, x = make(forward, a=lambda: a, b=lambda: b, c=lambda: c), torch.randn(7, K)
    fast = compiled(net)
    assert_same(step(fast, net, x), step(net, net, x))
    assert joined == [2]


def test_what_is_written_in_between_ends_a_run(joined):
    def forward(s, x):
        x = x + s.scale * s.a(x)
        s.scale.add_(1.0)
        return x + s.scale * s.b(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.register_buffer("scale", torch.ones(K))

    Net.forward = forward
    net, x = Net(), torch.randn(7, K)
    plain, fast = copy.deepcopy(net), compiled(net)
    with torch.no_grad():
        assert_same([fast(x), fast(x)], [plain(x), plain(x)])
    assert not joined and torch.equal(net.scale, plain.scale)


def test_other_blocks_stand_between(joined):
    """Wide ones, those whose skip is another value, and gated ones, are calls of their own."""
    wide = make(lambda s, x: x + s.down(F.relu(s.up(x))), up=linear(9000), down=linear(K, 9000))
    gated = make(lambda s, x: x + s.down(F.glu(s.up(x))), up=linear(2 * H), down=linear(K, H))
    other = make(lambda s, x: s.short(x) + torch.tanh(s.fc(x)), short=linear(), fc=linear())
    blocks = [KINDS["layer"][0]() for _ in range(6)]
    net = net_of(*blocks[:2], wide, *blocks[2:4], other, gated, *blocks[4:])
    fast, x = compiled(net), torch.randn(7, 5)
    assert_same(step(fast, net, x), step(net, net, x), 5e-6)
    assert joined == [2, 2, 2] and len(fusedres.report(fast).fused) == 9


def test_chance(joined):
    block = lambda: make(  # noqa: E731
        lambda s, x: x + drop_path(s.drop(s.fc(x)), 0.25, s.training),
        fc=linear(), drop=lambda: nn.Dropout(0.5),
    )  # fmt: skip
    net = make(lambda s, x: s.b(s.a(x)), a=block, b=block)
    fast, x = compiled(net), torch.randn(4000, 3, K)
    kept = (fast(x) == x).view(4000, -1).all(1).double().mean()
    assert abs(kept - 0.25**2) < 0.03
    assert_same([fast.eval()(x)], [net.eval()(x)])
    assert joined == [2, 2]


def test_slower_together_is_judged_block_by_block(monkeypatch, joined):
    from fusedres.models import gain

    monkeypatch.setattr(gain, "_measure", lambda pair: (1.0, float(len(pair.run.blocks) > 1)))
    monkeypatch.setattr(gain, "_MEASURED", {})
    net, x = net_of(KINDS["layer"][0](), KINDS["prenorm"][0]()), torch.randn(7, 5)
    fast = torch.compile(net, backend=backend)
    assert_same(step(fast, net, x), step(net, net, x))
    report = fusedres.report(fast)
    assert len(report.fused) == 2 and 3 not in joined and "call for" not in str(report)


def test_blocks_of_a_kind_are_timed_once(monkeypatch, joined):
    from fusedres.models import gain

    timed = []
    slower_together = lambda pair: (1.0, float(len(pair.run.blocks) > 1))  # noqa: E731
    monkeypatch.setattr(gain, "_measure", lambda p: timed.append(p) or slower_together(p))
    monkeypatch.setattr(gain, "_MEASURED", {})
    net = net_of(*(KINDS["layer"][0]() for _ in range(4)))
    fast = torch.compile(net, backend=backend)
    fast(torch.randn(7, 5))
    assert [len(pair.run.blocks) for pair in timed] == [4, 1]
    assert len(fusedres.report(fast).fused) == 4


def test_under_transforms_link_by_link():
    torch.manual_seed(2)
    line = ("norm-linear-add norm=layer", None, 0)
    weight, x = torch.randn(K, K).double(), torch.randn(4, 6, K).double()
    operands = (weight, None, None, None, None, None, None) * 2

    def plain(x):
        for _ in range(2):
            x = x + F.linear(F.layer_norm(x, (K,)), weight)
        return x

    call = lambda x: fused_chain((line, line), x, *operands)  # noqa: E731
    for transform in (lambda f: f, torch.func.vmap, lambda f: torch.func.jacrev(f)):
        torch.testing.assert_close(transform(call)(x), transform(plain)(x))


def test_convert_has_them_within_one_forward(joined):
    def forward(s, x):
        for fc, norm in zip(s.fcs, s.norms, strict=True):
            x = x + F.relu(fc(norm(x)))
        return x

    layers = range(3)
    net = make(
        forward, fcs=lambda: nn.ModuleList(nn.Linear(K, K) for _ in layers),
        norms=lambda: nn.ModuleList(nn.LayerNorm(K) for _ in layers),
    )  # fmt: skip
    plain, x = copy.deepcopy(net), torch.randn(5, K)
    report = fusedres.convert(net, x, when="always")
    joined.clear()
    assert_same(step(net, net, x), step(plain, plain, x))
    assert joined == [3] and "one fused call for 3 residual adds" in str(report)
    net.half(), plain.half()
    assert_same(step(net, net, x.half()), step(plain, plain, x.half()), 1e-2)
