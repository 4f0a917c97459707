"""FusedResidualStack: the numbers of its layers one by one, from one parameter of each kind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cases import ALIASES
from fusedres import FusedResidual, FusedResidualStack, Residual, chain
from oracle import assert_as_accurate

pytestmark = pytest.mark.usefixtures("native")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture
def calls(monkeypatch):
    """How many layers each joined call has, if it is not refused."""
    depths, run = [], chain.run_stacked

    def counted(x, text, depth, *more):
        found = run(x, text, depth, *more)
        depths.append(depth)
        return found

    monkeypatch.setattr(chain, "run_stacked", counted)
    return depths


class Plain(nn.Module):
    """The stack's layers, stage by stage."""

    def __init__(self, stack):
        super().__init__()
        self.block = stack.layers_per_block
        self.layers = nn.ModuleList()
        for layer in stack.to_layers():
            twin = Residual(
                layer.in_features,
                order=layer.order,
                norm=layer.spec.norm,
                activation=layer.activation,
                gate=layer.spec.gate,
                residual_scale=layer.residual_scale,
                dtype=layer.linear.weight.dtype,
                bias=layer.linear.bias is not None,
            )
            twin.load_state_dict(layer.state_dict())
            self.layers.append(twin)

    def forward(self, x):
        source = x
        for i, layer in enumerate(self.layers):
            source = x if i % self.block == 0 else source
            x = layer(x, source if layer.spec.adds else None)
        return x

    def stacked_gradients(self):
        kinds = {}
        for name, p in self.layers.named_parameters():
            kinds.setdefault(name.split(".", 1)[1], []).append(p.grad)
        names = {"linear.weight": "weight", "linear.bias": "bias"}
        return {names.get(k, k.replace(".", "_")): torch.stack(v) for k, v in kinds.items()}


def results(net, x, dy):
    leaf = x.clone().requires_grad_()
    net.zero_grad()
    y = net(leaf)
    y.backward(dy.to(y.dtype))
    if isinstance(net, Plain):
        grads = net.stacked_gradients()
    else:
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **grads}


def compare(stack, M, dtype=F32):
    torch.manual_seed(1)
    x, dy = (torch.randn(M, stack.features).to(dtype) for _ in range(2))
    plain = Plain(stack)
    true = copy.deepcopy(plain).double()
    found = [results(stack, x, dy), results(plain, x, dy), results(true, x.double(), dy.double())]
    judge(*found, what=f"{stack}, {M} rows")


def judge(*found, what):
    """Ours, the layers' and the true results."""
    # each over its size to the next power of two, which rounds nothing
    sizes = {n: t.square().mean().sqrt().clamp_min(1e-30) for n, t in found[-1].items()}
    sizes = {name: 2.0 ** size.log2().round() for name, size in sizes.items()}
    found = [{n: (t / sizes[n]).to(t.dtype) for n, t in result.items()} for result in found]
    assert found[0].keys() == found[1].keys()
    assert_as_accurate(*found, what=what)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("order", ALIASES)
@pytest.mark.parametrize("block", [1, 3])
def test_the_numbers_of_its_layers(block, order, norm, dtype, calls):
    torch.manual_seed(0)
    stack = FusedResidualStack(
        40, 6, layers_per_block=block, order=order, norm=norm, activation="silu", dtype=dtype
    )
    compare(stack, 50, dtype)
    assert calls == [6]


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("order", ["note", "prenorm", "linear-norm-add-gate-act"])
@pytest.mark.parametrize("block", [1, 2])
def test_gates_and_a_scaled_residual(block, order, gate, calls):
    torch.manual_seed(0)
    stack = FusedResidualStack(
        33, 4, layers_per_block=block, order=order, gate=gate, gate_init=0.7, residual_scale=0.4,
        bias=False, activation="silu",
    )  # fmt: skip
    assert stack.gate.shape == (4 // block, 1 if gate == "scalar" else 33)
    compare(stack, 70)
    assert calls == [4]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("depth, width, M", [(200, 64, 64), (40, 256, 96), (1000, 16, 20)])
def test_deep(depth, width, M, block, calls):
    torch.manual_seed(0)
    compare(FusedResidualStack(width, depth, layers_per_block=block, activation="silu"), M)
    assert calls == [depth]


@pytest.mark.parametrize("depth, width, M", [(6, 40, 50), (40, 256, 96), (3, 500, 9000)])
@pytest.mark.parametrize("order", ["note", "preact", "postnorm"])
def test_recompute_keeps_less_and_gives_the_same_bits(order, depth, width, M):
    """The last shape's values lie in several pieces of memory, and some stand alone in one."""
    torch.manual_seed(0)
    stack = FusedResidualStack(width, depth, order=order, activation="gelu")
    x, dy = torch.randn(M, width), torch.randn(M, width)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    found, sizes = [], []
    for stack.recompute in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found.append(results(stack, x, dy))
        own = {t.data_ptr() for t in (x, *stack.parameters())}
        sizes.append(sum(t.numel() for t in kept if t.data_ptr() not in own) - x.numel())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    inputs, z = (depth - 1) * x.numel(), depth * x.numel()
    saves_z = order != "preact"
    assert sizes == [inputs + z * saves_z, inputs]


@pytest.mark.parametrize("depth, width", [(12, 24), (12, 500)])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_without_gradients_values_take_turns_in_memory(block, depth, width):
    torch.manual_seed(0)
    stack = FusedResidualStack(width, depth, layers_per_block=block, order="postnorm")
    x = torch.randn(90, width)
    with torch.no_grad():
        y = stack(x)
    assert torch.equal(y, stack(x).detach())


WAYS = {
    "batch norm, wide": ({"features": 520, "norm": "batch"}, "too large"),
    "wide": ({"features": 520}, "too large"),
    "few rows": ({"features": 200, "rows": 3}, "too large to be packed"),
    "reference": ({"backend": "reference"}, "the backend is 'reference'"),
}


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_one_by_one_where_layers_cannot_be_joined(way, block, calls):
    torch.manual_seed(0)
    settings, reason = WAYS[way]
    settings = {"features": 24, "rows": 20, **settings}
    x = torch.randn(settings.pop("rows"), settings["features"])
    stack = FusedResidualStack(depth=4, layers_per_block=block, **settings)
    assert reason in stack.why_not_joined(x)
    twin = copy.deepcopy(stack)
    torch.manual_seed(5)
    y = stack(x)
    y.square().sum().backward()
    torch.manual_seed(5)
    source = out = x
    for i, layer in enumerate(twin):
        source = out if i % block == 0 else source
        out = layer(out, source if layer.spec.adds and source is not out else None)
    out.square().sum().backward()
    assert not calls
    torch.testing.assert_close(y, out)
    for (name, p), q in zip(stack.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    for b, c in zip(stack.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c)
        assert stack.running_mean.any() and stack.num_batches_tracked.tolist() == [1] * 4


@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("autocast", [BF16, F16], ids=str)
@pytest.mark.parametrize("order", ["note", "prenorm", "postnorm", "linear-norm-add-gate-act"])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_mixed_precision_is_that_of_the_layers(recompute, block, order, autocast, x_dtype, calls):
    """Under autocast the stream stays in fp32, products are rounded."""
    torch.manual_seed(0)
    settings = {"gate": "channel", "gate_init": 0.7} if "gate" in order else {}
    stack = FusedResidualStack(
        24,
        6,
        layers_per_block=block,
        order=order,
        recompute=recompute,
        activation="silu",
        **settings,
    )
    alone = copy.deepcopy(stack)
    alone._way = lambda *_: "to be compared with"
    x, dy, found = torch.randn(40, 24).to(x_dtype), torch.randn(40, 24), []
    with torch.autocast("cpu", autocast):
        for net in (stack, alone):
            found.append(results(net, x, dy))
    differs = torch.promote_types(x_dtype, autocast) != x_dtype
    assert calls == ([] if differs else [6])  # a block that makes fp32 of x is not like the rest
    assert torch.equal(found[0]["y"], found[1]["y"])
    found.append(results(copy.deepcopy(alone).double(), x.double(), dy.double()))
    judge(*found, what=f"{stack} under autocast, {x_dtype}")


def test_under_autocast_what_the_products_took_is_kept():
    """And not the stream besides, which is twice as large."""
    stack, x, kept = FusedResidualStack(24, 6), torch.randn(50, 24), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", BF16):
        stack(x)
    own = sum(t.numel() * t.element_size() for t in kept if t.dim() == 1)
    assert own == (5 + 6) * x.numel() * 2  # casts of inputs but the first one, and z


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", [*ALIASES, "act-norm-linear-gate-add"])
@pytest.mark.parametrize("block, width", [(1, 24), (3, 24), (2, 440)])
def test_batch_norm_is_that_of_the_layers(block, width, order, recompute, calls):
    """In training, and then in evaluation, by the running statistics that it left; also where
    weights fit no cache together.
    """
    torch.manual_seed(0)
    if width > 100 and (order, recompute) not in (("note", True), ("preact", False)):
        pytest.skip("one order of each kind is enough")
    gate = {"gate": "channel", "gate_init": 0.7} if "gate" in order else {}
    stack = FusedResidualStack(
        width, 12 if width > 100 else 6, layers_per_block=block, order=order, norm="batch",
        activation="silu", recompute=recompute, **gate,
    )  # fmt: skip
    plain = copy.deepcopy(stack)
    plain._way = lambda *_: "to be compared with"
    true = Plain(stack).double()
    x, dy = torch.randn(90, width), torch.randn(90, width)
    for training in (True, False):
        found = []
        for net in (stack, plain, true):
            net.train(training)
            dtype = F64 if net is true else F32
            found.append(results(net, x.to(dtype), dy.to(dtype)))
        judge(*found, what=f"{stack}, training {training}")
        with torch.no_grad():
            assert torch.equal(stack(x), found[0]["y"])
            plain(x)
    assert calls == [len(stack)] * 4
    for name, t in stack.named_buffers():
        torch.testing.assert_close(t, plain.get_buffer(name))
    assert stack.num_batches_tracked.tolist() == [2] * len(stack)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_those_of_the_layers(momentum):
    """Counted once for each call, also where a checkpoint runs forward twice; not in evaluation."""
    stack = FusedResidualStack(8, 4, layers_per_block=2, norm="batch", momentum=momentum)
    stack.requires_grad_(True)
    layers = Plain(stack)
    for layer in layers.layers:
        layer.norm.momentum = momentum
    for step in range(3):
        x = 2 * torch.randn(9, 8) + 1
        stack.train(step < 2)
        layers.train(step < 2)
        stack(x)
        layers(x)
    before = stack.num_batches_tracked.tolist()
    stack.train()
    leaf = torch.randn(9, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(stack, leaf, use_reentrant=False).sum().backward()
    layers.train()(leaf)
    assert before == [2] * 4 and stack.num_batches_tracked.tolist() == [3] * 4
    for name, t in stack.named_buffers():
        each = torch.stack([layer.norm.get_buffer(name) for layer in layers.layers])
        torch.testing.assert_close(t, each)


@pytest.mark.parametrize("gone", ["dtype", "one row"])
def test_a_batch_norm_that_cannot_run_changes_nothing(gone):
    stack = FusedResidualStack(8, 4, norm="batch")
    x = torch.randn(1 if gone == "one row" else 5, 8)
    with pytest.raises((ValueError, TypeError), match=r"more than 1 row|weight has dtype"):
        stack(x.double() if gone == "dtype" else x)
    assert not stack.num_batches_tracked.any() and not stack.running_mean.any()


DROPS = {
    "dropout": {"dropout": 0.4},
    "dropout before linear": {"order": "dropout-linear-norm-act-add", "dropout": 0.4},
    "drop-path": {"drop_path": 0.5},
    "both, norms later": {"order": "postnorm", "dropout": 0.2, "drop_path": 0.3},
    "all": {"dropout": 1.0},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("drops", DROPS)
def test_masks_are_those_of_the_layers(drops, block, recompute, calls):
    """The same draws of torch's generator, in the same order, and samples of several rows."""
    torch.manual_seed(0)
    stack = FusedResidualStack(
        24, 6, layers_per_block=block, recompute=recompute, activation="silu", **DROPS[drops]
    )
    alone = copy.deepcopy(stack)
    alone._way = lambda *_: "to be compared with"
    x, dy, after = torch.randn(5, 7, 24), torch.randn(5, 7, 24), []
    found = []
    for net in (stack, alone):
        torch.manual_seed(5)
        found.append(results(net, x, dy))
        after.append(torch.rand(1))
    assert calls == [6] and after[0] == after[1]
    assert torch.equal(found[0]["y"], found[1]["y"])
    for name, t in found[1].items():
        torch.testing.assert_close(found[0][name], t, msg=lambda text, name=name: f"{name}: {text}")


def test_a_refused_call_draws_no_masks():
    stack = FusedResidualStack(8, 4, dropout=0.5)
    stack.bias = nn.Parameter(torch.zeros(4, 7))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="bias has shape"):
        stack(torch.ones(3, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_the_gradients_of_gradients_have_the_masks_of_forward():
    torch.manual_seed(0)
    stack = FusedResidualStack(8, 4, layers_per_block=2, dropout=0.4, drop_path=0.4, dtype=F64)
    x, found = torch.randn(6, 2, 8, dtype=F64), []
    for again in (False, True):
        torch.manual_seed(5)
        found.append(
            torch.autograd.grad(stack(x).sin().sum(), [*stack.parameters()], create_graph=again)
        )
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("how", ["autocast", "func", "vmap", "checkpoint", "meta", "3-D", "empty"])
def test_where_something_looks_inside(how):
    torch.manual_seed(0)
    stack = FusedResidualStack(16, 4, layers_per_block=2)
    plain, x = Plain(stack), torch.randn(4, 16)

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
        if how == "meta":
            return torch.zeros_like(copy.deepcopy(net).to("meta")(x.to("meta")), device="cpu")
        return net(x[:, None].expand(4, 3, 16) if how == "3-D" else x[:0])

    ours, theirs = call(stack), call(plain)
    assert ours.dtype == theirs.dtype
    close = {"rtol": 0.02, "atol": 0.02} if how == "autocast" else {}
    torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_it_is_one_op(recompute, norm):
    torch.manual_seed(0)
    stack = FusedResidualStack(16, 50, layers_per_block=2, recompute=recompute, norm=norm)
    x, ops = torch.randn(4, 16), []

    def backend(graph, _inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(stack, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    ours, theirs = results(compiled, x, x), results(stack, x, x)
    found = [op for op in ops if "fusedres" in op]
    assert found == ["fusedres.chain_forward.default", "fusedres.chain_backward.default"]
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name] if name in ours else ours[f"_orig_mod.{name}"], t)
    assert norm == "layer" or stack.num_batches_tracked.tolist() == [2] * 50


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_one_op_and_trains(strict):
    torch.manual_seed(0)
    stack, x = FusedResidualStack(16, 6), torch.randn(4, 16)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(stack, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["fusedres.residual_chain.default", "<built-in function getitem>"]
    for rows in (4, 9):
        x = torch.randn(rows, 16)
        ours, theirs = results(program.module(), x, x), results(stack, x, x)
        for name, t in theirs.items():
            torch.testing.assert_close(ours[name], t)


def test_gradcheck_and_double_backward():
    torch.manual_seed(0)
    stack = FusedResidualStack(4, 4, layers_per_block=2, activation="tanh", dtype=F64)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    names, tensors = zip(*stack.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *tensors))
    assert torch.autograd.gradgradcheck(call, (x, *tensors))
    leaves = (x, *stack.parameters())
    fused, composite = (
        torch.autograd.grad(stack(x).sin().sum(), leaves, create_graph=again)
        for again in (False, True)
    )
    torch.testing.assert_close(composite, fused)


def test_each_gradient_alone():
    torch.manual_seed(0)
    stack = FusedResidualStack(16, 4, layers_per_block=2, order="prenorm", gate="channel")
    x, dy = torch.randn(6, 16), torch.randn(6, 16)
    together = results(stack, x, dy)
    stack.requires_grad_(False)
    for name, p in stack.named_parameters():
        p.requires_grad_()
        (alone,) = torch.autograd.grad(stack(x), p, dy)
        p.requires_grad_(False)
        assert torch.equal(alone, together[name]), name
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(stack(leaf), leaf, dy)[0], together["dx"])


@pytest.mark.parametrize("depth, width", [(30, 48), (12, 500)])
def test_the_same_bits_with_any_number_of_threads(depth, width):
    torch.manual_seed(0)
    stack = FusedResidualStack(width, depth, layers_per_block=3, activation="gelu")
    x, dy = torch.randn(300, width), torch.randn(300, width)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(results(stack, x, dy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


CHANGES = {
    "activation": lambda s: setattr(s, "activation", "tanh"),
    "order": lambda s: setattr(s, "order", "preact"),
    "eps": lambda s: setattr(s, "eps", 0.5),
    "residual_scale": lambda s: setattr(s, "residual_scale", 0.5),
    "dropout": lambda s: setattr(s, "dropout", 1.0),
    "no bias": lambda s: setattr(s, "bias", None),
    "no norm weight": lambda s: setattr(s, "norm_weight", None),
    "weight": lambda s: setattr(s, "weight", nn.Parameter(torch.randn(4, 16, 16))),
    "parametrized": lambda s: parametrize.register_parametrization(s, "weight", Halved()),
    "other strides": lambda s: setattr(s, "weight", nn.Parameter(s.weight.detach().mT)),
}


class Halved(nn.Module):
    def forward(self, t):
        return t / 2


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_counts(change):
    torch.manual_seed(0)
    stack, x = FusedResidualStack(16, 4, layers_per_block=2), torch.randn(9, 16)
    before = stack(x)
    CHANGES[change](stack)
    y = stack(x)
    assert not torch.equal(y, before) or change in ("no bias", "no norm weight")
    out = source = x
    for i, layer in enumerate(stack):
        source = out if i % 2 == 0 else source
        out = layer(out, source if layer.spec.adds else None)
    torch.testing.assert_close(y, out)


def test_starts_as_layers_one_by_one_do():
    torch.manual_seed(3)
    stack = FusedResidualStack(8, 5, norm="batch", gate="channel")
    torch.manual_seed(3)
    layers = nn.Sequential(*(FusedResidual(8, norm="batch", gate="channel") for _ in range(5)))
    loaded = FusedResidualStack(8, 5, norm="batch", gate="channel")
    assert not loaded.load_state_dict(layers.state_dict()).missing_keys
    for twin in (loaded, FusedResidualStack.from_layers(layers)):
        for name, t in stack.state_dict().items():
            assert torch.equal(t, twin.state_dict()[name]), name
    back = nn.Sequential(*stack.to_layers()).state_dict()
    for name, t in layers.state_dict().items():
        assert torch.equal(t, back[name]), name


def test_loads_layers_inside_a_model_and_names_what_is_missing():
    stack = FusedResidualStack(8, 4, layers_per_block=2, gate="channel", gate_init=0.5)
    stack = nn.Sequential(nn.Linear(4, 8), stack)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*stack[1].to_layers()))
    state = plain.state_dict()
    stack.load_state_dict(state)
    del state["1.2.linear.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.bias"'):
        stack.load_state_dict(state)


def test_from_layers_keeps_blocks_and_settings():
    stack = FusedResidualStack(
        8, 4, layers_per_block=2, order="preact", gate="scalar", gate_init=0.3, activation="mish",
        eps=1e-3, dropout=0.1, drop_path=0.2, residual_scale=0.5,
    )  # fmt: skip
    twin = FusedResidualStack.from_layers(stack.eval().to_layers())
    x = torch.randn(5, 8)
    assert torch.equal(stack(x), twin(x)) and twin.layers_per_block == 2 and not twin.training
    assert (twin.drop_path, twin.dropout, twin.eps) == (0.2, 0.1, 1e-3)


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ([nn.Linear(4, 4)], TypeError, "layer 0 is a Linear"),
        ([], ValueError, "0 layers"),
        ([FusedResidual(4, order="linear-act")], ValueError, "whose last one adds"),
        ([FusedResidual(4), FusedResidual(4, order="preact")], ValueError, "layer 1.*not of one"),
        ([FusedResidual(4), FusedResidual(4, bias=False)], ValueError, "layer 1.*not of one kind"),
        ([FusedResidual(4), FusedResidual(5)], ValueError, "layer 1.*not of one kind"),
        ([FusedResidual(4, 5)], ValueError, "not of one kind"),
    ],
)  # fmt: skip
def test_from_layers_refuses(layers, error, message):
    with pytest.raises(error, match=rf"(?s)from_layers: .*{message}"):
        FusedResidualStack.from_layers(layers)


def test_layers_and_slices_train_the_stack():
    torch.manual_seed(0)
    stack, x = FusedResidualStack(8, 6, layers_per_block=2), torch.randn(5, 8)
    y = stack(x)
    torch.testing.assert_close(stack[2:6](stack[:2](x)), y)
    assert len(stack) == 6 and len(stack[2:6]) == 4 and len(list(stack)) == 6
    (expected,) = torch.autograd.grad(y.sum(), stack.weight)
    (found,) = torch.autograd.grad(stack[4:](stack[:4](x)).sum(), stack.weight)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        stack[-1].linear.bias.fill_(3)
        stack[:2].weight.zero_()
    assert torch.equal(stack.bias[5], torch.full((8,), 3.0)) and not stack.weight[:2].any()
    for index in (6, -7, slice(1, 3), slice(0, 6, 2), slice(2, 2)):
        with pytest.raises(IndexError, match="FusedResidualStack"):
            stack[index]


def test_copies_and_pickles():
    stack, x = FusedResidualStack(8, 4, norm="batch"), torch.randn(5, 8)
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(twin(x), copy.deepcopy(stack)(x)) and str(twin) == str(stack)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depth": 5, "layers_per_block": 2}, "multiple of layers_per_block=2, got 5"),
        ({"depth": 0}, "depth must be a positive int, got 0"),
        ({"features": "8"}, "features must be a positive int"),
        ({"layers_per_block": 2, "order": "add-norm-linear"}, "adds before linear"),
        ({"norm": "group"}, "unknown norm 'group'"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedResidualStack(**{"features": 8, "depth": 4, **settings})


def test_a_call_that_does_not_fit_is_told():
    stack = FusedResidualStack(8, 4)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), expected \(\.\.\., 8\)"):
        stack(torch.randn(3, 7))
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32, x has torch\.float64"):
        stack(torch.randn(3, 8).double())
    stack.bias = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\)"):
        stack(torch.randn(3, 8))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script"):
        torch.jit.script(stack)


def test_the_op_refuses_what_does_not_fit():
    x, weight = torch.randn(3, 8), torch.randn(4, 8, 8)
    op, line = torch.ops.fusedres.chain_forward, "0 linear-add"
    assert op(x, [weight], line, 4, None, 1, 0)[0].shape == (3, 8)
    for operands, text, depth, message in (
        ([weight], line, 3, "3 entries"),
        ([weight], f"{line}\n{line}", 3, "multiple of 2"),
        ([weight, weight], line, 4, "2 operands, expected 1"),
        ([weight], "1 linear-add", 4, "too few"),
        ([weight[0]], line, 4, "4 entries"),
        ([weight], "", 4, "without links"),
        ([weight], "0 linear\n0<1 add-linear", 4, "only an add after linear"),
        ([weight], "0<1 linear-add", 4, "takes value -1"),
        ([weight], "0 linear-add\n0<1 linear-add", 4, "two links add value 0"),
        ([weight], "64 linear-add", 4, "no link"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(x, operands, text, depth, None, 1, 0)
    with pytest.raises(RuntimeError, match="keep must be"):
        op(x, [weight], line, 4, None, 1, 5)
    drops, many = "0 linear-dropout-add dropout=0.5", torch.zeros(4, dtype=torch.long)
    for text, seeds, message in (
        (drops, None, "need seed"),
        (drops, many[:3], "3 seeds for 4 links"),
        (line, many, "4 seeds for 0 links"),
        (drops, many.int(), "of int64"),
        (drops, many[:, None], "of int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(x, [weight], text, 4, seeds, 1, 0)
    _, kept = op(x, [weight], line, 4, None, 1, 1)
    few = "saved tensor 0"
    for saved, message in (([], few), ([kept[1:]], few), ([kept, kept], "2 saved")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fusedres.chain_backward(x, saved, x, [weight], line, 4, None, 1, "11", False)
