"""FusedResidualMLP(glu=True) and its op against plain torch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fusedres import FusedResidualMLP, FusedSequential, explain
from fusedres.backends import native
from fusedres.glu import composite_glu, gated, glu
from fusedres.spec import ACTIVATIONS
from oracle import assert_as_accurate

K, H = 37, 53
needs_op = pytest.mark.skipif(native.missing is not None, reason="there is no extension")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def eager(block, x):
    """The block's formula in torch's own ops, by its parameters."""
    fc1, fc2 = block.fc1, block.fc2
    w1, w2 = fc1.linear, fc2.linear
    z = w1(fc1.norm(x) if block.order == "prenorm" else x)
    t = w2(composite_glu(block._activation, False, z))
    t = fc2.norm(t) if block.order == "branch-norm" else t
    t = x + (t if fc2.gate is None else fc2.gate * t)
    return fc2.norm(t) if block.order == "postnorm" else t


def unit(function, z, dh, dtype):
    z = z.to(dtype).requires_grad_()
    h = function(z)
    (dz,) = torch.autograd.grad(h, z, dh.to(dtype))
    return {"h": h.detach(), "dz": dz}


def judge(ours, plain, exact, dtype):
    """NUMERICS 1. In float64 eager is the oracle itself, so a few hundred rounding steps are it."""
    if dtype != torch.float64:
        return assert_as_accurate(ours, plain, exact, dtype)
    for name, t in exact.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-13, atol=1e-13)


@needs_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_unit(activation, dtype):
    torch.manual_seed(0)
    z, dh = torch.randn(21, 2 * H, dtype=dtype), torch.randn(21, H, dtype=dtype)
    plain = lambda z: composite_glu(activation, False, z)  # noqa: E731
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fused = unit(lambda z: glu(z, activation, "cpu"), z, dh, dtype)
    assert len(seen) == 1, "more than z is kept: it was not the op"
    exact = unit(plain, z, dh, torch.float64)
    judge(fused, unit(plain, z, dh, dtype), exact, dtype)


@needs_op
def test_views_and_threads_give_the_same_bits():
    wide = torch.randn(700, 3 * H)
    z, dh = wide[:, : 2 * H], torch.randn(700, 2 * H)[:, :H]
    run = lambda z: unit(lambda z: glu(z, "silu", "auto"), z, dh, torch.float32)  # noqa: E731
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [run(z), run(z.clone().view(7, 100, 2 * H).flatten(0, 1))]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in ("h", "dz"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("order", "norm", "activation", "gate"),
    [
        ("prenorm", "rms", "silu", None),
        ("prenorm", "layer", "gelu_tanh", "channel"),
        ("postnorm", "layer", "gelu", None),
        ("branch-norm", "layer", "relu", "scalar"),
    ],
)
def test_block(order, norm, activation, gate, dtype):
    torch.manual_seed(1)
    settings = {"order": order, "norm": norm, "activation": activation, "gate": gate}
    block = FusedResidualMLP(K, H, glu=True, gate_init=gate and 0.7, **settings).to(dtype)
    x, dy = torch.randn(4, 9, K, dtype=dtype), torch.randn(4, 9, K, dtype=dtype)

    def results(block, function, to):
        at = x.to(to).requires_grad_()
        y = function(block, at)
        names, leaves = zip(*block.named_parameters(), strict=True)
        grads = torch.autograd.grad(y, (at, *leaves), dy.to(to))
        return {"y": y.detach(), **dict(zip(("dx", *names), grads, strict=True))}

    wide = copy.deepcopy(block).double()
    exact = results(wide, eager, torch.float64)
    plain = results(block, eager, dtype)
    judge(results(block, lambda b, x: b(x), dtype), plain, exact, dtype)


def block_and_x(**settings):
    torch.manual_seed(2)
    return FusedResidualMLP(K, H, activation="silu", glu=True, **settings), torch.randn(6, K)


def test_second_derivatives_and_transforms():
    small = FusedResidualMLP(5, 4, activation="silu", glu=True).double()
    assert torch.autograd.gradgradcheck(
        small, torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    )
    block, x = block_and_x()
    block, x = block.double(), x.double().requires_grad_()
    torch.testing.assert_close(torch.func.vmap(block)(x[:, None])[:, 0], eager(block, x))
    tangent = torch.ones_like(x)
    got = torch.func.jvp(block, (x,), (tangent,))[1]
    torch.testing.assert_close(got, torch.func.jvp(lambda x: eager(block, x), (x,), (tangent,))[1])
    h = block(x)
    rows = torch.eye(h.numel(), dtype=h.dtype).view(-1, *h.shape)[:5]
    many = torch.autograd.grad(h, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, d in zip(rows, many, strict=True):
        torch.testing.assert_close(d, torch.autograd.grad(h, x, row, retain_graph=True)[0])


def test_autocast_and_no_rows():
    block, x = block_and_x()
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = block(x), eager(block, x)
    assert y.dtype == plain.dtype
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)  # of bf16's 8 bits, a few roundings
    y = block(x[:0].requires_grad_())
    assert y.shape == (0, K)
    y.sum().backward()
    assert block.fc1.linear.weight.grad.count_nonzero() == 0


def test_hidden_dropout_acts_on_the_product():
    block, x = block_and_x(hidden_dropout=1.0)
    torch.testing.assert_close(block(x), x + block.fc2.linear.bias)
    torch.testing.assert_close(block.eval()(x), eager(block, x))


def test_copies_and_layers():
    block, x = block_and_x()
    other, _ = block_and_x()
    other.load_state_dict(block.state_dict())
    linear, norm = block.fc1.linear, block.fc1.norm
    made = FusedResidualMLP.from_layers(linear, block.fc2.linear, norm, nn.SiLU(), glu=True)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other, made):
        assert torch.equal(twin(x), block(x))
    assert made.fc1.linear is linear
    assert linear.weight.shape == (2 * H, K)
    assert "glu=silu" in repr(block)


def test_compiled():
    block, x = block_and_x()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))


@needs_op
def test_explained():
    block, x = block_and_x()
    assert "unit between the matmuls is one pass each way" in str(explain(block, x))
    assert "unit between the matmuls is one pass each way" in str(explain(block, x, device="cuda"))
    block.backend = "reference"
    told = "plain torch ops: backend 'reference' has no kernel for it"
    assert told in str(explain(block, x))
    block.backend = "auto"
    (told,) = FusedSequential(block).chains(x)
    assert "it has a gated linear unit" in told


def test_refused():
    with pytest.raises(ValueError, match="glu=True needs an activation"):
        FusedResidualMLP(K, activation=None, glu=True)
    with pytest.raises(ValueError, match="'act' alone between the two 'linear', got order 'bro'"):
        FusedResidualMLP(K, order="bro", glu=True)
    with pytest.raises(TypeError, match="glu must be True or False, got 'swiglu'"):
        FusedResidualMLP(K, glu="swiglu")
    with pytest.raises((TypeError, ValueError), match="dropout"):
        FusedResidualMLP(K, hidden_dropout="a lot", glu=True)
    with pytest.raises(ValueError, match=r"linear1 gives 53, glu=True needs twice as many"):
        FusedResidualMLP.from_layers(
            nn.Linear(K, H),
            nn.Linear(H, K),
            activation="silu",
            order="linear-act-linear-add",
            glu=True,
        )


@needs_op
def test_op_checks_what_it_gets():
    forward, backward = torch.ops.fusedres.glu_forward, torch.ops.fusedres.glu_backward
    a, b = torch.randn(3, 4), torch.randn(3, 8)[:, 1::2]
    with pytest.raises(RuntimeError, match=r"a has shape \(3\), expected \(M, H\)"):
        forward(a[:, 0], b, "relu")
    with pytest.raises(RuntimeError, match=r"b has shape \(2, 4\), expected \(3, 4\)"):
        forward(a, b[:2], "relu")
    with pytest.raises(RuntimeError, match=r"dh has shape \(3, 8\), expected \(3, 4\)"):
        backward(torch.zeros(3, 8), a, b, "relu", False)
    torch.library.opcheck(forward.default, (a, b, "silu"))
    torch.library.opcheck(backward.default, (b, a, b, "silu", True))


@needs_op
@pytest.mark.parametrize("second", [False, True])
def test_either_half_and_two_tensors(second):
    torch.manual_seed(4)
    z, dh = torch.randn(5, 4, 2 * H), torch.randn(5, 4, H)

    def two(z):
        a, b = z.chunk(2, dim=-1)
        return gated(b, a, "gelu") if second else gated(a, b, "gelu")

    plain = unit(lambda z: composite_glu("gelu", second, z), z, dh, torch.float32)
    exact = unit(lambda z: composite_glu("gelu", second, z), z, dh, torch.float64)
    for call in (lambda z: glu(z, "gelu", second=second), two):
        judge(unit(call, z, dh, torch.float32), plain, exact, torch.float32)


@needs_op
def test_two_tensors_of_which_one_learns():
    a, b = torch.randn(3, H, requires_grad=True), torch.randn(3, H)
    (da,) = torch.autograd.grad(gated(a, b, "tanh").sum(), a)
    torch.testing.assert_close(da, b * (1 - a.detach().tanh() ** 2))
    double = b.double()  # of two dtypes torch's ops make what they make
    assert gated(a, double, "tanh").dtype == torch.float64
