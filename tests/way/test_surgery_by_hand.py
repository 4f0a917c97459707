"""What PyTorch programs do to modules after building them, done to `Residual` and `FusedResidual`
alike: both must go on as one layer. And when a fused call may go past a submodule, told by explain.
"""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fusedres import FusedResidual, FusedResidualMLP, Residual, convert, explain, fused_residual

K = 8


class Softplus(nn.Module):
    def forward(self, t):
        return nn.functional.softplus(t)


class LoRA(nn.Module):
    """As adapters do: a module in the place of the linear, without its attributes."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(K, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def put(path, value):
    """Sets layer.`path` to value, or to value(what it was)."""

    def change(layer):
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, layer)
        plain = not callable(value) or isinstance(value, nn.Module)
        setattr(owner, name, copy.deepcopy(value) if plain else value(getattr(owner, name)))

    return change


def tensor_for_parameter(*paths):
    """As a hyper-network, FSDP or DataParallel does: a plain tensor, computed, in its place."""

    def change(layer):
        for path in paths:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, layer)
            value = getattr(owner, name)
            delattr(owner, name)
            tensor = (value.detach() * 1.5).requires_grad_(value.requires_grad)
            setattr(owner, name, tensor)

    return change


def hook(path, kind, *args, **settings):
    """Registers a hook that changes what it sees, so that it cannot be missed."""

    def double(*seen):
        values = seen[2] if kind == "forward" else seen[1]
        if isinstance(values, tuple):
            return tuple(v if v is None else 2 * v for v in values)
        return 2 * values

    def change(layer):
        module = layer.get_submodule(path)
        getattr(module, f"register_{kind}_hook")(double, *args, **settings)

    return change


def own_forward(path):
    def change(layer):
        module = layer.get_submodule(path)
        forward = module.forward
        module.forward = lambda t: 3 * forward(t)

    return change


def eval_of(path):
    return lambda layer: layer.get_submodule(path).eval()


BATCH, GATE, WIDE = {"norm": "batch"}, {"gate": "channel", "gate_init": 0.5}, {"out_features": 12}
FUSED, STAGES = True, False  # what must become of the call
SURGERY = {
    "eps": ({}, put("norm.eps", 0.5), FUSED),
    "eps of batch norm": (BATCH, put("norm.eps", 0.5), FUSED),
    "eps None": ({"norm": "rms", "eps": 0.5}, put("norm.eps", None), FUSED),
    "momentum": (BATCH, put("norm.momentum", 0.5), FUSED),
    "momentum None": (BATCH, put("norm.momentum", None), FUSED),
    "no statistics": (BATCH, put("norm.track_running_stats", False), FUSED),
    "no buffers": (
        BATCH,
        lambda m: [setattr(m.norm, n, None) for n in ("running_mean", "running_var")],
        FUSED,
    ),
    "frozen statistics": (BATCH, eval_of("norm"), FUSED),
    "no norm": ({}, put("norm", None), FUSED),
    "no norm, preact": ({"order": "preact"}, put("norm", None), FUSED),
    "a norm where none was": ({"norm": None}, put("norm", nn.RMSNorm(K, 0.1)), FUSED),
    "layer to rms": ({}, put("norm", nn.RMSNorm(K)), FUSED),
    "layer to batch": ({}, put("norm", nn.BatchNorm1d(K, 0.1)), FUSED),
    "layer without affine": ({}, put("norm", nn.LayerNorm(K, elementwise_affine=False)), FUSED),
    "a foreign norm": ({"norm": None}, put("norm", nn.GroupNorm(2, K)), STAGES),
    "rms norm is given a bias": ({"norm": "rms"}, put("norm.bias", torch.ones(K)), FUSED),
    "Identity": (BATCH, put("norm", nn.Identity()), STAGES),
    "no gate": (GATE, put("gate", None), FUSED),
    "a gate where none was": ({}, put("gate", nn.Parameter(torch.full((K,), 0.3))), FUSED),
    "channel to scalar": (GATE, put("gate", nn.Parameter(torch.tensor([0.3]))), FUSED),
    "gate of no dimension": (GATE, put("gate", nn.Parameter(torch.tensor(0.3))), STAGES),
    "a wider linear": ({"order": "linear-act"}, put("linear", nn.Linear(K, 20)), FUSED),
    "a lazy linear": ({}, put("linear", nn.LazyLinear(K)), FUSED),
    "a lazy norm": (BATCH, put("norm", lambda _: nn.LazyBatchNorm1d()), FUSED),
    "LoRA": ({}, put("linear", LoRA), STAGES),
    "LoRA on the shortcut": (WIDE, put("shortcut", LoRA), FUSED),
    "another shortcut": (WIDE, put("shortcut", nn.Sequential(nn.Linear(K, 12), nn.Tanh())), FUSED),
    "a shortcut where none was": ({}, put("shortcut", nn.Linear(K, K)), FUSED),
    "activation": ({}, put("activation", "tanh"), FUSED),
    "activation by a module": ({}, put("activation", nn.GELU("tanh")), FUSED),
    "no activation": ({}, put("activation", None), FUSED),
    "order": (BATCH, put("order", "preact"), FUSED),
    "dropout off": ({"dropout": 0.5}, put("dropout", 0.0), FUSED),
    "drop-path off": ({"drop_path": 0.5}, put("drop_path", 0.0), FUSED),
    "dropout on": ({}, put("dropout", 0.5), FUSED),
    "residual_scale": ({}, put("residual_scale", 0.25), FUSED),
    "backend": ({}, put("backend", "reference"), FUSED),
    "tensors for parameters": (
        {**BATCH, **GATE},
        tensor_for_parameter(
            "linear.weight",
            "linear.bias",
            "norm.weight",
            "norm.bias",
            "gate",
            "norm.running_mean",
            "norm.running_var",
        ),
        FUSED,
    ),
    "tensors for the shortcut's": (
        WIDE,
        tensor_for_parameter("shortcut.weight", "shortcut.bias"),
        FUSED,
    ),
    "parametrized gate": (
        GATE,
        lambda m: parametrize.register_parametrization(m, "gate", Softplus()),
        FUSED,
    ),
    "parametrized weight": ({}, lambda m: parametrizations.weight_norm(m.linear), FUSED),
    "spectral norm": ({}, lambda m: parametrizations.spectral_norm(m.linear), FUSED),
    "spectral norm, eps None": (
        {"norm": None},
        lambda m: (put("norm", nn.RMSNorm(K))(m), parametrizations.spectral_norm(m.linear)),
        FUSED,
    ),
    "parametrized norm": (
        {},
        lambda m: parametrize.register_parametrization(m.norm, "weight", Softplus()),
        FUSED,
    ),
    "parametrized shortcut": (WIDE, lambda m: parametrizations.spectral_norm(m.shortcut), FUSED),
    "weight_norm by hooks": ({}, lambda m: nn.utils.weight_norm(m.linear), STAGES),
    "pruned linear": ({}, lambda m: prune.l1_unstructured(m.linear, "weight", 0.5), STAGES),
    "pruned for good": (
        {},
        lambda m: prune.remove(prune.l1_unstructured(m.linear, "weight", 0.5), "weight"),
        FUSED,
    ),
    "pruned norm": ({}, lambda m: prune.random_unstructured(m.norm, "weight", 0.5), STAGES),
    "pruned gate": (GATE, lambda m: prune.l1_unstructured(m, "gate", 0.5), FUSED),
    "frozen": ({}, lambda m: m.linear.requires_grad_(False), FUSED),
    "deepcopy": (GATE, put("linear", copy.deepcopy), FUSED),
    "forward of its own": ({}, own_forward("linear"), STAGES),
    "a norm with a forward": ({}, own_forward("norm"), STAGES),
    "a shortcut with a forward": (WIDE, own_forward("shortcut"), FUSED),
    **{
        f"{kind} hook of {path}": (
            {**BATCH, **WIDE, "order": "linear-norm-act-add"},
            hook(path, kind),
            FUSED if path == "shortcut" else STAGES,
        )
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
        for path in ("linear", "norm", "shortcut")
    },
    "hook, always called": ({}, hook("norm", "forward", always_call=True), STAGES),
}


def pair(settings):
    torch.manual_seed(1)
    plain = Residual(K, **copy.deepcopy(settings))
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.2 * torch.randn(p.shape)
    fused = FusedResidual(K, **copy.deepcopy(settings))
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def assert_same(plain, fused, *inputs, steps=2):
    """y, every gradient and every buffer, for some calls in training and one in evaluation."""
    found = []
    for layer in (plain, fused):
        torch.manual_seed(3)
        for _ in range(steps):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = layer(*leaves)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
            layer.zero_grad()
            y.backward(dy)
        grads = {name: p.grad for name, p in layer.named_parameters()}
        state = {name: b.clone() for name, b in layer.named_buffers()}
        for path, module in layer.named_modules():
            plain = {
                f"{path}.{k}": t for k, t in vars(module).items() if isinstance(t, torch.Tensor)
            }
            grads |= {f"{k}.grad": t.grad for k, t in plain.items() if t.is_leaf}
            state |= {k: t.detach().clone() for k, t in plain.items()}
        grads |= {f"d{i}": t.grad for i, t in enumerate(leaves)}
        modes = {module: module.training for module in layer.modules()}
        found.append({"y": y, "eval": layer.eval()(*inputs), **grads, **state})
        for module, training in modes.items():
            module.training = training
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", SURGERY)
@pytest.mark.filterwarnings("ignore")  # of lazy modules and the old weight_norm
def test_both_layers_live_on_as_one(name):
    settings, change, fused_after = SURGERY[name]
    plain, fused = pair(settings)
    x = torch.randn(16, K)
    assert_same(
        plain, fused, x
    )  # what a layer keeps of its first calls must not outlive the change
    for layer in (plain, fused):
        torch.manual_seed(4)
        change(layer)
    assert_same(plain, fused, x)
    assert (fused.not_fused() is None) == (fused_after is FUSED), fused.not_fused()
    assert (explain(fused, x).calls[-1].backend == "eager") == (fused_after is STAGES)


@contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: 2 * y if isinstance(module, (nn.Linear, nn.LayerNorm)) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched(kind):
    forward = kind.forward
    kind.forward = lambda self, x: 2 * forward(self, x)
    try:
        yield
    finally:
        kind.forward = forward


def converted():
    net = nn.Sequential(nn.Linear(K, K), nn.LayerNorm(K), nn.LeakyReLU(), nn.Dropout(0.0))
    twin = copy.deepcopy(net)
    assert convert(twin).fused
    return net, twin


@pytest.mark.parametrize(
    "watched",
    [global_hook, lambda: patched(nn.Linear), lambda: patched(nn.LayerNorm)],
    ids=["global hook", "Linear.forward", "LayerNorm.forward"],
)
def test_what_is_done_to_every_module(watched):
    """Also to the shortcut of a block, to its layers and to members of a converted Sequential."""
    x = torch.randn(16, K)
    pairs = [pair({}), pair(WIDE), converted()]
    with watched():
        for plain, fused in pairs:
            assert_same(plain, fused, x)
        assert pairs[0][1].not_fused() is not None
    for plain, fused in pairs:
        assert_same(plain, fused, x)
    assert pairs[0][1].not_fused() is None


@pytest.mark.parametrize(
    "change",
    [
        put("0", lambda m: nn.Linear(K, K, bias=False)),
        put("1.eps", 0.5),
        put("1", lambda _: nn.RMSNorm(K)),
        put("2.negative_slope", 0.5),
        put("2", lambda _: nn.PReLU()),
        put("3.p", 1.0),
        tensor_for_parameter("0.weight", "1.bias"),
        hook("2", "forward_pre"),
        own_forward("1"),
        lambda m: parametrizations.weight_norm(m[0]),
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    ],
)
def test_members_of_a_converted_sequential(change):
    for inference in (False, True):
        plain, fused = converted()
        if inference:
            plain.eval(), fused.eval()
        x = torch.randn(16, K)
        assert_same(plain, fused, x)
        for net in (plain, fused):
            torch.manual_seed(4)
            change(net)
        assert_same(plain, fused, x)


@pytest.mark.parametrize(
    "change",
    [
        hook("shortcut", "forward"),
        put("shortcut", LoRA),
        tensor_for_parameter("shortcut.weight", "fc2.gate", "fc1.linear.bias"),
        own_forward("fc1.norm"),
        hook("fc1", "forward"),
        put("fc1.norm.eps", 0.5),
        put("fc1.activation", "tanh"),
        put("fc2.gate", None),
        lambda m: prune.l1_unstructured(m.shortcut, "weight", 0.5),
    ],
)
def test_blocks_of_two_matmuls(change):
    """Against the same block, whose layers are no fused ones."""
    fused = FusedResidualMLP(K, 16, 12, gate="channel", gate_init=0.5)
    plain = copy.deepcopy(fused)
    for layer in (plain.fc1, plain.fc2):
        layer.__class__ = Residual
    for block in (plain, fused):
        torch.manual_seed(4)
        change(block)
    assert_same(plain, fused, torch.randn(16, K))
    shortcut = plain.shortcut
    plain.shortcut = nn.Sequential(shortcut)  # a module of no kind that is known here: called
    torch.testing.assert_close(plain(torch.ones(3, K)), fused(torch.ones(3, K)))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_float8_and_complex_weights_run_as_torch_runs_them():
    plain, fused = pair({"norm": None, "activation": "tanh"})
    x = torch.randn(4, K, dtype=torch.complex64)
    assert_same(plain.to(torch.complex64), fused.to(torch.complex64), x)
    assert "complex64" in fused.not_fused()
    for layer in pair({}):
        layer.linear.to(torch.float8_e4m3fn)
        with pytest.raises(RuntimeError, match="Float8"):
            layer(torch.randn(4, K))


def test_replicas_and_functional_call():
    """Parameters of a replica are attributes. (What makes replicas needs several GPUs.)"""
    plain, fused = pair({**BATCH, **GATE, **WIDE})
    x = torch.randn(16, K)
    replica = fused._replicate_for_data_parallel()
    for path, module in fused.named_children():
        child = module._replicate_for_data_parallel()
        setattr(replica, path, child)
        for name, p in module.named_parameters():
            setattr(child, name, p * 1.0)
    replica.gate = fused.gate * 1.0
    assert not replica._parameters and replica.not_fused() is None
    torch.testing.assert_close(replica(x), plain(x))
    changed = {name: 2 * p for name, p in plain.named_parameters()}
    results = [torch.func.functional_call(m, changed, (x,)) for m in (plain, fused)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("order", ["norm-linear-act-add", "linear-act-add-norm"])
@pytest.mark.parametrize("early", [True, False])
def test_statistics_and_their_count_change_together(backend, momentum, order, early):
    """Checkpoints repeat a call and may stop it halfway: as many updates as counts."""
    layer = FusedResidual(K, norm="batch", momentum=momentum, order=order, backend=backend).double()
    x = torch.randn(32, K, dtype=torch.float64).requires_grad_()
    with set_checkpoint_early_stop(early):
        for _ in range(3):
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    count = layer.norm.num_batches_tracked.item()
    twin = copy.deepcopy(layer)
    twin.norm.reset_running_stats()
    for _ in range(count):
        twin(x)
    assert count in ((3,) if early and order.endswith("add") else (3, 6))
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), msg=name)


def test_statistics_that_a_transform_captures_are_updated():
    x, mean, var = torch.randn(16, K), torch.zeros(K), torch.ones(K)

    def loss(weight):
        running = {"running_mean": mean, "running_var": var}
        return fused_residual(x, weight, norm="batch", training=True, **running).square().sum()

    torch.func.grad(loss)(torch.eye(K))
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


@pytest.mark.parametrize("backend", ["auto", "reference", "cuda"])
def test_a_refused_call_leaves_no_trace(backend):
    layer = FusedResidual(K, norm="batch", backend=backend)
    before = copy.deepcopy(layer.state_dict())
    bad = [torch.randn(1, K), torch.randn(4, K + 1), torch.randn(4, K).half()]
    for x in bad + [torch.randn(4, K)] * (backend == "cuda"):
        with pytest.raises((ValueError, TypeError, NotImplementedError)):
            layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", [Residual, FusedResidual])
def test_settings_are_those_of_a_layer_built_with_them(kind):
    settings = {"order": "preact", "activation": "gelu_tanh", "residual_scale": 0.5, "dropout": 0.5}
    layer, x = kind(K), torch.randn(16, K)
    expected = kind(K, **settings)
    expected.load_state_dict(layer.state_dict())
    layer(x)
    for name, value in settings.items():
        setattr(layer, name, nn.GELU("tanh") if name == "activation" else value)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, expected(x)) and layer.spec == expected.spec
    assert repr(layer) == repr(expected)


def test_settings_are_checked_when_they_are_set():
    layer = FusedResidual(K)
    for name, value in {"activation": "no", "order": "act", "dropout": 2.0}.items():
        was = getattr(layer, name)
        with pytest.raises(ValueError, match="fusedres"):
            setattr(layer, name, value)
        assert getattr(layer, name) == was


def test_one_graph_after_a_surgery_and_for_a_cumulative_average():
    torch._dynamo.reset()
    layer = FusedResidual(K, norm="batch")
    layer.norm.eps, layer.norm.momentum, layer.activation = 0.5, None, "tanh"
    twin, x = copy.deepcopy(layer), torch.randn(16, K)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(fast(x), twin(x))
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), msg=name)


def test_a_computed_gate_is_asked_for_as_often_as_eagers():
    """Hooks on all modules see each time."""
    counts = []
    for kind in (Residual, FusedResidual):
        layer, seen = kind(8, gate="scalar"), []
        parametrize.register_parametrization(layer, "gate", nn.Identity())
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(type(module).__name__)
        )
        try:
            layer(torch.randn(3, 8))
        finally:
            hook.remove()
        counts.append([name for name in seen if "Residual" not in name])
    assert counts[0] == counts[1]


def test_a_weight_that_changes_when_it_is_asked_for_is_asked_once():
    """Spectral norm iterates; the block's second layer cannot be joined to the first."""
    blocks = []
    for _ in range(2):
        torch.manual_seed(0)
        block = FusedResidualMLP(8, dropout=0.4)
        parametrizations.spectral_norm(block.fc1.linear)
        blocks.append(block)
    blocks[1].parts = lambda: None  # two calls from the start
    x = torch.randn(5, 8)
    for block in blocks:
        torch.manual_seed(1)
        block(x)
    a, b = (block.fc1.linear.parametrizations.weight[0]._u for block in blocks)
    assert torch.equal(a, b)
