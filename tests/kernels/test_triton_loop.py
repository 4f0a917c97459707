"""Chains that are a launch a layer: the layers' bits, and batched gradients of weights."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fusedres import FusedResidual, FusedResidualStack, FusedSequential, backends, chain, convert
from fusedres.spec import make_spec
from fusedres.wiring import line_of
from oracle import assert_as_accurate
from test_triton_chain import Case as Chain
from test_triton_chain import calls as calls  # a fixture
from test_triton_chain import check_compiled_is, step
from triton_run import DEVICE, F16, F32, INTERPRET, MARKS, Launches, force
from triton_run import _clean as _clean  # a fixture, for every test

from fusedres.backends import loop as backend  # isort: skip

pytestmark = MARKS


def make(N=24, depth=4, dtype=F32, **settings):
    """A stack of vectors that are not all alike."""
    torch.manual_seed(0)
    settings = {"activation": "silu", "backend": "triton", **settings}
    stack = FusedResidualStack(N, depth, **settings, dtype=dtype)
    with torch.no_grad():
        for name, t in stack.named_parameters():
            if name != "weight":
                t.add_(torch.randn_like(t), alpha=0.3)
    return stack.to(DEVICE)


def both(stack, x, dy, around=nullcontext):
    """y, gradients and running statistics: of one call, and of the layers one by one."""
    found = []
    for one_by_one in (False, True):
        twin = copy.deepcopy(stack)
        if one_by_one:
            twin._way = lambda *_: "it is asked not to"
        torch.manual_seed(3)
        with around():
            found.append(step(twin, x, dy) | dict(twin.named_buffers()))
    return found


def same_bits(ours, theirs, but=("weight",)):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype, name
        if name.rpartition(".")[2] in but:
            torch.testing.assert_close(ours[name], t, atol=1e-5, rtol=1e-4, msg=name)
        else:
            assert torch.equal(ours[name], t), name


SETTINGS = [
    {},
    {"order": "preact", "norm": "rms"},
    {"order": "prenorm", "layers_per_block": 2},
    {"order": "postnorm", "layers_per_block": 2, "residual_scale": 0.5},
    {"order": "resnet-v1", "norm": "batch", "layers_per_block": 2},
    {"norm": "batch", "momentum": None},
    {"gate": "channel", "layers_per_block": 2},
    {"gate": "scalar"},
    {"dropout": 0.3, "drop_path": 0.4, "layers_per_block": 2},
    {"order": "preact", "norm": "batch", "dropout": 0.3},
    {"order": "linear-add", "norm": None, "activation": None, "bias": False},
    {"order": "add-linear-act", "norm": None},
    {"order": "linear-act", "norm": None, "depth": 1},
    {"N": 23, "dtype": F16},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bits_of_the_layers(settings, calls):
    stack = make(**settings)
    dtype = stack.weight.dtype
    x, dy = torch.randn(2, 3, 7, stack.features, device=DEVICE).to(dtype)
    way = stack._way(x, stack._given())
    assert way.loop == "triton"
    same_bits(*both(stack, x, dy))
    assert calls == [len(stack)] * 2
    stack.eval()
    with torch.no_grad():
        assert torch.equal(stack(x), stack._one_by_one(x)) and calls.pop() == len(stack)


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": None, "layers_per_block": 2}, {"order": "postnorm", "layers_per_block": 2}],
    ids=str,
)
def test_under_autocast(settings, calls):
    """Products in fp16, what is added in fp32."""
    stack = make(**settings)
    x, dy = torch.randn(2, 19, 24, device=DEVICE)
    with torch.autocast(x.device.type, F16):
        assert stack._way(x, stack._given()).loop == "triton"
    ours, theirs = both(stack, x, dy, lambda: torch.autocast(x.device.type, F16))
    same_bits(ours, theirs)
    assert calls == [4, 4]


class Case(Chain):
    """As a launch a layer."""

    def forward(self, keep=1):
        x, *operands = self.tensors
        return backend.loop_forward(x, operands, self.links, self.depth, None, 1, keep, "triton")

    def ours(self, keep=1, wanted=None):
        x, *operands = self.tensors
        y, *saved = self.forward(keep)
        wanted = "1" * len(self.tensors) if wanted is None else wanted
        call = self.links, self.depth, None, 1, keep, wanted, "triton"
        grads = backend.loop_backward(self.dy, saved, x, operands, *call)
        names = [f"d{n}" for n, need in zip(self.names, wanted, strict=True) if need == "1"]
        return {"y": y, **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("processors", [1, 2, 64])
def test_as_accurate_as_eager_however_many_links_a_product_has(processors, monkeypatch):
    force(monkeypatch, processors)
    Case(N=40, depth=7).check()
    Case(N=40, depth=6, block=3, order="postnorm", dtype=F16).check()


def test_gradients_that_nobody_wants():
    case = Case(M=20, N=24, order="postnorm")
    every = case.ours()
    for wanted in ("10000", "01000", "00100", "00011"):
        found = case.ours(wanted=wanted)
        assert len(found) == 1 + wanted.count("1")
        assert all(torch.equal(t, every[name]) for name, t in found.items())


def test_operands_of_their_own_of_which_some_are_frozen():
    case = Case(M=20, N=24, depth=5)
    ours, own = case.ours(), case.without_stacking()
    kinds = (len(own.tensors) - 1) // 5
    for frozen in ((), (0, 1), (2,), (0, 3, 4)):
        learns = "".join("10"[link in frozen] * kinds for link in range(5))
        found = own.ours(wanted="01"[not frozen] + learns)
        assert len(found) == 1 + (not frozen) + kinds * (5 - len(frozen))
        for name, t in found.items():
            kind, _, link = name.partition(" ")
            theirs = ours[kind][int(link)] if link else ours[kind]
            torch.testing.assert_close(t, theirs, atol=1e-6, rtol=1e-6, msg=name)


def kept_by(run):
    """Bytes of what is saved for backward, each memory once; without parameters and x."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return sizes, y


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("settings", [{}, {"order": "preact"}, {"dropout": 0.5}], ids=str)
def test_no_more_is_kept_than_by_the_layers(settings, autocast, calls):
    stack, x = make(depth=3, **settings), torch.randn(40, 24, device=DEVICE)
    own = {t.untyped_storage().data_ptr() for t in (x, *stack.parameters())}
    sizes = []
    with torch.autocast(x.device.type, F16, enabled=autocast):
        for run in (stack, stack._one_by_one):
            found, _ = kept_by(lambda run=run: run(x))
            sizes.append(sum(size for at, size in found.items() if at not in own))
    slack = 4 * 3 * 4 * backend.ROOM  # planes begin at round places
    assert calls and sizes[0] <= sizes[1] + slack, sizes


@pytest.mark.parametrize(
    "order, autocast", [("note", False), ("preact", False), ("linear-dropout-norm-add", True)]
)
def test_recompute_gives_the_same_bits(order, autocast, calls):
    settings = {"order": order, "dropout": 0.3 * ("dropout" in order)}
    kept, again = make(**settings), make(**settings, recompute=True)
    x, dy = torch.randn(2, 20, 24, device=DEVICE)
    found = []
    for stack in (kept, again):
        torch.manual_seed(2)
        with torch.autocast(x.device.type, F16, enabled=autocast):
            found.append(step(stack, x, dy))
    same_bits(*found)
    assert calls == [4] * 4
    sizes = [sum(kept_by(lambda s=stack: s(x))[0].values()) for stack in (kept, again)]
    assert sizes[1] < sizes[0] or order == "preact"


def test_what_it_launches(monkeypatch):
    """A launch a layer forward, one or two backward, and one product for all weights."""
    launches = Launches(monkeypatch)
    force(monkeypatch, 64)
    for N, backward in ((24, 1), (520, 2)):  # dz and dx of narrow rows are one launch
        seen, _ = launches.of(Case(M=8, N=N, depth=6).ours)
        kernels = [name for name in seen if name.startswith("residual")]
        assert kernels[:6] in (
            ["residual_forward_kernel"] * 6,
            ["residual_forward_wide_kernel"] * 6,
        )
        assert len(kernels[6:]) + sum(name.startswith("addmm") for name in seen) == 6 * backward
        # the first link's input is x itself, which does not lie beside the others'
        assert [name for name in seen if "mm.out" in name and name != "addmm.out"] == [
            "bmm.out",
            "mm.out",
        ]


def test_layers_of_one_kind_in_a_row(calls):
    def layer(**settings):
        return FusedResidual(
            24, **{"activation": "silu", "device": DEVICE, "backend": "triton", **settings}
        )

    one, two = [layer(norm="batch") for _ in range(3)], [layer(dropout=0.5), layer(dropout=0.5)]
    net = FusedSequential(*one, *two, layer(gate="scalar"), layer(backend="reference"))
    x, dy = torch.randn(2, 20, 24, device=DEVICE)
    told = net.chains(x)
    assert told[0] == "0 to 2: one call, a launch a layer: it has a batch norm"
    assert told[1] == "3 to 4: one call, a launch a layer: it drops at random"
    assert "no neighbour" in told[2] and "the backend is 'reference'" in told[3]
    plain = nn.Sequential(*copy.deepcopy(net))
    found = []
    for module in (net, plain):
        torch.manual_seed(1)
        found.append(step(module, x, dy) | dict(module.named_buffers()))
    same_bits(*found)
    assert calls == [3, 2, 2, 3]


def test_layers_of_another_width_backend_or_dtype_part_a_run(calls):
    def layer(K=24, N=None, **settings):
        return FusedResidual(
            K, N, **{"order": "linear-norm-act", "device": DEVICE, "backend": "triton", **settings}
        )

    net = FusedSequential(layer(), layer(24, 40), layer(40), layer(40), layer(40, backend="auto"))
    x = torch.randn(20, 24, device=DEVICE)
    told = net.chains(x)
    assert (
        told[1]
        == "1: by itself: it has 24 features in and 40 out; on a GPU layers of one width are joined"
    )
    assert told[2].startswith("2 to 3: one call, a launch a layer: (40, 40) features")
    assert torch.equal(net(x), nn.Sequential(*net)(x)) and calls == [2]


@pytest.fixture
def as_in_a_process_of_triton(monkeypatch):
    """Whose "auto" is Triton, as on a GPU."""
    cached = backends.chain_limit, backends.chain_backend, backends.choose
    monkeypatch.setattr(backends, "environment_backend", lambda: "triton")
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("width, loop", [(32, ""), (24, "triton")])
def test_a_converted_sequential_joins_neighbours(
    width, loop, calls, monkeypatch, as_in_a_process_of_triton
):
    """Linear, norm, activation, three times: one launch where that is possible, else one call."""
    torch.manual_seed(0)
    kinds = [(nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()) for _ in range(3)]
    plain = nn.Sequential(*(m for kind in kinds for m in kind)).to(DEVICE)
    net, loops, run_stacked = copy.deepcopy(plain), [], chain.run_stacked
    convert(net)
    monkeypatch.setattr(
        chain, "run_stacked", lambda *call: loops.append(call[-1]) or run_stacked(*call)
    )
    x, dy = torch.randn(2, 20, width, device=DEVICE)
    ours, theirs = step(net, x, dy), step(plain, x, dy)
    assert calls == [3, 3] and loops == [loop]
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, atol=1e-4, rtol=1e-4, msg=name)


def test_by_the_library_s_product():
    """As the backend for true fp32 has it."""
    case, call = Case(N=24, depth=3), (None, 1, 1)
    x, *operands = case.tensors
    y, *_ = backend.loop_forward(x, operands, case.links, 3, *call, "vendor")
    weight, *rest = (t.unbind() for t in operands)
    t, vendor = x, backend.vendor
    for link in range(3):
        bias, *norm = (v[link] for v in rest)
        recipe = case.links.split(" ", 1)[1]
        t, *_ = vendor.residual_forward(
            t, weight[link], bias, *norm, None, None, None, None, None, 1, recipe, True
        )
    assert torch.equal(y, t)
    assert_as_accurate({"y": y}, {"y": case.plain(F32)["y"]}, {"y": case.plain(torch.double)["y"]})


def test_which_backend_a_chain_gets(monkeypatch):
    """The library's product only where all links get it."""
    links = "\n".join(line_of(1, 0, make_spec(o, None).text) for o in ("linear-act", "note"))
    told = {"linear-act": "vendor", "linear-act-add": "vendor"}
    choose = lambda backend, recipe, *_: told[recipe.split(" ")[0]]  # noqa: E731
    monkeypatch.setattr(backends, "choose", choose)
    call = "auto", links, F32, torch.device(DEVICE), 24, 24
    for other, expected in (("vendor", "vendor"), ("triton", "triton"), ("cuda", "cuda")):
        told["linear-act-add"] = other
        backends.chain_backend.cache_clear()
        assert backends.chain_backend(*call) == expected
    backends.chain_backend.cache_clear()


def test_compiled_it_is_one_op(calls):
    stack = make(layers_per_block=2, gate="channel")
    check_compiled_is(stack, ("loop_forward", "loop_backward"))


@pytest.mark.parametrize("settings", [{}, {"norm": "batch"}], ids=str)
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_ops_are_what_their_fakes_say(settings, keep):
    case = Case(M=18, N=24, **settings)
    x, *operands = case.tensors
    call = x, operands, case.links, case.depth, None, 1, keep
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.fusedres
    torch.library.opcheck(ops.loop_forward.default, (*call, "triton"), test_utils=tests)
    if keep:
        _, *saved = case.forward(keep)
        call = case.dy, saved, *call, "11011", "triton"
        torch.library.opcheck(ops.loop_backward.default, call, test_utils=tests)


def test_no_rows():
    found = Case(M=0, N=24).ours()
    assert found["y"].shape == found["dx"].shape == (0, 24)
    assert all(not t.any() for t in found.values())


def test_operands_that_do_not_fit_are_told():
    case = Case(M=18, N=24)
    x, weight, *rest = case.tensors
    for operands, reason in (
        ([weight[:, :, :20], *rest], r"weight is \(24, 20\), .* expected \(24, 24\)"),
        ([weight, rest[0][:, :20], *rest[1:]], r"bias has shape \(20,\) .*, expected \(24,\)"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            backend.loop_forward(x, operands, case.links, 4, None, 1, 0, "triton")
    with pytest.raises(RuntimeError, match="1 values back"):
        links = "1 linear\n1^1 linear-act-add activation=silu"
        backend.loop_forward(x, [weight, *rest][:2], links, 4, None, 1, 0, "triton")
    _, *saved = case.forward()
    call = case.links, 4, None, 1, 1, "11111", "triton"
    with pytest.raises(RuntimeError, match=r"dy is \(9, 24\), expected \(18, 24\)"):
        backend.loop_backward(case.dy[:9], saved, x, [weight, *rest], *call)


def test_twice_the_same_bits_and_views_give_them_too():
    case = Case(M=21, N=24, block=2)
    ours = case.ours()
    wide, x, dy = torch.randn(21, 60, device=DEVICE), case.tensors[0], case.dy
    for view in (x, wide[:, 1:49:2], torch.empty(24, 21, device=DEVICE).t()):
        case.tensors[0] = view.copy_(x)
        case.dy = torch.empty(21, 72, device=DEVICE)[:, ::3].copy_(dy)
        found = case.ours()
        for name, t in found.items():
            if name != "dweight" or view is x:
                assert torch.equal(t, ours[name]), name


@pytest.mark.skipif(not INTERPRET, reason="the processors of this GPU count")
def test_how_many_links_a_product_has(monkeypatch):
    def products(processors, N, depth):
        force(monkeypatch, processors)
        case, sizes = Case(N=N, M=3, depth=depth), []
        bmm = torch.bmm
        monkeypatch.setattr(torch, "bmm", lambda *a, **k: sizes.append(len(a[0])) or bmm(*a, **k))
        case.ours()
        monkeypatch.setattr(torch, "bmm", bmm)
        return sizes

    assert products(2, 24, 8) == [4, 3]  # the first link's product is by itself
    assert products(4, 24, 8) == [7]
    assert products(4, 136, 5) == [2, 2]  # four tiles a weight
