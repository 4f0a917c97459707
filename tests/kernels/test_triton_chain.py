"""Chains in Triton: the numbers of their layers one by one, in one launch and in three."""

import copy
from functools import partial

import pytest
import torch

from fusedres import FusedResidual, FusedResidualStack, FusedSequential, chain
from fusedres.chain import composite_chain
from oracle import assert_as_accurate
from triton_run import BF16, DEVICE, DTYPES, F16, F32, INTERPRET, MARKS, Launches
from triton_run import _clean as _clean  # a fixture, for every test

from fusedres.backends import chain as backend  # isort: skip
from fusedres.backends import plan as planner  # isort: skip

pytestmark = MARKS


class Case:
    """A chain's operands, drawn as a stack's parameters, and a cotangent."""

    def __init__(self, M=37, N=32, depth=4, block=1, dtype=F32, **settings):
        torch.manual_seed(0)
        settings = {"activation": "silu", **settings}
        stack = FusedResidualStack(N, depth, layers_per_block=block, **settings)
        for name, mean in (("norm_weight", 1.0), ("norm_bias", 0.0), ("gate", 0.7)):
            t = getattr(stack, name)
            if t is not None:
                torch.nn.init.normal_(t, mean, 0.3)
        given = stack._given()
        self.depth, self.what = depth, f"{stack}, {dtype}"
        self.links = stack._text(torch.empty(()), given)
        self.names = ["x", *(n for n, _ in stack.named_parameters())]
        operands = [torch.randn(M, N), *(t.detach() for t in given if t is not None)]
        self.tensors = [t.to(DEVICE, dtype) for t in operands]
        self.dy = torch.randn(M, N).to(DEVICE, dtype)

    def without_stacking(self):
        """The same links with operands of their own."""
        twin = copy.copy(self)
        x, *stacked = self.tensors
        lines = self.links.split("\n")
        twin.links = "\n".join(lines * (self.depth // len(lines)))
        twin.tensors = [x, *(t for link in zip(*stacked, strict=True) for t in link)]
        twin.names = ["x", *(f"{name} {i}" for i in range(self.depth) for name in self.names[1:])]
        twin.depth = 0
        return twin

    def forward(self, keep=1):
        x, *operands = self.tensors
        return backend.chain_forward(x, operands, self.links, self.depth, keep)

    def ours(self, keep=1, wanted=None):
        """y, and the gradients that `wanted` has a "1" for, by default all."""
        x, *operands = self.tensors
        y, *saved = self.forward(keep)
        wanted = "1" * len(self.tensors) if wanted is None else wanted
        grads = backend.chain_backward(self.dy, saved, x, operands, self.links, self.depth, wanted)
        names = [f"d{n}" for n, need in zip(self.names, wanted, strict=True) if need == "1"]
        return {"y": y, **dict(zip(names, grads, strict=True))}

    def plain(self, dtype):
        x, *operands = leaves = [t.to(dtype).requires_grad_() for t in self.tensors]
        y = composite_chain(self.links, self.depth, None, 1, x, tuple(operands))
        grads = torch.autograd.grad(y, leaves, self.dy.to(dtype))
        return {"y": y.detach(), **{f"d{n}": g for n, g in zip(self.names, grads, strict=True)}}

    def check(self):
        ours = self.ours()
        plain, true = self.plain(self.dy.dtype), self.plain(torch.float64)
        assert_as_accurate(ours, plain, true, self.what)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("order", ["note", "prenorm", "postnorm"])
def test_the_numbers_of_its_layers(order, norm, block):
    Case(order=order, norm=norm, block=block).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "preact", "activation": "gelu"},
        {"order": "resnet-v1", "residual_scale": 0.5},
        {"order": "branch-norm", "bias": False},
        {"order": "linear-add", "norm": None, "activation": None, "residual_scale": 0.3},
        {"block": 3, "depth": 6, "order": "resnet-v1", "norm": "rms"},
        {"depth": 1},
        {"gate": "channel"},
        {"gate": "channel", "block": 2, "order": "prenorm", "norm": "rms"},
        {"gate": "scalar", "block": 2, "order": "postnorm"},
        {"gate": "scalar", "order": "linear-gate-norm-act-add", "depth": 3},
        {"depth": 24, "N": 16, "M": 16, "eps": 1e-3},
        {"N": 64, "M": 5},
        {"N": 128, "M": 17, "depth": 2, "block": 2},
    ],
    ids=str,
)
def test_other_settings_and_sizes(settings):
    Case(**settings).check()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("settings", [{}, {"order": "preact", "norm": "rms"}], ids=str)
def test_16_bits(dtype, settings):
    Case(M=50, dtype=dtype, **settings).check()
    Case(M=33, N=256, depth=2, dtype=dtype, **settings).check()


def test_what_is_kept():
    """Nothing, links' inputs and z, or only their inputs; y is the same."""
    case = Case(order="prenorm")
    kept = [case.forward(keep) for keep in (0, 1, 2)]
    assert [len(found) for found in kept] == [1, 3, 2]
    assert all(torch.equal(found[0], kept[0][0]) for found in kept)
    assert torch.equal(kept[1][1], kept[2][1])
    x, *operands = (t.double() for t in case.tensors)
    for link, got in enumerate(kept[1][1]):
        first = tuple(t[:link] for t in operands)
        before = composite_chain(case.links, link, None, 1, x, first) if link else x
        torch.testing.assert_close(got.double(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["note", "preact", "postnorm"])
def test_z_computed_again(order):
    case = Case(order=order, block=2)
    kept, again = case.ours(1), case.ours(2)
    for name, t in kept.items():
        if INTERPRET:  # else tensor cores may have added it up in another order
            assert torch.equal(t, again[name]), name
    assert_as_accurate(again, case.plain(F32), case.plain(torch.float64), case.what)


def test_gradients_that_nobody_wants():
    case = Case(M=20, order="prenorm", gate="scalar")
    every = case.ours()
    for wanted in ("100000", "010000", "001000", "000110", "000001", "111111"):
        found = case.ours(wanted=wanted)
        assert len(found) == 1 + wanted.count("1")
        assert all(torch.equal(t, every[name]) for name, t in found.items())


def test_operands_of_their_own_and_views_give_the_same_bits():
    case = Case(M=20, gate="channel")
    ours, own = case.ours(), case.without_stacking().ours()
    for name in case.names:
        parts = [own["dx"]] if name == "x" else [own[f"d{name} {i}"] for i in range(case.depth)]
        assert torch.equal(ours[f"d{name}"], parts[0] if name == "x" else torch.stack(parts))
    wide, x, dy = torch.randn(20, 80, device=DEVICE), case.tensors[0], case.dy
    for view in (wide[:, 1:65:2], torch.empty(32, 20, device=DEVICE).t()):
        case.tensors[0] = view.copy_(x)
        case.dy = torch.empty(20, 96, device=DEVICE)[:, ::3].copy_(dy)
        assert all(torch.equal(t, ours[name]) for name, t in case.ours().items())


def test_nan_stays_in_its_row_and_rows_past_the_end_in_none():
    """With eps = 0 the empty rows of a program's last block are NaN."""
    case = Case(M=20, block=2, activation="relu", eps=0.0)
    clean = case.ours()
    assert all(t.isfinite().all() for t in clean.values())
    case.tensors[0][3, 5] = float("nan")
    case.tensors[0][4, 5] = float("inf")
    found, plain = case.ours(), case.plain(F32)
    keep = [i for i in range(20) if i not in (3, 4)]
    for name in ("y", "dx"):
        assert (
            torch.equal(found[name].isnan(), plain[name].isnan()) and found[name][3].isnan().all()
        )
        assert torch.equal(found[name][keep], clean[name][keep])


def test_no_rows():
    case = Case(M=0)
    found = case.ours()
    assert found["y"].shape == found["dx"].shape == (0, 32)
    assert all(not t.any() for t in found.values())


@pytest.mark.parametrize("depth", [4, 200])
def test_launches(depth, monkeypatch):
    """One forward, three backward, however deep."""
    launches = Launches(monkeypatch)
    for name in ("forward", "backward", "sums"):
        kernel = f"residual_chain_{name}_kernel"
        monkeypatch.setattr(backend.kernels, kernel, launches.kernel(kernel))
    case = Case(M=16, N=16, depth=depth, order="prenorm")
    assert launches.of(case.forward)[0] == ["residual_chain_forward_kernel"]
    seen, _ = launches.of(case.ours)
    assert [name for name in seen if not name.startswith("transpose")] == [
        "residual_chain_forward_kernel",
        "residual_chain_backward_kernel",
        "bmm.out",
        "residual_chain_sums_kernel",
    ]


_LINKS = {"_forward": 1, "_backward": 3}  # where the links stand after the first argument


@pytest.fixture
def calls(monkeypatch):
    """How many links each call of the ops has; on a CPU, too, they are Triton's."""
    found = []
    for name in ("_forward", "_backward"):
        run = getattr(chain, name)

        def counted(t, *call, run=run, at=_LINKS[name]):
            links, depth = call[at : at + 2]
            found.append(depth or links.count("\n") + 1)
            return run(t, *call)

        monkeypatch.setattr(chain, name, counted)
    monkeypatch.setattr(chain, "backend_of", lambda _: "triton")
    return found


def step(net, x, dy):
    leaf = x.clone().requires_grad_()
    net.zero_grad()
    y = net(leaf)
    y.backward(dy)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    return {"y": y.detach(), "x": leaf.grad, **grads}


def check_compiled_is(stack, names):
    """Compiled it is these ops, and bitwise the ordinary call."""
    found = []

    def compiler(graph, _inputs):
        found.extend(str(n.target) for n in graph.graph.nodes if "fusedres" in str(n.target))
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(stack, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    x, dy = torch.randn(2, 17, stack.features, device=DEVICE)
    y, theirs = (module(x) for module in (compiled, stack))
    assert torch.equal(y, theirs)
    grads = (torch.autograd.grad(t, list(stack.parameters()), dy) for t in (y, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert found == [f"fusedres.{name}.default" for name in names]


def test_compiled_it_is_one_op(calls):
    stack = FusedResidualStack(16, 4, layers_per_block=2, device=DEVICE)
    check_compiled_is(stack, ("triton_chain_forward", "triton_chain_backward"))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stack_is_a_call(recompute, calls, monkeypatch):
    stack = FusedResidualStack(
        32, 4, layers_per_block=2, activation="silu", recompute=recompute, device=DEVICE
    )
    x, dy = torch.randn(3, 7, 32, device=DEVICE), torch.randn(3, 7, 32, device=DEVICE)
    assert stack.why_not_joined(x) is None
    ours = step(stack, x, dy)
    assert calls == [4, 4]
    with torch.no_grad():
        assert torch.equal(stack(x), ours["y"]) and calls.pop() == 4
    monkeypatch.setattr(stack, "backend", "reference")
    assert stack.why_not_joined(x) == "the backend is 'reference'"
    theirs = step(stack, x, dy)
    assert len(calls) == 2
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, atol=1e-4, rtol=1e-4, msg=name)


def test_layers_of_one_kind_in_a_row_are_a_call(calls):
    def layer(**settings):
        return FusedResidual(32, activation="silu", device=DEVICE, **settings)

    rows = [layer() for _ in range(3)], [layer(order="prenorm"), layer(order="prenorm")]
    net = FusedSequential(*rows[0], *rows[1], layer(dropout=0.1), layer(gate="scalar"))
    x, dy = torch.randn(20, 32, device=DEVICE), torch.randn(20, 32, device=DEVICE)
    told = net.chains(x)
    assert told[:2] == ["0 to 2: one call", "3 to 4: one call"] and len(told) == 4
    net[5].eval()
    ours = step(net[:5], x, dy)
    assert calls == [3, 2, 2, 3]
    theirs = step(torch.nn.Sequential(*net[:5]), x, dy)
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, atol=1e-4, rtol=1e-4, msg=name)


WAYS = {
    "gate": ({"gate": "scalar", "order": "gate-linear-act-add"}, "a gate before linear"),
    "dropout": ({"dropout": 0.5}, "at random"),
    "batch norm": ({"norm": "batch"}, "batch norm"),
    "width": ({"features": 40}, "one launch takes 16, 32, 64, 128, 256, in and out"),
    "float32": ({"features": 128}, "too many for one launch"),
    "add before": ({"order": "add-linear-act"}, "adds before linear"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_a_launch_a_layer_says_why(way, calls):
    settings, reason = WAYS[way]
    settings = {"features": 32, "depth": 2, "backend": "triton", **settings}
    stack = FusedResidualStack(**settings, device=DEVICE)
    x = torch.randn(18, stack.features, device=DEVICE)
    found = stack._way(x, stack._given())
    assert found.loop == "triton" and reason in found.why and stack.why_not_joined(x) is None
    assert stack(x).shape == x.shape and calls == [2]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"order": "prenorm", "layers_per_block": 2}, {"order": "note", "norm": None}],
    ids=str,
)
def test_under_autocast_what_is_added_stays_in_float32(settings, recompute, calls):
    torch.manual_seed(0)
    settings = {"activation": "silu", "recompute": recompute, **settings}
    stack = FusedResidualStack(32, 4, **settings, device=DEVICE)
    (x, dy), given = torch.randn(2, 40, 32, device=DEVICE), stack._given()
    text, names = stack._text(x, given), ["x", *dict(stack.named_parameters())]

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *stack.parameters())]
        y = composite_chain(text, 4, None, 1, leaves[0], tuple(leaves[1:]))
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    with torch.autocast(x.device.type, F16):
        assert stack._way(x, given) == chain.Way()
        ours, eager = step(stack, x, dy), plain(F32)
    assert calls == [4, 4] and ours["y"].dtype == F32
    assert_as_accurate(ours, eager, plain(torch.float64), f"{stack}")


def test_under_autocast_a_sum_that_a_norm_looks_at_is_a_launch_a_layer(calls):
    stack = FusedResidualStack(32, 2, order="postnorm", device=DEVICE, backend="triton")
    x = torch.randn(18, 32, device=DEVICE)
    with torch.autocast(x.device.type, F16):
        assert "a stage after add" in stack._way(x, stack._given()).why


@pytest.mark.parametrize(
    "links, reason",
    [
        ("1 linear\n1^1 linear-act-add activation=silu", "another value than the latest"),
        ("0 linear-act\n0<1 linear-act-add\n1 linear-act\n0<1 linear-act-add", "not alike"),
        ("0 linear-act\n0<2 linear-act-add", "another input than its block's"),
        ("1 linear-dropout-add dropout=0.5", "drops at random"),
        ("0 linear-dropout dropout=0.5\n0<1 linear-add", "drops at random"),
        ("55 linear-norm-add norm=batch", "batch norm"),
        ("48 linear-act-add", "more than weight, bias"),
        ("0 linear-add x_dtype=float32", "different dtypes"),
        ("0 linear-add x_dtype=float32 y_dtype=float64", "not all are float32"),
        ("0 linear-add-act activation=silu x_dtype=float32 y_dtype=float32", "stage after add"),
    ],
)
def test_links_that_are_refused(links, reason):
    assert reason in backend.pattern_of(links)
    x = torch.randn(18, 32, device=DEVICE)
    with pytest.raises(RuntimeError, match=reason):
        backend.chain_forward(x, [x], links, 0, 0)


def test_rows_of_a_wide_stack(calls, monkeypatch):
    """More than one wave of programs are better off as a launch a layer."""
    device = planner.Device("any", 2, 227 << 10)
    monkeypatch.setattr(planner, "device_of", lambda _: device)
    limit = partial(chain.backends.chain_limit, "auto", "7 linear-norm-act-add norm=layer")
    limit.func.cache_clear()
    where = torch.device(DEVICE)
    assert limit(BF16, where, 256, 256) == 32
    assert limit(BF16, where, 128, 128) > 1 << 20
    assert "features" in limit(BF16, where, 512, 512)
    gated = "15 norm-linear-gate-add norm=layer gate=scalar x_dtype=float32 y_dtype=float32"
    assert "a gate and several dtypes" in limit.func("auto", gated, BF16, where, 256, 256)
    limit.func.cache_clear()
    monkeypatch.setattr(planner, "device_of", lambda _: device._replace(shared=160 << 10))
    assert "before Hopper" in limit(BF16, where, 256, 256)
    limit.func.cache_clear()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("order, keep", [("note", 1), ("preact", 1), ("note", 2), ("note", 0)])
def test_the_ops_are_what_their_fakes_say(order, keep, dtype):
    """Those of x in float32, also beside 16-bit weights."""
    case = Case(M=18, order=order)
    x, *operands = case.tensors
    if dtype != F32:
        operands[:2] = [t.to(dtype) for t in operands[:2]]
        case.links += " x_dtype=float32 y_dtype=float32"
        case.tensors = [x, *operands]
    call = x, operands, case.links, case.depth
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.fusedres
    torch.library.opcheck(ops.triton_chain_forward.default, (*call, keep), test_utils=tests)
    if keep:
        _, *saved = case.forward(keep)
        call = case.dy, saved, *call, "11011"
        torch.library.opcheck(ops.triton_chain_backward.default, call, test_utils=tests)


def test_operands_that_do_not_fit_are_told():
    case = Case(M=18)
    x, weight, *rest = case.tensors
    with pytest.raises(RuntimeError, match=r"x has 24 features, a chain in Triton has \(16, 32"):
        backend.chain_forward(x[:, :24], [weight, *rest], case.links, 4, 0)
    for operands, reason in (
        ([weight[:2], *rest], r"bias is \(4, 32\) on .*, expected \(2, 32\)"),
        ([weight.double(), *rest], "weight is torch.float64, x is torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            backend.chain_forward(x, operands, case.links, 4, 0)
    _, *saved = case.forward()
    with pytest.raises(RuntimeError, match=r"dy is \(9, 32\), expected \(18, 32\)"):
        backend.chain_backward(case.dy[:9], saved, x, [weight, *rest], case.links, 4, "11111")
    links, gate = "15 linear-gate-add gate=scalar", torch.randn(4, 32, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"gate is \(4, 32\) on .*, expected \(4, 1\)"):
        backend.chain_forward(x, [weight, *rest, gate], links, 4, 0)
    with pytest.raises(RuntimeError, match="a batch norm"):
        backend.chain_forward(x, [weight, *rest], "7 linear-norm-add norm=batch", 4, 0)
