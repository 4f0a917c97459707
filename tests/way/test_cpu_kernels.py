"""The CPU kernels: tiles, panels and parts of every size, on each instruction set; any number of
threads.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fusedres import FusedResidual, Residual, fused_residual
from fusedres.backends import native as cpp
from oracle import assert_as_accurate

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.usefixtures("native")

SETS = ("amx-bf16", "avx512-bf16", "avx512", "avx2", "baseline")
# Around a tile's 6 or 16 rows and 16 to 64 columns, a block's 96 rows, 96 units of the inner sum.
SIZES = (
    (1, 1, 1),
    (5, 2, 17),
    (16, 95, 63),
    (97, 96, 64),
    (98, 97, 65),
    (193, 129, 95),
    (96, 250, 80),
    (700, 33, 34),
)


def errors(M, K, N, dtype):
    """Of y and the gradients of x, weight and bias, as parts of what rounding may do at most."""
    draw = torch.Generator().manual_seed(M + K + N)
    layer = FusedResidual(K, N, order="linear", backend="cpu", dtype=dtype)
    x = torch.randn(M, K, generator=draw).to(dtype).requires_grad_()
    dy = torch.randn(M, N, generator=draw).to(dtype)
    weight, bias = layer.linear.weight, layer.linear.bias
    y = layer(x)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    true = F.linear(*wide)
    exact = torch.autograd.grad(true, wide, dy.double())
    with torch.no_grad():
        a = [t.abs() for t in wide]
        sizes = [F.linear(*a), dy.double().abs() @ a[1], dy.double().abs().T @ a[0]]
        sizes.append(dy.double().abs().sum(0))
    step = torch.finfo(dtype).eps + 16 * torch.finfo(F32).eps  # the last rounding, and the sums'
    found = zip((y, *grads), (true, *exact), sizes, strict=True)
    return [((ours.double() - e).abs() / (size * step)).max().item() for ours, e, size in found]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_products(M, K, N, dtype):
    assert max(errors(M, K, N, dtype)) < 1


@pytest.mark.parametrize("name", SETS)
def test_products_on_every_instruction_set(name):
    """In a process of its own: the choice is made once. What is not here says so."""
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "test_products and not instruction",
        __file__,
    ]
    environment = os.environ | {"FUSEDRES_CPU": name}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    if f"FUSEDRES_CPU is '{name}', this CPU has" in done.stdout + done.stderr:
        pytest.skip(f"this CPU has no {name}")
    assert not done.returncode, done.stdout[-2000:]


def test_an_unknown_instruction_set_is_named():
    code = "import torch, fusedres; fusedres.FusedResidual(8, backend='cpu')(torch.randn(4, 8))"
    environment = os.environ | {"FUSEDRES_CPU": "sse9"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FUSEDRES_CPU is 'sse9', this CPU has" in done.stderr and "baseline" in done.stderr


@pytest.mark.parametrize("M", [31, 97, 1000])
@pytest.mark.parametrize("mean", [0.0, 2000.0])
def test_batch_norm_over_many_blocks(M, mean):
    """Mean and variance are merged from blocks and chunks of rows: as exact as torch's."""
    draw = torch.Generator().manual_seed(0)
    layer = FusedResidual(40, order="norm-linear", norm="batch", momentum=1.0, backend="cpu")
    x = torch.randn(M, 40, generator=draw) + mean + torch.arange(M)[:, None] / M
    layer(x)
    var, exact = layer.norm.running_var.double(), x.double().var(0)
    assert ((var - exact).abs() / exact).max() < 1e-6
    assert (layer.norm.running_mean.double() - x.double().mean(0)).abs().max() < 2e-7 * (1 + mean)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("M, K, N", [(333, 96, 96), (2100, 64, 200)])
def test_any_number_of_threads_gives_the_same_bits(M, K, N, norm):
    """And column sums over chunks, and parts of dweight, are right."""
    layer = FusedResidual(
        K, N, order="linear-norm-act", norm=norm, activation="gelu", backend="cpu"
    )
    x, dy = torch.randn(M, K), torch.randn(M, N)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = layer(x)
            found.append([y, *torch.autograd.grad(y, list(layer.parameters()), dy)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    plain = FusedResidual(K, N, order="linear-norm-act", norm=norm, activation="gelu").double()
    plain.load_state_dict(layer.state_dict())
    exact = torch.autograd.grad(plain(x.double()), list(plain.parameters()), dy.double())
    for ours, e in zip(found[0][1:], exact, strict=True):
        assert (ours.double() - e).abs().max() < 1e-4 * (1 + e.abs().max())


def test_the_plan_says_who_multiplies():
    def product(*call):
        return cpp.extension.plan(*call)["product"]

    assert product(256, 256, 256, "float32") == product(1, 512, 512, "float16") == "own"
    assert product(4, 512, 512, "float32") in ("ATen", "oneDNN")  # packing is not worth it
    assert product(2, 64, 64, "float32") == product(15, 8, 8, "float32") == "ATen"  # more exact
    assert product(256, 8192, 8192, "bfloat16") in ("ATen", "library, in fp32")
    assert product(256, 8192, 8192, "float16") == "library, in fp32"
    assert product(256, 64, 64, "float64") == product(2, 512, 512, "bfloat16") == "ATen"


@pytest.mark.parametrize("M, K, N", [(1, 64, 64), (2, 64, 64), (4, 128, 32), (8, 256, 16)])
def test_few_rows_are_as_exact_as_eager(M, K, N):
    """Of so few torch adds products in several sums, which a tile of ours would not."""
    settings = {"order": "linear-norm-add", "activation": None, "norm": "layer"}
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        layer, eager = FusedResidual(K, N, **settings, backend="cpu"), Residual(K, N, **settings)
        eager.load_state_dict(layer.state_dict())
        x = torch.randn(M, K)
        with torch.no_grad():
            found, exact = (layer(x), eager(x)), eager.double()(x.double())
        squares += torch.stack([(y - exact).square().mean() for y in found])
    assert squares[0].sqrt() < 1.1 * squares[1].sqrt()


@pytest.mark.parametrize("M", [3, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_too_large_for_blocks(dtype, M):
    """It is the library's, for 16-bit types without instructions of their own in fp32, converted a
    few columns at a time.
    """
    K, N = 2112, 2048
    assert cpp.extension.plan(M, N, K, str(dtype).removeprefix("torch."))["product"] != "own"
    torch.manual_seed(5)
    x, weight, dy = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.randn(M, N)
    bias = torch.randn(N)

    def step(to, f):
        leaves = [t.to(dtype).to(to).requires_grad_() for t in (x, weight, bias)]
        y = f(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(dtype).to(to))
        return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), grads, strict=True))}

    def plain(x, weight, bias):
        return torch.relu(F.layer_norm(F.linear(x, weight, bias), (N,)))

    def ours(x, weight, bias):
        order = "linear-norm-act"
        return fused_residual(x, weight, bias, order=order, activation="relu", backend="cpu")

    assert_as_accurate(step(dtype, ours), step(dtype, plain), step(torch.float64, plain), dtype)


def test_inference_writes_y_over_the_librarys_product():
    x, weight = torch.randn(3, 2112), torch.randn(2048, 2112)
    given = x.clone()
    y = fused_residual(x, weight, order="linear-act", activation="relu", backend="cpu")
    torch.testing.assert_close(y, torch.relu(F.linear(x, weight)), rtol=1e-4, atol=1e-3)
    assert torch.equal(x, given)
