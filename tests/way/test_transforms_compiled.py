"""NUMERICS 5, second half: checkpoint, compiled transforms, compiled autograd and export.

What does not look inside the layer must leave the fused ops in place.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fusedres import FusedResidual, fused_residual, ops
from fusedres.backends import native
from pairs import LAYERS, K, M, assert_same, both, loss_of, make_pair, per_sample, weights


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.set_num_threads(1)


@pytest.fixture(params=["preact-rms-channel-gate", "resnet-linear-shortcut"])
def few(request):
    return make_pair(LAYERS[request.param])


@pytest.fixture
def note():
    return make_pair({})


@pytest.fixture
def launches(monkeypatch):
    """Counts of fused forward and backward calls."""
    counts = {"forward": 0, "backward": 0}
    if native.missing:
        pytest.skip(native.missing)
    for name, table in (("forward", ops.FORWARD), ("backward", ops.BACKWARD)):

        def counting(*args, name=name, op=table["cpu"]):
            counts[name] += 1
            return op(*args)

        monkeypatch.setitem(table, "cpu", counting)
    return counts


def trained(layer, call):
    x = torch.randn(M, K, requires_grad=True)
    y = call(layer, x)
    return y.detach(), torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(launches, reentrant):
    def call(layer, x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    def check(layer):
        x = torch.randn(M, K, requires_grad=True)
        y = call(layer, x)
        y.backward(torch.randn_like(y))  # the only way through a reentrant checkpoint
        return y.detach(), x.grad, [p.grad for p in layer.parameters()]

    both(make_pair({"order": "postnorm"}), check)
    assert launches == {"forward": 2, "backward": 1}


def test_checkpoint_repeats_the_masks():
    """The recomputed forward draws the same seed: checkpoint keeps the generator's state."""
    layer = FusedResidual(K, dropout=0.5, drop_path=0.2, activation="silu")
    results = []
    for call in (
        FusedResidual.__call__,
        lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    ):
        torch.manual_seed(2)
        results.append(trained(layer, call))
    assert_same(*results, tolerance=0.0)


def test_selective_checkpoint_saves_the_op(launches):
    """A policy names our op as any other: what it saves is not launched again."""
    op = torch.ops.fusedres.residual_forward.default

    def policy(ctx, called, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if called is op else CheckpointPolicy.PREFER_RECOMPUTE

    def call(layer, x):
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(lambda x: layer(x * 1.5), x, use_reentrant=False, context_fn=contexts)

    both(make_pair({}), lambda layer: trained(layer, call))
    assert launches["backward"] == 1


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def against_eager(layers, check):
    """`check(layer, compiler)`, compiled of the fused layer and eager of the plain one."""
    fused, plain = layers
    results = []
    for layer, compiler in ((fused, compiled), (plain, lambda f: f)):
        torch.manual_seed(1)
        results.append(check(layer, compiler))
    assert_same(*results)


def test_compiled_func_grad(few):
    """Silently wrong over an autograd.Function on torch 2.11 and 2.13, hence the values."""

    def check(layer, compiler):
        c = torch.randn(M, layer.out_features)
        f = compiler(grad(loss_of(layer, c), argnums=(0, 1)))
        return f(weights(layer), torch.randn(M, K))

    against_eager(few, check)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_compiled_func_jvp(norm):
    def check(layer, compiler):
        return compiler(lambda x, t: jvp(layer, (x,), (t,)))(torch.randn(M, K), torch.randn(M, K))

    against_eager(make_pair({"norm": norm, "activation": "silu"}), check)


def test_compiled_vmap(few):
    against_eager(
        few, lambda layer, compiler: compiler(vmap(lambda x: layer(x)))(torch.randn(3, M, K))
    )


def test_compiled_per_sample_gradients(few):
    against_eager(
        few, lambda layer, compiler: compiler(per_sample(layer))(weights(layer), torch.randn(M, K))
    )


def test_compiled_hessian_vector_product(note):
    def check(layer, compiler):
        f = grad(lambda x: layer(x).square().sum())
        return compiler(lambda x, t: vjp(f, x)[1](t))(torch.randn(M, K), torch.randn(M, K))

    against_eager(note, check)


def test_transform_of_a_compiled_layer(note):
    """The graph of the plain call is not taken for the transformed one."""
    x, tangent = torch.randn(M, K), torch.randn(M, K)
    fused, plain = note
    fast = torch.compile(fused, backend="aot_eager")
    assert_same(fast(x), plain(x))
    assert_same(jvp(fast, (x,), (tangent,)), jvp(plain, (x,), (tangent,)))
    assert_same(fast(x), plain(x))


def test_compiled_checkpoint(few):
    def check(layer, compiler):
        f = compiler(lambda x: checkpoint(layer, x, use_reentrant=False))
        return trained(layer, lambda _, x: f(x))

    against_eager(few, check)


def test_compiled_autograd(few):
    def check(layer, compiler):
        x = torch.randn(M, K, requires_grad=True)
        y = layer(x)
        dy = torch.randn_like(y)
        if compiler is not compiled:
            y.backward(dy)
        else:
            with torch._dynamo.compiled_autograd._enable(compiled):
                y.backward(dy)
        return x.grad, [p.grad for p in layer.parameters()]

    against_eager(few, check)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export(strict, training):
    """The fused op is in the exported program, which serves every batch size and can be saved."""
    fused, plain = make_pair({"norm": "batch", "out_features": 7})
    plain.load_state_dict(fused.state_dict())
    fused.train(training), plain.train(training)
    dynamic = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    program = torch.export.export(
        copy.deepcopy(fused), (torch.randn(M, K),), dynamic_shapes=dynamic, strict=strict
    )
    modules = program.graph_module.modules()  # strict mode has parts of the graph in submodules
    called = [str(node.target) for part in modules for node in part.graph.nodes]
    assert any("fusedres.residual_layer" in target for target in called), called
    module = program.module()
    for rows in (M, 9):
        x = torch.randn(rows, K)
        assert_same(module(x), plain(x))
    if training:
        buffers, expected = dict(module.named_buffers()), dict(plain.named_buffers())
        assert_same([buffers[name] for name in expected], list(expected.values()))


LOAD = """
import sys, torch, fusedres
program = torch.export.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert torch.equal(program.module()(x), y)
"""


def test_an_exported_program_loads_in_another_process(tmp_path):
    layer, x = FusedResidual(6, activation="gelu"), torch.randn(4, 6)
    program = torch.export.export(layer, (x,), strict=False)
    assert "fusedres.residual_layer" in str(program.graph)
    files = [str(tmp_path / name) for name in ("layer.pt2", "values.pt")]
    torch.export.save(program, files[0])
    torch.save((x, layer(x).detach()), files[1])
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_export_fixes_the_widths():
    """Any number of rows, but the features it was exported with: they choose the backend."""

    class Call(torch.nn.Module):
        def forward(self, x, weight):
            return fused_residual(x, weight)

    auto = torch.export.Dim.AUTO
    x, weight = torch.randn(M, K), torch.randn(K, K)
    shapes = {"x": {0: auto, 1: auto}, "weight": {0: auto, 1: auto}}
    program = torch.export.export(Call(), (x, weight), dynamic_shapes=shapes, strict=False).module()
    x = torch.randn(M + 3, K)
    assert_same(program(x, weight), fused_residual(x, weight, backend="reference"))
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.randn(M, K + 1), torch.randn(K + 1, K + 1))
