"""The numbers of the Hopper kernel, on an emulated GPU (cuda_on_cpu): all of it but the
instructions of TMA and the tensor cores. Nothing here needs a GPU.
"""

import ctypes
import re
import shutil
from functools import cache

import pytest
import torch

import cuda_on_cpu
from cases import make_case
from cuda_on_cpu import HERE, ROOT
from cuda_on_cpu.layers import Call, Settings, same_bytes
from oracle import assert_as_accurate, eager, exact, without_kinks

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

F16, BF16 = torch.float16, torch.bfloat16


@cache
def hopper(root=ROOT) -> ctypes.CDLL:
    sources = (HERE / "launchers_sm90.cpp", root / "csrc" / "cuda" / "forward_sm90.cu")
    library = cuda_on_cpu.load("hopper", *sources, root=root)
    library.refusal.restype = library.forward.restype = ctypes.c_char_p
    return library


def settings(**given) -> Settings:
    """Programs wait for each other where a norm stands before `linear`, so all are resident."""
    processors = given.pop("processors", 2)
    columns = given.pop("columns", 256)
    return Settings(
        processors=processors, resident=processors, shared_limit=227 << 10, block=(128, columns),
        **given,
    )  # fmt: skip


def check(case, given=None, keep=True, library=None):
    """y by the rule of oracle.py; the statistics against those of what the norm saw."""
    case = without_kinks(case)
    with Call(case, given or settings(), keep=keep, library=library or hopper()) as call:
        assert call.refusal() is None
        y, z, stats = call.forward()
        results = ({"y": y.view(case.dy.shape)}, eager(case, ()), exact(case, ()))
        assert_as_accurate(*results, f"'{case.spec}', {case.x.dtype}, {given}")
        before = case.spec.prologue == ("norm",)
        if stats is not None and (before or case.spec.epilogue[0] == "norm"):
            t = (call.t["x"] if before else z).double()
            mean = t.mean(1) if case.spec.norm == "layer" else torch.zeros(len(t)).double()
            var = (t - mean[:, None]).square().mean(1)
            # fp32 sums of at most a few thousand terms, in a tree
            torch.testing.assert_close(stats[0].double(), mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                stats[1].double(), (var + case.spec.eps).rsqrt(), rtol=1e-4, atol=0
            )
        return y.clone()


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    "order, norm",
    [
        ("linear-act-add", None), ("note", "layer"), ("postnorm", "rms"), ("note", "batch"),
        ("prenorm", "layer"), ("prenorm", "rms"),
    ],
)  # fmt: skip
def test_orders(order, norm, dtype, columns):
    case = make_case(
        150, 200, 312, order=order, norm=norm, activation="gelu", dtype=dtype, training=False
    )
    check(case, settings(columns=columns))
