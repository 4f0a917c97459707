"""NUMERICS 5: every transform of torch gives of FusedResidual what it gives of Residual, in plain
torch.

A function transform looks inside the layer, so the layer runs as ordinary torch ops there
(`composite_only` in functional.py). The others, checkpoint and export and the like, must leave the
fused ops in place.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fusedres import FusedResidual, Residual, fused_residual

K, N, M = 5, 5, 4
LAYERS = {
    "note": {},
    "preact-rms-channel-gate": {
        "order": "preact",
        "norm": "rms",
        "activation": "gelu",
        "gate": "channel",
    },
    "postnorm-scalar-gate": {
        "order": "postnorm",
        "activation": "tanh",
        "gate": "scalar",
        "gate_init": 0.7,
    },
    "bert-pad": {
        "order": "bert-output",
        "out_features": 7,
        "shortcut": "pad",
        "residual_scale": 0.5,
    },
    "resnet-linear-shortcut": {"order": "resnet-v1", "activation": "silu", "out_features": 3},
}


def assert_same(ours, plain, tolerance=1e-6):
    """Trees of tensors, each within `tolerance` of the other's largest value."""
    ours, plain = torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(plain)
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert b.abs().max() > 0, "nothing to compare"
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.set_num_threads(1)


@pytest.fixture(params=LAYERS)
def pair(request):
    """FusedResidual and Residual with the same parameters, none of them at its initial 0 or 1."""
    return make_pair(LAYERS[request.param])


@pytest.fixture(params=["preact-rms-channel-gate", "resnet-linear-shortcut"])
def few(request):
    """As `pair`, for what compiles for seconds."""
    return make_pair(LAYERS[request.param])


@pytest.fixture
def note():
    return make_pair({})


def make_pair(settings):
    fused, plain = FusedResidual(K, **settings), Residual(K, **settings)
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(0.3 * torch.randn_like(p))
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def weights(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


def loss_of(layer, cotangent):
    """(parameters, x) -> number."""
    return lambda params, x: (functional_call(layer, params, (x,)) * cotangent).sum()


def both(pair, check):
    """The results of `check(layer)` agree; it sees the same random numbers for each layer."""
    results = []
    for layer in pair:
        torch.manual_seed(1)
        results.append(check(layer))
    assert_same(*results)


# ---- eager transforms ----------------------------------------------------------------------------


def test_func_grad(pair):
    def check(layer):
        x, c = torch.randn(M, K), torch.randn(M, layer.out_features)
        return grad(loss_of(layer, c), argnums=(0, 1))(weights(layer), x)

    both(pair, check)


def test_vjp(pair):
    def check(layer):
        y, pull = vjp(
            lambda p, x: functional_call(layer, p, (x,)), weights(layer), torch.randn(M, K)
        )
        return y, pull(torch.randn_like(y))

    both(pair, check)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobian(pair, jacobian):
    both(pair, lambda layer: jacobian(layer)(torch.randn(M, K)))


def test_jvp(pair):
    def check(layer):
        tangents = {name: torch.randn_like(p) for name, p in weights(layer).items()}
        f = lambda p, x: functional_call(layer, p, (x,))  # noqa: E731
        return jvp(f, (weights(layer), torch.randn(M, K)), (tangents, torch.randn(M, K)))

    both(pair, check)


def test_linearize(pair):
    def check(layer):
        y, push = linearize(layer, torch.randn(M, K))
        return y, push(torch.randn(M, K))

    both(pair, check)


def test_hessian(pair):
    def check(layer):
        c = torch.randn(2, layer.out_features)
        return hessian(lambda x: (layer(x).square() * c).sum())(torch.randn(2, K))

    both(pair, check)


def test_hessian_vector_product_forward_over_reverse(pair):
    def check(layer):
        c = torch.randn(M, layer.out_features)
        f = grad(lambda x: (layer(x).square() * c).sum())
        return jvp(f, (torch.randn(M, K),), (torch.randn(M, K),))

    both(pair, check)


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_x(pair, in_dim):
    both(pair, lambda layer: vmap(layer, in_dims=in_dim)(torch.randn(3, M, K).movedim(0, in_dim)))


def test_vmap_over_weights_by_functional_call(pair):
    """Ensembles: one x, four layers."""

    def check(layer):
        stacked = {n: p + 0.1 * torch.randn(4, *p.shape) for n, p in weights(layer).items()}
        return vmap(lambda p, x: functional_call(layer, p, (x,)), (0, None))(
            stacked, torch.randn(M, K)
        )

    both(pair, check)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None)])
def test_vmap_over_weights_of_the_function(in_dims):
    x, weight = torch.randn(3, M, K), torch.randn(3, K, K)
    x, weight = (t if d == 0 else t[0] for t, d in zip((x, weight), in_dims, strict=True))
    ours = vmap(lambda x, w: fused_residual(x, w, order="postnorm"), in_dims)(x, weight)

    def formula(x, w):
        return torch.nn.functional.layer_norm((x @ w.mT).relu() + x, (K,))

    assert_same(ours, vmap(formula, in_dims)(x, weight))


def test_vmap_over_the_residual_alone(note):
    both(note, lambda layer: vmap(layer, (None, 0))(torch.randn(M, K), torch.randn(3, M, K)))


def test_vmap_with_different_masks():
    layer = FusedResidual(64, dropout=0.5, norm=None, activation=None)
    y = vmap(layer, randomness="different")(torch.ones(2, 3, 64))
    assert not torch.equal(y[0], y[1])
    y = vmap(layer, randomness="same")(torch.ones(2, 3, 64))
    assert torch.equal(y[0], y[1])


def per_sample(layer):
    c = torch.randn(layer.out_features)
    return vmap(grad(lambda p, x: (functional_call(layer, p, (x[None],)) * c).sum()), (None, 0))


def test_per_sample_gradients(pair):
    both(pair, lambda layer: per_sample(layer)(weights(layer), torch.randn(M, K)))


def test_forward_ad_dual(pair):
    def check(layer):
        with fwad.dual_level():
            y = layer(fwad.make_dual(torch.randn(M, K), torch.randn(M, K)))
            primal, tangent = fwad.unpack_dual(y)
        return primal, tangent

    both(pair, check)


def test_gradient_penalty(pair):
    """create_graph=True, twice differentiated: to the parameters through the gradient of x."""

    def check(layer):
        x = torch.randn(M, K, requires_grad=True)
        c = torch.randn(M, layer.out_features)
        (dx,) = torch.autograd.grad((layer(x).square() * c).sum(), x, create_graph=True)
        penalty = (dx.norm(dim=1) - 1).square().sum() + layer(x).sum()
        return dx.detach(), torch.autograd.grad(penalty, [x, *layer.parameters()])

    both(pair, check)


def test_three_derivatives(note):
    def check(layer):
        x = torch.randn(M, K, requires_grad=True)
        value = (layer(x).sin() * torch.randn(M, N)).sum()
        results = []
        for _ in range(3):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            results.append(dx.detach())
            value = dx.square().sum()
        return results

    both(note, check)


# ---- what keeps the fused ops --------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Counts of fused forward and backward calls."""
    from fusedres import ops

    counts = {"forward": 0, "backward": 0}
    if ops.native_missing:
        pytest.skip(ops.native_missing)
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
    """The recomputed forward draws the same seed, as checkpoint keeps the state of the
    generator.
    """
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


# ---- compiled ------------------------------------------------------------------------------------


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
    assert any("fusedres.residual_forward" in target for target in called), called
    module = program.module()
    for rows in (M, 9):
        x = torch.randn(rows, K)
        assert_same(module(x), plain(x))
    if training:
        buffers, expected = dict(module.named_buffers()), dict(plain.named_buffers())
        assert_same([buffers[name] for name in expected], list(expected.values()))
