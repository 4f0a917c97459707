"""FusedResidualFunction and autograd: what it saves, what it computes, what it refuses."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from cases import ALIASES
from fusedres import FusedResidual, FusedResidualFunction, Residual, fused_residual, ops

K, M = 5, 4


@pytest.fixture(autouse=True)
def _native(native):
    """Every test here is about the fused path."""


def twins(**settings):
    fused = FusedResidual(K, **settings)
    plain = Residual(K, **settings)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def assert_same(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_saved_tensors_are_unpacked_once():
    unpacked = []
    layer = FusedResidual(K)
    x = torch.randn(M, K, requires_grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        y = layer(x)
    y.sum().backward()
    # x, weight, bias, norm's two, z, stats
    assert len({id(t) for t in unpacked}) == len(unpacked) <= 7


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "batch"}, {"order": "preact", "gate": "channel"}]
)
def test_saved_tensor_hooks(settings):
    """What is packed elsewhere (as float64 copies, then on the CPU) comes back into gradients."""
    layer = FusedResidual(K, **settings)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, K)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x), inputs, dy)

    def pack(t):
        return t.double() if t.is_floating_point() else t

    def unpack(t):
        return t.float() if t.is_floating_point() else t

    for hooks in (saved_tensors_hooks(pack, unpack), save_on_cpu()):
        with hooks:
            y = layer(x)
        assert_same(torch.autograd.grad(y, inputs, dy), expected)


@pytest.mark.parametrize("order", ["note", "postnorm", "linear-add", "linear"])
def test_output_is_no_view(order):
    x = torch.randn(M, K, requires_grad=True)
    y = fused_residual(x, torch.eye(K), order=order, norm=None, activation=None)
    assert not y._is_view()
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    y.mul_(2)  # the output may be changed in place
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(
        dx, torch.full_like(x, 4.0 if "add" in order or order in ("note", "postnorm") else 2.0)
    )


@pytest.mark.parametrize("name", ["x", "weight", "norm_weight", "residual"])
def test_change_in_place_is_noticed(name):
    tensors = {
        "x": torch.randn(M, K),
        "weight": torch.randn(K, K),
        "norm_weight": torch.randn(K),
        "residual": torch.randn(M, K),
    }
    leaf = torch.randn(M, K, requires_grad=True)
    y = fused_residual(
        **{**tensors, "x": tensors["x"] + 0 * leaf} if name != "x" else tensors, order="postnorm"
    )
    if name == "x":
        held = tensors["x"] * leaf
        tensors["weight"].requires_grad_()  # whose gradient looks at x
        y = fused_residual(**{**tensors, "x": held}, order="postnorm")
        held.mul_(2)
    else:
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_graph_kept_and_used_again():
    layer = FusedResidual(K, norm="batch")
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, K)
    y = layer(x)
    inputs = [x, *layer.parameters()]
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, dy)


@pytest.fixture
def asked(monkeypatch):
    """The `needs` of every fused backward call."""
    masks, op = [], ops.BACKWARD["cpu"]
    monkeypatch.setitem(ops.BACKWARD, "cpu", lambda *args: masks.append(args[-1]) or op(*args))
    return masks


def test_only_gradients_that_are_needed(asked):
    layer = FusedResidual(K)
    x = torch.randn(M, K)
    layer.requires_grad_(False)
    layer.linear.bias.requires_grad_()
    layer(x).sum().backward()
    layer.norm.weight.requires_grad_()
    layer(x.requires_grad_()).sum().backward()
    assert asked == [0b100, 0b1101]
    assert layer.linear.weight.grad is None


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("order", [*ALIASES, "gate-norm-linear-add", "linear-gate-norm-add"])
def test_each_gradient_alone(order, norm):
    """Also where a batch norm, whose gradient needs all rows first, lies between it and y."""
    layer = FusedResidual(K, order=order, norm=norm, gate="channel", gate_init=0.7, backend="cpu")
    x, residual, dy = torch.randn(M, K), torch.randn(M, K), torch.randn(M, K)
    inputs = {"x": x, "residual": residual, **dict(layer.named_parameters())}

    def gradients(*names):
        for name, t in inputs.items():
            t.requires_grad_(name in names)
        return torch.autograd.grad(layer(x, residual), [inputs[name] for name in names], dy)

    for name, together in zip(inputs, gradients(*inputs), strict=True):
        (alone,) = gradients(name)
        torch.testing.assert_close(alone, together, msg=lambda text, name=name: f"d{name}: {text}")


def test_nothing_is_saved_where_nothing_is_needed(monkeypatch):
    saved, op = [], ops.FORWARD["cpu"]
    monkeypatch.setitem(ops.FORWARD, "cpu", lambda *args: saved.append(args[-1]) or op(*args))
    layer = FusedResidual(K)
    x = torch.randn(M, K)
    layer(x)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.requires_grad_(False)
    assert layer(x).grad_fn is None
    assert saved == [True, False, False]


@pytest.mark.parametrize("frozen", ["x", "parameters", "norm"])
def test_double_backward_with_inputs_that_require_no_gradient(frozen):
    results = []
    for layer in twins(activation="gelu", gate="scalar", gate_init=0.7):
        torch.manual_seed(3)
        x = torch.randn(M, K, requires_grad=frozen != "x")
        if frozen != "x":
            (layer if frozen == "parameters" else layer.norm).requires_grad_(False)
        inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
        first = torch.autograd.grad((layer(x).square()).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([*(g.detach() for g in first), *second])
    assert_same(*results)


def second_derivatives(call):
    """First and second derivatives by one leaf that reaches the layer on several ways."""
    torch.manual_seed(3)
    leaf = torch.randn(K, K, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    return first.detach(), second


@pytest.mark.parametrize(
    "tensors",
    [
        lambda t: {"x": t, "weight": t},
        lambda t: {"x": t, "weight": t.sin(), "residual": t},
        lambda t: {"x": t, "weight": t.T, "residual": (t @ t).tanh(), "bias": t[0]},
        lambda t: {
            "x": t,
            "weight": torch.eye(K).double(),
            "bias": t[0],
            "norm_weight": t[0],
            "gate": t[1],
        },
    ],
    ids=["tied weight", "x is the residual too", "residual computed from x", "one vector for all"],
)
def test_inputs_that_depend_on_each_other(tensors):
    """Double backward differentiates by each input as if it were a leaf of its own."""

    def call(backend):
        return lambda t: fused_residual(
            **tensors(t), order="resnet-v1", activation="silu", backend=backend
        )

    assert_same(second_derivatives(call("cpu")), second_derivatives(call("reference")))


def test_double_backward_on_meta():
    x = torch.randn(M, K, device="meta", requires_grad=True)
    (dx,) = torch.autograd.grad(FusedResidual(K, device="meta")(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].shape == x.shape


def test_double_backward_under_autocast():
    layer = FusedResidual(K, activation="silu")
    x = torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (dx,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.fixture
def cuda_autocast():
    """torch.autocast("cuda", torch.bfloat16), which without a GPU turns itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
@pytest.mark.parametrize("order", ["note", "postnorm"])
def test_dtype_of_the_composite_under_autocast(cuda_autocast, order):
    """Residual's: on CUDA autocast makes float32 of F.layer_norm. Fakes need no GPU."""
    with FakeTensorMode():
        layer = FusedResidual(K, order=order, backend="reference", device="cuda")
        x = torch.randn(M, K, device="cuda")
        assert layer(x).dtype == Residual(K, order=order, device="cuda")(x).dtype == torch.float32
        assert torch.func.vmap(layer)(x[None]).dtype == torch.float32


@pytest.mark.parametrize("batch_norm", [False, True])
def test_batched_cotangents(batch_norm):
    """torch.autograd.grad(is_grads_batched=True), as jacobian(vectorize=True) calls it."""
    results = []
    for layer in twins(
        norm="batch" if batch_norm else "layer", bias=not batch_norm, dtype=torch.float64
    ):
        torch.manual_seed(3)
        x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        dys = torch.eye(M * K, dtype=torch.float64).view(M * K, M, K)
        inputs = [x, *layer.parameters()]
        batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
        singly = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
        assert_same(batched, [torch.stack(g) for g in zip(*singly, strict=True)])
        results.append(batched)
    assert_same(*results)


def test_an_error_of_the_op_is_still_an_error(monkeypatch):
    """The detour for batched cotangents does not swallow others."""

    def broken(*args):
        raise RuntimeError("broken")

    y = FusedResidual(K)(torch.randn(M, K))
    monkeypatch.setitem(ops.BACKWARD, "cpu", broken)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        y.sum().backward()


def test_undefined_cotangent_and_stats(asked):
    """stats carry no gradient; without a cotangent of y there is no gradient and no launch."""
    x, w = torch.randn(M, K, requires_grad=True), torch.randn(K, K)
    none = (None,) * 8
    recipe = "linear-norm-add norm=batch batch_stats=1"
    y, stats, _ = FusedResidualFunction.apply(x, w, *none, 1, recipe, "cpu")
    assert y.requires_grad and not stats.requires_grad
    nothing = torch.autograd.grad(
        torch._C._functions.UndefinedGrad()(y), x, torch.ones(M, K), allow_unused=True
    )
    assert nothing == (None,) and asked == []


KEPT = ({}, {"order": "prenorm"}, {"order": "resnet-v1"}, {"norm": None}, {"order": "linear-add"})


@pytest.mark.parametrize("settings", KEPT)
@pytest.mark.parametrize("frozen", [(), ("linear.weight",), ("linear.weight", "linear.bias")])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_gradients_without_x(settings, frozen, autocast, own):
    """Where x or the residual is not kept, z or the cast of x leads the second gradient back."""
    results, tensors = [], [torch.randn(M, K) for _ in range(3)]
    for layer in twins(activation="gelu", **settings):
        for name, p in layer.named_parameters():
            p.requires_grad_(name not in frozen)
        x, r = (t.clone().requires_grad_() for t in tensors[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x, r) if own else layer(x)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad), *([r] if own else [])]
        (dx,) = torch.autograd.grad((y.float() * tensors[2]).sum(), x, create_graph=True)
        penalty = dx.float().square().sum() + y.float().square().sum()
        results.append([y, dx, *torch.autograd.grad(penalty, leaves)])
    for ours, eager in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        bound = 0.12 if autocast else 1e-4
        assert (ours - eager).abs().max() <= bound * eager.abs().max()


def kept_bytes(call, *alive):
    """Of storages that are not alive anyway."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    for t in alive:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("settings", KEPT)
@pytest.mark.parametrize("frozen", [(), ("linear.weight",)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_keeps_no_more_than_eager(settings, frozen, autocast, own):
    counts = []
    for layer in twins(activation="gelu", **settings):
        for name, p in layer.named_parameters():
            p.requires_grad_(name not in frozen)
        leaf, r = (torch.randn(M, K, requires_grad=True) for _ in range(2))
        inputs = (leaf * 1, r * 1) if own else (leaf * 1,)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            counts.append(kept_bytes(lambda: layer(*inputs), *layer.parameters()))  # noqa: B023
    assert counts[0] <= counts[1] + 10 + 2 * K  # stand-ins, the cast of the bias


def test_a_variance_that_overflows_is_nan(native):
    """As torch's is, and in that row alone."""
    x = torch.randn(4, 16)
    x[1] *= 1e20
    for order in ("norm-linear", "linear-norm-act", "prenorm", "postnorm"):
        layer = FusedResidual(16, order=order)
        layer.linear.weight.data.copy_(torch.eye(16))
        y = layer(x)
        assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all(), order
