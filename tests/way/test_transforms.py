"""NUMERICS 5, first half: function transforms give of FusedResidual what they give of Residual.

A function transform looks inside the layer, so the layer runs as ordinary torch ops there
(`composite_only` in functional.py). The second half is in test_transforms_compiled.py.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from fusedres import FusedResidual, fused_residual
from pairs import LAYERS, K, M, N, assert_same, both, loss_of, make_pair, per_sample, weights


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=LAYERS)
def pair(request):
    return make_pair(LAYERS[request.param])


@pytest.fixture
def note():
    return make_pair({})


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

    both(pair, check, 2e-6)  # in a scalar gate's gradient 20 terms cancel


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


def test_tensor_that_outlived_its_transform(note):
    """torch.autograd.Function.apply unwraps such tensors; apply_plainly leaves that to torch."""
    kept = []

    def keep(x):
        kept.append(2 * x)
        return x.sum()

    def check(layer):
        kept.clear()
        start = torch.randn(M, K)
        grad(keep)(start)
        x = kept[0]
        assert torch._C._functorch.is_functorch_wrapped_tensor(x)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert_same(x, 2 * start)
        return y.detach(), [p.grad for p in layer.parameters()]

    both(note, check)
