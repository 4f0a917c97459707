"""torch.compile: one graph, no break or warning, our ops forward and backward, eager's values."""

import copy
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from fusedres import FusedResidual, fused_residual
from fusedres.backends import native

pytestmark = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))

K = 6
BATCHES = (4, 3, 7, 16, 5)
LAYERS = {
    "note": {},
    "postnorm-gelu": {"order": "postnorm", "activation": "gelu"},
    "batch": {"norm": "batch"},
    "preact-batch": {"order": "preact", "norm": "batch", "bias": False},
    "rms-channel-gate": {"norm": "rms", "gate": "channel", "gate_init": 0.3, "residual_scale": 0.5},
    "scalar-gate-no-norm": {"norm": None, "gate": "scalar", "gate_init": 0.3},
    "dropout": {"dropout": 0.3, "drop_path": 0.2},
    "linear-shortcut": {"out_features": 9, "activation": "silu"},
    "pad-shortcut": {"out_features": 9, "shortcut": "pad"},
    "no-residual": {"order": "linear-norm-act"},
}


@pytest.fixture(autouse=True)
def _strict():
    """What dynamo warns of is an error, an lru_cache say; deprecations are no UserWarnings."""
    torch._dynamo.reset()
    counters.clear()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Graphs:
    """aot_eager with a memory: a compiler that keeps the names of every graph's aten-level ops."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    def _keep(self, names):
        def compiler(module, example_inputs):
            names.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
            return make_boxed_func(module.forward)

        return compiler


def step(function, x, seed=0, **inputs):
    """y and the gradient of x, from a random cotangent."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = function(x, **inputs)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator)
    y.backward(dy)
    return y.detach(), x.grad


def assert_close(ours, plain, tolerance=1e-6):
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    scale = plain.abs().max().clamp_min(1e-3)
    assert (ours - plain).abs().max() <= tolerance * scale


def assert_same_layers(ours, plain):
    """Gradients and buffers (running statistics, number of batches)."""
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert_close(p.grad, q.grad)
    for b, c in zip(ours.buffers(), plain.buffers(), strict=True):
        assert_close(b, c)


def check_training(settings, backend, *, lead=(), dynamic=None, sizes=BATCHES):
    """Steps with several batch sizes: compiled does what eager does, in at most two graphs."""
    eager = FusedResidual(K, **settings)
    ours = copy.deepcopy(eager)
    fast = torch.compile(ours, fullgraph=True, backend=backend, dynamic=dynamic)
    for seed, rows in enumerate(sizes):
        x = torch.randn(rows, *lead, K)
        for a, b in zip(step(fast, x, seed), step(eager, x, seed), strict=True):
            assert_close(a, b)
    assert_same_layers(ours, eager)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= (1 if dynamic else 2)


@pytest.mark.parametrize("name", LAYERS)
def test_aot_eager(name):
    """The fused op stands in the graph, forward and backward, and none of the composite's ops."""
    graphs = Graphs()
    check_training(LAYERS[name], graphs.backend)
    for names, op in ((graphs.forward, "residual_forward"), (graphs.backward, "residual_backward")):
        assert f"fusedres.{op}.default" in names, names
        foreign = ("norm", "relu", "gelu", "silu", "mm", "sigmoid", "where")
        assert not [
            n for n in names if n.startswith("aten") and any(word in n for word in foreign)
        ], names


@pytest.mark.parametrize("name", ["batch", "linear-shortcut", "rms-channel-gate"])
def test_inductor(name):
    check_training(LAYERS[name], "inductor")


@pytest.mark.parametrize("name", ["batch", "dropout", "linear-shortcut"])
def test_dynamic(name):
    check_training(LAYERS[name], "aot_eager", dynamic=True, lead=(2,))


def test_dynamic_length():
    """Drop-path by samples of a length that the graph does not know: sample_rows is a symbol."""
    eager = FusedResidual(K, drop_path=0.5)
    fast = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, shape in enumerate([(4, 3), (5, 7), (8, 2), (3, 4, 2)]):
        x = torch.randn(*shape, K)
        for a, b in zip(step(fast, x, seed), step(eager, x, seed), strict=True):
            assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 2  # of three and of four dimensions


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_batch_norm_counts_once(backend):
    layer = FusedResidual(K, norm="batch")
    fast = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(8, K)
    for _ in range(3):
        fast(x).sum().backward()
    assert layer.norm.num_batches_tracked == 3
    z = layer.linear(x).detach()
    assert_close(layer.norm.running_mean, (1 - 0.9**3) * z.mean(0))
    assert_close(layer.norm.running_var, 0.9**3 + (1 - 0.9**3) * z.var(0))


def test_batch_norm_of_a_frozen_norm():
    """A norm in evaluation inside a layer in training."""
    layer = FusedResidual(K, norm="batch")
    layer.norm.eval()
    x = torch.randn(8, K)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(fast(x), layer(x))
    layer.norm.train()
    assert_close(fast(x), layer(x))
    assert layer.norm.num_batches_tracked == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_masks_differ_from_call_to_call(backend):
    """The graph draws the seed from torch's generator; backward uses the forward's mask."""
    layer = FusedResidual(64, dropout=0.5, norm=None, activation=None, order="linear-add")
    torch.nn.init.eye_(layer.linear.weight)
    torch.nn.init.zeros_(layer.linear.bias)
    fast = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.ones(4, 64, requires_grad=True)
    masks = []
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        y = fast(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert set(y.unique().tolist()) == {1.0, 3.0}
        assert torch.equal(dx, y.detach())  # both 1 + mask / (1 - p)
        masks.append(y.detach() > 2)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[2], masks[3])


def test_explicit_residual():
    eager = FusedResidual(K, 9)
    ours = copy.deepcopy(eager)
    fast = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for rows in BATCHES:
        x, r = torch.randn(rows, K), torch.randn(rows, 9, requires_grad=True)
        dr = []
        for layer in (fast, eager):
            y, dx = step(layer, x, residual=r)
            dr += [(y, dx, r.grad)]
            r.grad = None
        for a, b in zip(*dr, strict=True):
            assert_close(a, b)
    assert_same_layers(ours, eager)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_function(dynamic):
    """`fused_residual` with its settings as arguments, whose values the graph is guarded by."""
    graphs = Graphs()
    fast = torch.compile(fused_residual, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    for settings in ({}, {"eps": 1e-2}, {"eps": 1e-3, "order": "preact", "residual_scale": 0.25}):
        for rows, features in ((4, K), (5, K), (7, 9)):
            x, weight = torch.randn(rows, features), torch.randn(features, features)
            for a, b in zip(
                step(lambda x: fast(x, weight, **settings), x),  # noqa: B023
                step(lambda x: fused_residual(x, weight, **settings), x),  # noqa: B023
                strict=True,
            ):
                assert_close(a, b)
    assert "fusedres.residual_forward.default" in graphs.forward
    assert "fusedres.residual_backward.default" in graphs.backward


def test_function_linear_shortcut_and_gate():
    tensors = {
        "weight": torch.randn(9, K),
        "gate": torch.randn(9),
        "shortcut_weight": torch.randn(9, K),
        "shortcut_bias": torch.randn(9),
    }
    fast = torch.compile(fused_residual, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    for a, b in zip(step(fast, x, **tensors), step(fused_residual, x, **tensors), strict=True):
        assert_close(a, b)


def test_a_whole_net():
    """Layers of different kinds and widths in one graph."""
    net = torch.nn.Sequential(
        FusedResidual(K, 8, activation="gelu"),
        FusedResidual(8, order="preact", norm="batch"),
        torch.nn.Dropout(0.0),
        FusedResidual(8, order="postnorm", dropout=0.1),
    )
    eager = copy.deepcopy(net)
    graphs = Graphs()
    fast = torch.compile(net, fullgraph=True, backend=graphs.backend)
    x = torch.randn(5, K)
    for a, b in zip(step(fast, x), step(eager, x), strict=True):
        assert_close(a, b)
    assert_same_layers(net, eager)
    launches = graphs.forward.count("fusedres.residual_forward.default")
    assert launches == 4  # with the linear shortcut
    assert counters["stats"]["unique_graphs"] == 1


def test_no_gradients():
    layer = FusedResidual(K).eval()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_close(fast(x), layer(x))
    with torch.inference_mode():
        assert_close(fast(x), layer(x))


def test_autocast():
    layer = FusedResidual(K)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = fast(x), layer(x)
    assert ours.dtype == torch.float32  # bf16 branch + fp32 x
    assert torch.equal(ours, plain)


def test_composite_compiles_too():
    check_training({"backend": "reference", "norm": "batch"}, "aot_eager")


def test_a_wrong_setting_is_still_an_error():
    fast = torch.compile(fused_residual, backend="aot_eager")
    with pytest.raises(ValueError, match="unknown activation 'rellu'"):
        fast(torch.randn(3, K), torch.randn(K, K), activation="rellu")
