"""explain against what the call then does: backend, saved bytes, and no trace left behind."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from fusedres import (
    ACTIVATIONS,
    ORDERS,
    FusedResidual,
    FusedResidualMLP,
    FusedResidualStack,
    FusedSequential,
    Residual,
    explain,
    functional,
    fused_residual,
)
from fusedres.autograd import FusedResidualFunction
from fusedres.backends import native
from fusedres.spec import make_spec
from fusedres.tools.calls import formula


def saved_bytes(layer, *args):
    """Bytes that autograd keeps for backward, parameters and buffers apart; each saving counts.
    What stands in for a tensor that nobody looks at has no memory.
    """
    known = {t.data_ptr() for t in itertools.chain(layer.parameters(), layer.buffers())}
    sizes = []

    def pack(t):
        if t.data_ptr() not in known and any(t.stride()):
            sizes.append(t.numel() * t.itemsize)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(*args)
    return sum(sizes)


LAYERS = {
    "note": {},
    "note batch": {"norm": "batch"},
    "dropout": {"dropout": 0.1, "drop_path": 0.2},
    "preact": {"order": "preact", "norm": "rms"},
    "nothing to redo": {"norm": None, "activation": None},
    "projected": {"out_features": 20},
    "padded": {"out_features": 20, "shortcut": "pad"},
    "gate": {"gate": "channel", "order": "resnet-v1"},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_saved_bytes_are_the_real_ones(name, autocast, native):
    layer, x = FusedResidual(12, **LAYERS[name]), torch.randn(9, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        told = explain(layer, x)
        real = saved_bytes(layer, x)
    assert told.backend == native
    assert told.saved_bytes == real


def test_saves_nothing_without_gradients(native):
    layer, x = FusedResidual(12), torch.randn(9, 12)
    with torch.no_grad():
        assert explain(layer, x).saved_bytes == 0
    assert explain(layer.requires_grad_(False), x).saved_bytes == 0
    assert explain(layer, x.requires_grad_()).saved_bytes > 0


@pytest.mark.parametrize("order", ORDERS)
def test_backend_is_the_one_that_runs(order, monkeypatch):
    layer, x = FusedResidual(12, order=order, norm="batch"), torch.randn(9, 12)
    told, ran = explain(layer, x), []

    def record(*args):
        ran.append((args[-2], args[-1]))
        return FusedResidualFunction.apply(*args)

    monkeypatch.setattr(functional, "apply_plainly", record)
    layer(x)
    expected = [] if told.backend == "reference" else [(told.calls[0].recipe, told.backend)]
    assert ran == expected


def test_leaves_no_trace():
    layer = FusedResidual(12, norm="batch", dropout=0.5)
    state, random = {k: t.clone() for k, t in layer.state_dict().items()}, torch.get_rng_state()
    explain(layer, torch.randn(9, 12, generator=torch.Generator()))
    assert all(torch.equal(t, state[k]) for k, t in layer.state_dict().items())
    assert layer.norm.num_batches_tracked == 0 and torch.equal(torch.get_rng_state(), random)


def test_meta_tensors_and_other_devices():
    layer = FusedResidual(1024, device="meta", dtype=torch.bfloat16)
    x = torch.empty(65536, 1024, device="meta", dtype=torch.bfloat16)
    assert explain(layer, x).backend == "reference"
    there = explain(layer, x, device="cpu")
    assert there.backend == ("cpu" if native.missing is None else "reference")
    if there.backend == "cpu":
        assert there.saved_bytes == 2 * 65536 * 1024 * 2  # x and z
        assert there.calls[0].forward_launches == there.calls[0].backward_launches == 1
    assert explain(FusedResidual(8), torch.empty(3, 8, device="meta")).calls[0].why_not["cuda"]


def test_triton_plan():
    pytest.importorskip("triton")
    from fusedres.backends import plan

    x = torch.empty(4096, 512, device="meta", dtype=torch.bfloat16)
    layer = FusedResidual(512, device="meta", dtype=torch.bfloat16, backend="triton")
    told = explain(layer, x, device="cuda")
    call = told.calls[0]
    assert told.backend == "triton" and call.kernel == "residual_forward_wide_kernel (wide)"
    chosen = plan.plan(
        layer.spec, torch.bfloat16, 4096, 512, 512, plan.device_of(torch.device("cuda"))
    )
    assert chosen.tile.options(2).items() <= call.tiles.items()
    assert call.tiles["programs"] == chosen.programs and call.tiles["waves"] > 0.5
    assert (call.forward_launches, call.backward_launches) == (1, 3)
    assert call.saved == {"x": 4096 * 1024, "z": 4096 * 1024, "row statistics": 4096 * 8}
    for part in ("BLOCK_M=", "waves=", "shared memory=", "forward 1, backward at most 3"):
        assert part in str(told)
    assert "x is on cuda" in call.why_not["cpu"]
    if not torch.cuda.is_available():
        assert any("no GPU is here" in note for note in told.notes)
    double = FusedResidual(512, gate="scalar", device="meta", dtype=torch.float64)
    refused = explain(double, x.double(), device="cuda")
    assert refused.backend == "reference" and "float64" in refused.calls[0].why_not["triton"]


@pytest.mark.parametrize(
    "settings, rows, dtype, backend, launches",
    [
        ({}, 4096, torch.bfloat16, "cuda", (1, 2)),
        ({}, 4097, torch.bfloat16, "triton", (1, 3)),
        ({"norm": "batch"}, 256, torch.bfloat16, "triton", (1, 3)),
        ({}, 256, torch.float32, "cuda", (1, 2)),
        ({}, 4096, torch.float32, "vendor", (2, 3)),
        ({"order": "prenorm"}, 4096, torch.float32, "vendor", (3, 5)),
        ({"order": "prenorm"}, 8192, torch.bfloat16, "triton", (2, 5)),
        ({"order": "prenorm", "norm": "batch"}, 8192, torch.float32, "triton", (1, 5)),
    ],
)
def test_what_auto_takes_on_a_gpu(settings, rows, dtype, backend, launches):
    pytest.importorskip("triton")
    if backend == "cuda" and not native.has_cuda:
        pytest.skip("built without CUDA kernels")
    layer = FusedResidual(512, device="meta", dtype=dtype, **settings)
    told = explain(layer, torch.empty(rows, 512, device="meta", dtype=dtype), device="cuda")
    assert told.backend == backend
    assert (told.calls[0].forward_launches, told.calls[0].backward_launches) == launches
    assert "vendor" not in told.calls[0].why_not
    if backend == "cuda":
        assert told.calls[0].kernel == "residual_forward_sm80_kernel"
        assert {"BLOCK_M", "BLOCK_N", "programs", "waves"} <= told.calls[0].tiles.keys()


def test_what_is_not_fused():
    x = torch.randn(9, 12)
    linear = explain(FusedResidual(12, 8), x)
    assert [call.name for call in linear.calls] == ["shortcut", "layer"]
    assert any("linear shortcut" in note for note in linear.notes)
    assert [call.name for call in explain(FusedResidual(12, 8), x, x[:, :8]).calls] == ["layer"]
    module = explain(FusedResidual(12, shortcut=nn.Tanh()), x)
    assert len(module.calls) == 1 and any("Tanh" in note for note in module.notes)
    layer = FusedResidual(12, norm="batch")
    layer.norm = nn.SyncBatchNorm(12)
    assert explain(layer, x).backend == "eager" and "SyncBatchNorm" in str(explain(layer, x))
    eager = explain(Residual(12), x)
    assert eager.backend == "eager" and eager.saved_bytes is None
    seen, layer = [], FusedResidual(12)
    torch.func.vmap(lambda t: seen.append(explain(layer, t)) or t)(x[None])
    assert seen[0].backend == "reference" and "transform" in str(seen[0])


def test_mlp():
    told = explain(FusedResidualMLP(12, 20, 8), torch.randn(3, 5, 12))
    assert [call.name for call in told.calls] == ["shortcut", "fc1", "fc2"]
    assert [call.recipe.split()[0] for call in told.calls[1:]] == ["norm-linear-act", "linear-add"]
    assert told.calls[2].formula == "y = x @ W.T + b + residual"


def test_partial():
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(5, 8)
    call = partial(fused_residual, weight=weight, order="bert-output", dropout=0.1, training=True)
    told = explain(call, x)
    assert told.calls[0].recipe == "linear-dropout-add-norm norm=layer dropout=0.1"
    assert told.calls[0].formula == "y = layer_norm(dropout(x @ W.T, 0.1) + x)"
    assert call(x).shape == (5, 8)
    projected = partial(fused_residual, weight=torch.randn(4, 8), shortcut_weight=torch.randn(4, 8))
    assert [c.name for c in explain(projected, x).calls] == ["shortcut", "layer"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "y = relu(layer_norm(x @ W.T + b)) + x"),
        ({"order": "preact", "norm": "batch"}, "y = relu(batch_norm(x)) @ W.T + b + x"),
        ({"order": "postnorm", "gate": "scalar"}, "y = layer_norm(gate * relu(x @ W.T + b) + x)"),
        ({"order": "linear-add", "gate": "scalar"}, "y = gate * (x @ W.T + b) + x"),
        (
            {"order": "resnet-v1", "residual_scale": 0.5},
            "y = relu(layer_norm(x @ W.T + b) + 0.5 * x)",
        ),
    ],
)
def test_formula(settings, expected):
    assert formula(make_spec(**settings, training=True)) == expected


def test_every_activation_is_named():
    for activation in ACTIVATIONS:
        assert activation in formula(make_spec(activation=activation))


def test_errors_are_the_calls_own():
    layer = FusedResidual(12)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=r"expected a FusedResidual.*got (Linear|Sequential)$"):
            explain(other, torch.randn(2, 2))
    with pytest.raises(TypeError, match=r"got ModuleList; .* get_submodule\('1'\)"):
        explain(nn.ModuleList([nn.ReLU(), nn.Sequential(layer)]), torch.randn(9, 12))
    for bad in (torch.randn(9, 11), torch.randn(9, 12).double(), torch.randn(9, 12).int(), None):
        with pytest.raises((TypeError, ValueError)) as real:
            layer(bad)
        with pytest.raises(type(real.value)):
            explain(layer, bad)
    with pytest.raises(ValueError, match="pass residual"):
        explain(FusedResidual(12, 8, shortcut="identity"), torch.randn(9, 12))
    with pytest.raises(NotImplementedError, match="cannot run"):
        explain(FusedResidual(12, backend="cuda"), torch.randn(9, 12))


def test_a_network_tells_its_chains():
    layers = [FusedResidual(16), FusedResidual(16, 24, norm="batch", dropout=0.5)]
    net = FusedSequential(nn.Linear(8, 16), *layers, nn.Linear(24, 2))
    told = explain(net, torch.randn(4, 8))
    assert [call.backend for call in told.calls] == ["cpu"] * 3  # of which one is a shortcut
    assert told.notes[1] == "1 to 2: one call" and "it is a Linear" in told.notes[0]
    assert "FusedSequential on x (4, 8)" in str(told)
    assert not net[2].norm.num_batches_tracked


def test_layers_of_a_network_that_say_the_same_are_told_once():
    x = torch.randn(4, 16)
    told = explain(FusedSequential(*[FusedResidual(16) for _ in range(200)]), x)
    assert len(told.calls) == len(told.layers) == 200
    text = str(told)
    assert "\nlayers 0 to 199: each a FusedResidual on x (4, 16)" in text
    assert text.endswith("\nnote: 0 to 199: one call") and len(text.splitlines()) < 15
    slow = [FusedResidual(16, backend="reference") for _ in range(4)]
    told = explain(FusedSequential(slow[0], nn.Tanh(), *slow[1:], FusedResidual(16)), x)
    assert told.notes[0] == "0, 2 to 4: by itself: its backend is 'reference'"
    assert [note.split(":")[0] for note in told.notes] == ["0, 2 to 4", "1", "5"]
    assert "\nlayers 0, 2 to 4: each a " in str(told) and "\nlayer 5: FusedRes" in str(told)
    mixed = [FusedResidual(16) if i % 2 else nn.Dropout(0.1) for i in range(40)]
    assert "\nlayers 20 of 1 to 39: each a" in str(explain(FusedSequential(*mixed), x))


def test_a_sequential_tells_of_the_layers_that_are_known():
    inner = nn.Sequential(FusedResidualStack(16, 3), nn.Linear(16, 24), nn.Tanh())
    net = nn.Sequential(nn.Linear(8, 16), inner, FusedResidual(24), FusedResidualMLP(24))
    told = explain(net, torch.randn(4, 8))
    assert list(told.layers) == ["1", "2", "3"] and told.backend == told.calls[-1].backend
    assert told.layers["1"].layers["0"].notes[0] == "layers run all in one call"
    assert [call.name for call in told.calls] == ["layer", "layer", "fc1", "fc2"]
    assert told.notes[0].startswith("modules are called one by one")
    for line in ("layer 1: Sequential on x (4, 16)", "  layer 0: FusedResidualStack of", "fc2: y"):
        assert line in str(told)


def test_a_stack_tells_of_its_last_layer_and_whether_one_call_joins_all():
    stack = FusedResidualStack(16, 6, layers_per_block=2)
    for x in (torch.randn(4, 16), torch.empty(4, 16, device="meta")):
        told = explain(stack, x)
        assert told.notes[0] == "layers run all in one call" and "of 6 layers" in told.title
        assert told.saved_bytes  # it has parameters that want gradients
    there = explain(stack, x, device="cuda").notes[0]
    assert there == "layers run all in one call, one launch forward, three backward"
    gated = FusedResidualStack(16, 6, gate="scalar")
    assert explain(gated, x, device="cuda").notes[0] == f"{there} and the gates' sums"
    bf16 = {"dtype": torch.bfloat16}
    for other, reason in (
        (
            FusedResidualStack(16, 2, gate="scalar", order="gate-linear-add", **bf16),
            "a gate before",
        ),
        (FusedResidualStack(16, 2, dropout=0.5, **bf16), "it drops at random"),
        (FusedResidualStack(16, 2, norm="batch", **bf16), "it has a batch norm"),
        (FusedResidualStack(512, 2, **bf16), "(512, 512) features"),
    ):
        rows = torch.empty((), **bf16).expand(4096, other.features)
        there = explain(other, rows, device="cuda").notes[0]
        assert (
            there.startswith("layers run all in one call, a launch a layer: ") and reason in there
        )
    alone = FusedResidualStack(16, 2, backend="reference")
    there = explain(alone, torch.randn(4, 16), device="cuda").notes[0]
    assert there == "layers run one by one: the backend is 'reference'"
    torch.set_autocast_enabled("cuda", True)  # which torch.autocast refuses without a GPU
    try:
        there = explain(stack, x, device="cuda").notes[0]
        assert there == "layers run all in one call, one launch forward, three backward"
        other = FusedResidualStack(16, 2, order="postnorm")
        assert "a stage after add" in explain(other, x, device="cuda").notes[0]
    finally:
        torch.set_autocast_enabled("cuda", False)
    wide = FusedResidualStack(256, 2, **bf16)
    x = torch.empty((), **bf16).expand(4096, 256)
    assert "rows that is faster" in explain(wide, x, device="cuda").notes[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(stack, torch.randn(4, 16)).notes[0] == "layers run all in one call"
        there = explain(stack, torch.randn(4, 16), device="cuda").notes[0]
        assert there.startswith("layers run all in one call")
    stack.backend = "reference"
    reason = "one by one: the backend is 'reference'"
    assert reason in explain(stack, torch.randn(4, 16)).notes[0]


def test_a_narrow_block_of_two_matmuls_is_one_op():
    block = FusedResidualMLP(16, 32)
    x = torch.randn(9, 16)
    assert "one op runs both calls" in explain(block, x).notes
    assert "one op runs both calls" in explain(FusedResidualMLP(16, dropout=0.5), x).notes
    for other in (FusedResidualMLP(16, 32, 8), FusedResidualMLP(256)):
        told = explain(other, torch.randn(9, other.features))
        assert "one op runs both calls" not in told.notes
    assert "one op" not in str(explain(block, torch.randn(9, 16), device="cuda"))
