"""A user's own activation: what is refused, how it runs, and its lowering against float64.

The numbers of the lowered functions come from Triton's interpreter, which a process must choose
before it imports Triton: `test_in_the_interpreter` runs this file again that way.
"""

import doctest
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres import FusedResidual, FusedResidualMLP, Residual, activations, explain, fused_residual
from fusedres.backends import choose, native, why_not
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import ACTIVATIONS, REGISTERED, Spec, make_spec

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
EPS = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")

slope, cap = 1.702, torch.tensor(2.5, dtype=torch.float64)


class StraightThrough(torch.autograd.Function):
    """A derivative that is not the value's."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sign()

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        return dy * (h.abs() < 1)


def in_place(h):
    y = h * 2
    y += 1
    return y.relu_()


USERS = {
    "own_mish": lambda h: h * torch.tanh(F.softplus(h)),
    "own_clamp": lambda h: h.clamp(-1, 1),
    "own_where": lambda h: torch.where(h > 0, h, 0.1 * h.expm1()),
    "own_snake": lambda h: h + torch.sin(h) ** 2,
    "own_squareplus": lambda h: (h + torch.sqrt(h * h + 4)) / 2,
    "own_gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "own_quick_gelu": lambda h: h * torch.sigmoid(slope * h),
    "own_logsigmoid": F.logsigmoid,
    "own_hardtanh": F.hardtanh,
    "own_elu": lambda h: F.elu(h, 1.5),
    "own_celu": lambda h: F.celu(h, 1.3),
    "own_cube": lambda h: h**3,
    "own_bump": lambda h: torch.exp(-h * h),
    "own_f_gelu": F.gelu,
    "own_f_gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "own_f_mish": F.mish,
    "own_f_silu": F.silu,
    "own_leaky": lambda h: torch.maximum(h, 0.1 * h),
    "own_softshrink": F.softshrink,
    "own_hardshrink": F.hardshrink,
    "own_threshold": lambda h: F.threshold(h, 0.1, 2.0),
    "own_hardswish": F.hardswish,
    "own_tanhshrink": F.tanhshrink,
    "own_logcosh": lambda h: torch.log(torch.cosh(h)),
    "own_asinh": torch.asinh,
    "own_root": lambda h: h.abs() ** 1.5 / (1 + h.abs()).sqrt(),
    "own_powers": lambda h: 2.0 ** (-h * h) + h**0 + (1 + h * h) ** -2,
    "own_mask": lambda h: (h > 0) * h + ((h < -1) | ~(h < 2)).to(h.dtype) * 0.3 * h,
    "own_booleans": lambda h: torch.where((h > 0) * (h < 2), h, h.masked_fill(h > 2, 1.0)),
    "own_captured": lambda h: torch.minimum(h, cap) * torch.ones_like(h).mul(0.3),
    "own_in_place": in_place,
    "own_straight_through": StraightThrough.apply,
    "own_module": nn.Softplus(beta=2.0),
    "own_logaddexp": lambda h: torch.logaddexp(h, torch.zeros_like(h)),
    "own_double": lambda h: h * 2,
}
RELATIVE = {  # what must keep its digits near 0
    "near_asinh": torch.asinh,
    "near_sinh": torch.sinh,
    "near_expm1": torch.expm1,
    "near_log1p": lambda h: torch.log1p(0.9 * h),
    "near_erf": torch.erf,
    "near_log": lambda h: torch.log(1 + h),
    "near_tanh": torch.tanh,
}


@pytest.fixture(autouse=True)
def _registrations_end_with_the_test():
    with mock.patch.dict(REGISTERED), mock.patch.dict(ACTIVATION_FUNCTIONS):
        yield


def register(name, function=None):
    fusedres.register_activation(name, function or USERS[name])
    return name


def value_and_derivative(function, h):
    """By torch, in h's dtype."""
    h = h.clone().requires_grad_()
    value = function(h)
    return value.detach(), torch.autograd.grad(value, h, torch.ones_like(value))[0]


if triton:

    @triton.jit
    def apply_kernel(
        h_ptr,
        value_ptr,
        grad_ptr,
        count,
        VALUE: tl.constexpr,
        GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """value = VALUE(h), grad = GRAD(h)"""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + i, i < count, 0.0)
        tl.store(value_ptr + i, VALUE(h), i < count)
        tl.store(grad_ptr + i, GRAD(h), i < count)


# What is refused.


def rolled(h):
    return h * torch.roll(h, 1, -1)


class FarAway(torch.autograd.Function):
    """Pointwise, but its derivative is not."""

    @staticmethod
    def forward(ctx, h):
        return h * 1.0

    @staticmethod
    def backward(ctx, dy):
        return dy.flip(0)


def stateful(h, calls=[0]):  # noqa: B006
    calls[0] += 1
    return h * calls[0]


vector = torch.rand(5)

REFUSED = {
    "reduction": (lambda h: h - h.mean(), "aten.mean.default is not pointwise"),
    "softmax": (lambda h: torch.softmax(h, -1), "softmax.default is not pointwise"),
    "cumulative": (lambda h: h.cumsum(0), "aten.cumsum.default is not pointwise"),
    "shift": (rolled, "aten.roll.default is not pointwise"),
    "neighbour": (lambda h: h + h.flip(-1), "aten.flip.default is not pointwise"),
    "derivative": (FarAway.apply, "aten.flip.default is not pointwise"),
    "norm": (lambda h: F.layer_norm(h, h.shape[-1:]), "is not pointwise"),
    "shape": (lambda h: h.sum(-1), "returns shape (3,) for shape (3, 5)"),
    "transposed": (lambda h: h.t(), "returns shape (5, 3) for shape (3, 5)"),
    "size": (lambda h: h * h.shape[-1], "depends on other elements or on the shape"),
    "count": (lambda h: h / h.numel(), "depends on other elements or on the shape"),
    "random": (lambda h: h + torch.rand_like(h), "is random: aten.rand_like"),
    "dropout": (lambda h: F.dropout(h, 0.5), "is random: aten."),
    "python_random": (lambda h: h * random.random(), "is random: two calls differ"),
    "state": (stateful, "two calls differ"),
    "vector": (lambda h: h * vector, "captures a Tensor of shape (5,)"),
    "module": (nn.PReLU(), "captures a Parameter of shape (1,)"),
    "parameter": (
        lambda h, p=nn.Parameter(torch.ones(())): h * p,  # noqa: B008
        "captures a Parameter of shape ()",
    ),
    "constant": (lambda h: torch.ones_like(h), "is not differentiable"),
    "detached": (lambda h: h.detach().exp(), "is not differentiable"),
    "comparison": (lambda h: h > 0, "returns torch.bool for torch.float32"),
    "integer": (lambda h: h.int(), "returns torch.int32 for torch.float32"),
    "complex": (lambda h: h * 1j, "returns torch.complex64 for torch.float32"),
    "wider": (lambda h: h.double(), "returns torch.float64 for torch.float32"),
    "fixed_type": (lambda h: h.float(), "returns torch.float32 for torch.float64"),
    "pair": (lambda h: (h, h), "returns tuple, expected a tensor"),
    "number": (lambda h: 3.0, "returns float, expected a tensor"),
    "in_place": (lambda h: h.relu_(), "it writes into h"),
    "branch": (lambda h: h if h.sum() > 0 else -h, "it reads a number out of h"),
    "item": (lambda h: h * h.max().item(), "it reads a number out of h"),
    "of_numpy": (lambda h: torch.from_numpy(np.tanh(h.numpy())), "it calls numpy"),
    "one_shape": (lambda h: h * torch.ones(7), "a tensor of one shape meets h"),
    "broken": (lambda h: h.no_such_method(), "no_such_method"),
    "two_arguments": (lambda h, k: h, "missing 1 required positional argument"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    function, says = REFUSED[kind]
    with pytest.raises(ValueError, match=f"activation 'refused_{kind}' is refused") as error:
        fusedres.register_activation(f"refused_{kind}", function)
    assert says in str(error.value)
    with pytest.raises(ValueError, match="unknown activation"):
        FusedResidual(4, activation=f"refused_{kind}")


@pytest.mark.parametrize("name", ["two words", "a-b", "a=b", "", "3d", "größe", "lambda", "None"])
def test_names_that_are_no_identifiers(name):
    with pytest.raises(ValueError, match="must be an identifier"):
        fusedres.register_activation(name, torch.sin)


def test_wrong_types():
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        fusedres.register_activation(3, torch.sin)
    with pytest.raises(TypeError, match="'wave' must be a function of a tensor, got str"):
        fusedres.register_activation("wave", "sin")


def test_taken_names():
    for name in ACTIVATIONS:
        with pytest.raises(ValueError, match="built in already"):
            fusedres.register_activation(name, ACTIVATION_FUNCTIONS[name])
    wave = USERS["own_snake"]
    for _ in range(2):
        register("wave", wave)
    with pytest.raises(ValueError, match="registered with another function already"):
        register("wave", torch.sin)
    assert ACTIVATION_FUNCTIONS["wave"] is wave


def test_an_unknown_name_is_told_the_registered_ones():
    register("own_cube")
    with pytest.raises(ValueError, match=r"unknown activation 'cube'; .*known: relu, .*, own_cube"):
        FusedResidual(4, activation="cube")
    with pytest.raises(ValueError, match="unknown norm 'own_cube'"):
        FusedResidual(4, norm="own_cube")


# How it runs.


@pytest.mark.parametrize("order", ["note", "preact", "resnet-v1"])
@pytest.mark.parametrize("name", ["own_snake", "own_where", "own_in_place", "own_straight_through"])
def test_value_and_gradients_are_those_of_torch(name, order):
    settings = {"activation": register(name), "order": order, "dtype": torch.float64}
    layer, plain = FusedResidual(6, **settings), Residual(6, **settings)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, 9, 6, dtype=torch.float64)
    results = []
    for module in (layer, plain):
        t = x.clone().requires_grad_()
        y = module(t)
        results.append((y, *torch.autograd.grad(y, [t, *module.parameters()], dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    by_hand = F.layer_norm(F.linear(x, layer.linear.weight, layer.linear.bias), (6,))
    if order == "note":
        torch.testing.assert_close(layer(x), USERS[name](by_hand) + x)


def test_gradcheck_and_double_backward():
    layer = FusedResidual(4, activation=register("own_snake"), dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert layer.linear.weight.grad.abs().sum() > 0


def test_function_mlp_and_from_layers_take_the_name():
    name, x = register("own_squareplus"), torch.randn(5, 8)
    weight = torch.randn(8, 8)
    expected = USERS[name](F.linear(x, weight)) + x
    torch.testing.assert_close(fused_residual(x, weight, norm=None, activation=name), expected)
    assert FusedResidualMLP(8, 12, activation=name)(x).shape == (5, 8)
    layer = FusedResidual.from_layers(nn.Linear(8, 8), activation=name)
    assert layer.spec.activation == name
    assert Spec.parse(str(layer.spec)) == layer.spec


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles(backend):
    layer = FusedResidual(8, activation=register("own_where"), backend=backend)
    fast, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(5, 8)
    results = []
    for module in (layer, fast):
        t = x.clone().requires_grad_()
        y = module(t)
        results.append((y, *torch.autograd.grad(y.square().sum(), [t, *layer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_function_compiles_and_later_names_leave_the_graph_alone():
    name, x, weight = register("own_quick_gelu"), torch.randn(5, 8), torch.randn(8, 8)
    fast = torch.compile(fused_residual, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for later in ("own_cube", "own_bump"):
        for activation in (name, "gelu"):
            ours = fast(x, weight, activation=activation, backend="reference")
            theirs = fused_residual(x, weight, activation=activation, backend="reference")
            torch.testing.assert_close(ours, theirs)
        register(later)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_cpu_says_that_it_knows_built_in_activations_only():
    name = register("own_bump")
    spec, reason = make_spec(activation=name), "only the built-in activations, not 'own_bump'"
    assert reason in why_not("cpu", spec, torch.float32, CPU, 8, 8)
    assert choose("auto", str(spec), torch.float32, CPU, 8, 8) == "reference"
    layer, x = FusedResidual(8, activation=name), torch.randn(3, 8)
    told = explain(layer, x)
    assert told.backend == "reference" and reason in told.calls[0].why_not["cpu"]
    assert reason in str(told) and "own_bump" in told.calls[0].formula
    with pytest.raises(NotImplementedError, match=reason):
        FusedResidual(8, activation=name, backend="cpu")(x)
    unused = make_spec("bert-output", activation=name)  # an order without an activation
    assert why_not("cpu", unused, torch.float32, CPU, 8, 8) == native.missing


def test_registering_draws_no_random_numbers_and_works_without_grad():
    state = torch.get_rng_state()
    with pytest.raises(ValueError):
        register("own_noise", lambda h: h + torch.rand_like(h))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        register("own_cube")
    with torch.inference_mode():
        register("own_bump")


def test_the_example():
    found = doctest.DocTestFinder().find(activations.register_activation, "example")
    assert doctest.DocTestRunner().run(found[0]) == (0, 4)


def test_importing_stays_cheap_and_registering_needs_no_kernels():
    program = """
import sys, fusedres
assert not {"triton", "torch._dynamo", "torch._inductor"} & set(sys.modules)
fusedres.register_activation("wave", lambda h: h.sin())
assert fusedres.activations.why_not_triton("wave") is None
assert "fusedres.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


# The lowering.

UNKNOWN = {
    "digamma": (torch.digamma, "aten.digamma.default"),
    "atan": (torch.atan, "aten.atan.default"),
    "odd_power": (lambda h: h.abs() ** 1.7, "aten.pow with exponent 1.7"),
    "high_power": (lambda h: h**30, "aten.pow with exponent 30"),
    "exponential": (lambda h: 1.5**h, "aten.pow is lowered for h ** number and 2 ** h only"),
    "in_float64": (lambda h: h.double().exp().to(h.dtype), "aten._to_copy to torch.float64"),
    "tiny_constant": (lambda h: (h * h + 1e-40).sqrt(), "constant 1e-40"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_has_no_triton_form_is_registered_and_named(kind):
    function, says = UNKNOWN[kind]
    name = register(f"unknown_{kind}", function)
    assert says in activations.why_not_triton(name) and name in activations.why_not_triton(name)
    with pytest.raises(NotImplementedError) as error:
        activations.triton_functions(name)
    assert says in str(error.value)
    x = torch.rand(3, 4)
    torch.testing.assert_close(
        fused_residual(x, torch.eye(4), norm=None, activation=name), function(x) + x
    )


def test_explain_names_what_has_no_triton_form():
    pytest.importorskip("triton")
    settings = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(64, 512, **settings)
    layer = FusedResidual(512, activation=register("own_digamma", torch.digamma), **settings)
    told = explain(layer, x, device="cuda")
    assert told.backend == "reference"
    assert "own_digamma" in told.calls[0].why_not["triton"] and "aten.digamma" in str(told)


def test_the_source_can_be_read():
    name = register("source_of_wave", lambda h: torch.where(h > 0, h, 0.1 * h.exp()))
    value, grad = (text.strip() for text in REGISTERED[name].source.split("\n\n\n"))
    assert value.splitlines() == [
        "@triton.jit",
        "def source_of_wave_value(h):",
        "    v0 = h > 0.0",
        "    v1 = tl.exp(h)",
        "    v2 = v1 * 0.1",
        "    v3 = tl.where(v0, h, v2)",
        "    return v3",
    ]
    assert grad.startswith("@triton.jit\ndef source_of_wave_grad(h):")


@pytest.mark.parametrize("constant", [1 / 3, 0.1, -1e-30, math.pi * 1e30])
def test_constants_keep_every_digit(constant):
    name = register(
        f"constant_{str(constant).translate({45: 95, 46: 95, 43: 95})}", lambda h: h * constant
    )
    assert repr(constant) in REGISTERED[name].source


def test_functions_are_made_once():
    pytest.importorskip("triton")
    name = register("own_quick_gelu")
    assert activations.why_not_triton(name) is None
    assert activations.triton_functions(name) is activations.triton_functions(name)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_every_pair_compiles_for_a_gpu_in_fp32():
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("h_ptr", "value_ptr", "grad_ptr")
    for name in USERS:
        value, grad = activations.triton_functions(register(name))
        constants = {"VALUE": value, "GRAD": grad, "BLOCK": 128}
        signature = dict.fromkeys(names, "*fp32") | {"count": "i32"}
        code = ASTSource(
            fn=apply_kernel,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs={(4 + i,): constant for i, constant in enumerate(constants.values())},
        )
        binary = triton.compile(code, target=GPUTarget("cuda", 90, 32))
        assert binary.asm["cubin"] and "f64" not in binary.asm["ttir"], name


def apply(name, h):
    """Value and derivative of the lowered functions."""
    h = h.to(DEVICE)
    value, grad = torch.empty_like(h), torch.empty_like(h)
    functions = activations.triton_functions(name)
    apply_kernel[(triton.cdiv(h.numel(), 1024),)](h, value, grad, h.numel(), *functions, 1024)
    return value.cpu(), grad.cpu()


numbers = pytest.mark.skipif(False, reason="") if INTERPRET else pytest.mark.gpu


@numbers
@pytest.mark.parametrize("name", USERS)
def test_lowered_functions_are_as_accurate_as_torch(name):
    h = torch.cat(
        [torch.linspace(-12, 12, 20011), *(s * torch.logspace(-6, 1, 999) for s in (1, -1))]
    )
    plain = value_and_derivative(USERS[name], h)
    true = value_and_derivative(USERS[name], h.double())
    for ours, p, t in zip(apply(register(name), h), plain, true, strict=True):
        unit = t.abs().clamp(min=1.0)
        error, allowed = ((v.double() - t).abs() / unit for v in (ours, p))
        worst = error.argmax()
        told = f"{error[worst]:.3g} at {h[worst]}, torch {allowed.max():.3g}"
        assert error.max() <= 2 * allowed.max() + 2 * EPS, told


@numbers
@pytest.mark.parametrize("name", RELATIVE)
def test_lowered_functions_keep_their_digits_near_zero(name):
    h = torch.logspace(-30, 1, 4001)
    h = torch.cat([h, -h[h < 1]])
    plain, true = (value_and_derivative(RELATIVE[name], t)[0] for t in (h, h.double()))
    kept = true.abs() > 1e-37
    ours = apply(register(name, RELATIVE[name]), h)[0]
    error, allowed = (((v.double() - true) / true)[kept].abs() for v in (ours, plain))
    assert error.max() <= 2 * allowed.max() + 2 * EPS


@numbers
@pytest.mark.parametrize("name", USERS)
def test_lowered_functions_at_infinities_and_nan(name):
    edges = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e12])
    true_value, true_grad = value_and_derivative(USERS[name], edges.double())
    value, grad = apply(register(name), edges)
    close = partial(torch.testing.assert_close, rtol=4 * EPS, atol=EPS, equal_nan=True)
    close(value, true_value.float())
    close(grad[1:], true_grad[1:].float())  # at NaN torch's own dtypes disagree, for hardtanh say


@numbers
@pytest.mark.parametrize("name", ["own_snake", "own_leaky"])
def test_lowered_functions_run_in_a_layer(name):
    layer = FusedResidual(40, activation=register(name), backend="triton", device=DEVICE)
    plain = FusedResidual(40, activation=name, backend="reference", device=DEVICE)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, 33, 40, device=DEVICE)
    results = []
    for module in (layer, plain):
        t = x.clone().requires_grad_()
        y = module(t)
        results.append((y, *torch.autograd.grad(y, [t, *module.parameters()], dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "lowered"]
    command += ["-W", "ignore::RuntimeWarning", __file__]  # NumPy warns of inf and NaN
    run = subprocess.run(command, env=os.environ | interpreter, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    passed = 2 * len(USERS) + len(RELATIVE) + 2
    assert f"{passed} passed" in run.stdout and "skipped" not in run.stdout, run.stdout
