"""What only the C++ kernels promise: element functions within their bounds, and no leak."""

import ctypes
import sys

import pytest
import torch

from fusedres import ACTIVATIONS, FusedResidual
from fusedres.reference import ACTIVATION_FUNCTIONS

pytestmark = pytest.mark.usefixtures("native")


def activate(name: str, h: torch.Tensor) -> torch.Tensor:
    """The kernel's act(h), and nothing else: one feature, weight 1, no bias."""
    layer = FusedResidual(1, order="linear-act", activation=name, bias=False, backend="cpu")
    torch.nn.init.ones_(layer.linear.weight)
    with torch.no_grad():
        return layer(h[:, None])[:, 0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_within_a_few_roundings(name):
    """6 units in the last place of max(|act(h)|, |h| / 2), the scale on which eager rounds too."""
    h = torch.cat([torch.linspace(-30, 30, 60001), torch.linspace(-1e-3, 1e-3, 2001)])
    exact = ACTIVATION_FUNCTIONS[name](h.double())
    scale = torch.maximum(exact.abs(), h.double().abs() / 2).clamp_min(1e-30)
    error = ((activate(name, h).double() - exact).abs() / scale).max().item()
    assert error < 6 * torch.finfo(torch.float32).eps / 2


def test_normal_distribution_is_within_its_bound():
    """gelu(h) / h is the normal distribution function, to 3e-9 and roundings: csrc/epilogue.h."""
    h = torch.linspace(-12, 12, 100001)
    h = h[h != 0]
    cdf = activate("gelu", h).double() / h.double()
    assert (cdf - torch.special.ndtr(h.double())).abs().max().item() < 2e-7


def test_large_sin_is_right():
    h = torch.tensor([1e6, -3e7, 1e20, 3e38])
    torch.testing.assert_close(activate("sin", h).double(), h.double().sin(), rtol=0, atol=1e-6)


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc how much memory is in use")
@pytest.mark.parametrize("train", [False, True])
def test_calls_leak_nothing(train):
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("glibc before 2.33 has no mallinfo2")
    mallinfo.restype = Mallinfo
    layer = FusedResidual(4, norm="batch", dropout=0.5)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)

    def calls(count: int) -> None:
        for _ in range(count):
            with torch.set_grad_enabled(train):
                y = layer(x)
            if train:
                torch.autograd.grad(y, (x, *layer.parameters()), dy)

    def used() -> int:
        now = mallinfo()
        return now.uordblks + now.hblkhd

    calls(300)
    before = used()
    calls(2000)
    assert used() - before < 2000 * 8, "bytes a call"
