"""The Triton kernel of gated linear units against plain torch, and compiled without a GPU."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton")

from fusedres.backends import glu as backend
from fusedres.glu import composite_glu
from fusedres.spec import ACTIVATIONS
from oracle import assert_as_accurate
from triton_run import BF16, DEVICE, DTYPES, F32, INTERPRET, MARKS
from triton_run import _clean as _clean

SHAPES = ((5, 7), (33, 64), (3, 1025), (1, 1), (70, 18))


def plain(dtype, activation, z, dh, second):
    z = z.to(dtype).requires_grad_()
    h = composite_glu(activation, second, z)
    return {"h": h.detach(), "dz": torch.autograd.grad(h, z, dh.to(dtype))[0]}


def by_kernel(dtype, activation, z, dh, second):
    a, b = z.to(dtype).chunk(2, dim=1)  # rows of both are further apart than they are long
    a, b = (b, a) if second else (a, b)
    h = backend.glu_forward(a, b, activation)
    return {"h": h, "dz": backend.glu_backward(dh.to(dtype), a, b, activation, second)}


@pytest.mark.usefixtures("_clean")
class TestAccuracy:
    pytestmark = MARKS

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation(self, activation, dtype):
        torch.manual_seed(0)
        M, H = SHAPES[ACTIVATIONS.index(activation) % 2]
        call = (activation, torch.randn(M, 2 * H).to(dtype), torch.randn(M, H).to(dtype), False)
        call = (call[0], *(t.to(DEVICE) for t in call[1:3]), call[3])
        ours, torch_s = by_kernel(dtype, *call), plain(dtype, *call)
        assert_as_accurate(ours, torch_s, plain(torch.float64, *call))

    @pytest.mark.parametrize("second", [False, True])
    @pytest.mark.parametrize("M, H", SHAPES)
    def test_shapes_and_either_half(self, M, H, second):
        torch.manual_seed(1)
        z, dh = torch.randn(M, 2 * H, device=DEVICE), torch.randn(H, M, device=DEVICE).t()
        call = ("silu", z, dh, second)
        assert_as_accurate(by_kernel(F32, *call), plain(F32, *call), plain(torch.float64, *call))

    def test_nothing(self):
        a = torch.empty(0, 5, device=DEVICE)
        assert backend.glu_forward(a, a, "relu").shape == (0, 5)
        assert backend.glu_backward(a, a, a, "relu", False).shape == (0, 10)

    def test_ops(self):
        a, b = torch.randn(2, 3, 8, device=DEVICE)
        ops = torch.ops.fusedres
        torch.library.opcheck(ops.triton_glu_forward.default, (a, b, "silu"))
        torch.library.opcheck(ops.triton_glu_backward.default, (a, a, b, "silu", True))


def _compile(sm, dtype, H, stride, activation, backward):
    from bench.compiled.aot import compiled

    def launch():
        a, b, dh = (torch.empty_strided((4096, H), (stride, 1), dtype=dtype, device="meta")
                    for _ in range(3))  # fmt: skip
        if backward:
            backend.glu_backward(dh, a, b, activation, False)
        else:
            backend.glu_forward(a, b, activation)

    return compiled(sm, launch)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET or os.environ.get("TRITON_INTERPRET") == "1",
                    reason="the interpreter compiles nothing")  # fmt: skip
def test_compiled_without_spills_by_wide_moves():
    jobs = [
        (sm, dtype, H, stride, activation, backward)
        for sm in (80, 90)
        for dtype in (BF16, F32)
        for H, stride in ((1024, 2048), (1004, 2008), (339, 678))
        for activation, backward in (("silu", False), ("gelu", True))
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job, (found,) in zip(jobs, pool.map(_compile, *zip(*jobs, strict=True)), strict=True):
            at_once = min(16, job[1].itemsize * next(n for n in (16, 4, 1) if job[2] % n == 0))
            assert found["stack"] == 0, (job, found)
            assert found["offsets"] == ["i64"], (job, found)
            assert max(found["stores"]) >= 8 * at_once, (job, found)
