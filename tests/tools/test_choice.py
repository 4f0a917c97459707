"""explain's line "chosen": the true reason, whatever chose the backend; and what could not run."""

import pytest
import torch

from fusedres import FusedResidual, explain, register_activation
from fusedres.backends import choose, cuda, native
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import REGISTERED
from fusedres.tools import choice

HALF = torch.bfloat16
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
with_cuda = pytest.mark.skipif(not native.has_cuda, reason="built without CUDA kernels")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No layer has run, and nothing is set."""
    for name in ("FUSEDRES_BACKEND", "FUSEDRES_DISABLE", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def told(rows=9, width=12, device="cpu", dtype=torch.float32, **settings):
    layer = FusedResidual(width, device="meta", dtype=dtype, **settings)
    x = torch.empty(rows, width, device="meta", dtype=dtype)
    (call,) = explain(layer, x, device=device).calls
    assert f"\n  backend   {call.backend}\n  chosen    {call.why}\n" in str(call)
    assert call.backend not in call.why_not
    return call


def test_auto_on_a_cpu(native):
    call = told()
    assert (call.backend, call.why) == (native, "by auto, which takes it on a CPU")
    assert call.why_not["cuda"] == "device is cpu"
    assert call.why_not["triton"].startswith("device is cpu") or "Triton" in call.why_not["triton"]


def test_auto_where_nothing_can(monkeypatch):
    monkeypatch.setattr(native, "missing", "the C++ extension is not built (stub)")
    monkeypatch.setattr(native, "skipped", True)
    call = told()
    assert (call.backend, call.why) == ("reference", "by auto, since no kernel can run it")
    assert call.why_not["cpu"] == native.missing
    assert told(device="meta").why_not["cpu"] == "x is on meta"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_that_is_named(name, native):
    call = told(backend=name)
    assert (call.backend, call.why) == (name, f"by name: backend={name!r}")


def test_the_environment(monkeypatch, native):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    call = told()
    assert call.why == "by the environment: FUSEDRES_BACKEND=reference"
    assert call.backend == "reference" and "cpu" not in call.why_not
    assert told(backend="cpu").why == "by name: backend='cpu'"
    monkeypatch.setenv("FUSEDRES_DISABLE", "1")
    assert told(width=13).why == "by the environment: FUSEDRES_DISABLE=1"


def test_an_environment_that_came_late_is_not_blamed(monkeypatch, native):
    FusedResidual(12)(torch.randn(9, 12))
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    call = told()
    assert call.backend == "cpu"
    assert call.why == "when such a layer first ran, under another environment"


def test_an_environment_that_cannot_is_named(monkeypatch, native):
    monkeypatch.setenv("FUSEDRES_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="environment's FUSEDRES_BACKEND='cuda' cannot"):
        told()


@with_cuda
@no_gpu
@pytest.mark.parametrize("dtype, most", [(HALF, 4096), (torch.float32, 128)])
def test_auto_on_a_gpu_that_is_not_here(dtype, most):
    pytest.importorskip("triton")
    small = told(rows=64, width=1024, device="cuda", dtype=dtype)
    assert small.backend == "cuda"
    size = f"small up to {most} rows here, and x has 64"
    assert small.why == f"by auto, which takes cuda for small layers, then triton: {size}"
    large = told(rows=99999, width=1024, device="cuda", dtype=dtype)
    if dtype == HALF:
        assert large.backend == "triton" and "cuda for small layers" in large.why
        assert f"small up to {most} rows here, and x has 99999" in large.why
    else:
        assert large.backend == "vendor" and "true fp32" in large.why
    assert small.why_not == large.why_not == {"cpu": "x is on cuda"}  # the others could


@no_gpu
def test_what_a_gpu_that_is_not_here_would_refuse():
    pytest.importorskip("triton")
    batch = told(device="cuda", norm="batch")
    assert batch.backend == "triton" and "cuda" in batch.why_not
    double = told(device="cuda", dtype=torch.float64, backend="auto")
    assert double.backend == "reference" and "no kernel" in double.why
    assert {"cpu", "triton"} <= double.why_not.keys() and "float64" in double.why_not["triton"]
    wide = told(width=2**21, device="cuda")
    assert wide.backend == "reference" and "too many" in wide.why_not["triton"]
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run .*float64"):
        told(device="cuda", dtype=torch.float64, backend="triton")
    if native.has_cuda:
        with pytest.raises(NotImplementedError, match=r"backend='cuda' cannot run .*batch"):
            told(device="cuda", norm="batch", backend="cuda")


@no_gpu
@with_cuda
def test_a_width_of_which_no_layer_is_small():
    pytest.importorskip("triton")
    call = told(rows=16, width=8192, device="cuda", dtype=HALF)
    assert call.backend == "triton" and call.why.endswith("none this wide is small")
    named = told(rows=16, width=8192, device="cuda", dtype=HALF, backend="cuda")
    assert named.why == "by name: backend='cuda'"
    assert named.backend == cuda.WITH_TRITON, "its backward is Triton's"


def test_an_activation_of_one_s_own():
    register_activation("chosen_by_nobody", lambda h: h + h)
    try:
        call = told(activation="chosen_by_nobody")
        assert call.backend == "reference" and "no kernel" in call.why
        assert "built-in activations" in call.why_not["cpu"]
    finally:
        del ACTIVATION_FUNCTIONS["chosen_by_nobody"], REGISTERED["chosen_by_nobody"]


def test_the_layer_itself_may_choose():
    """A named backend that cannot is not asked: the call does not ask it, either."""
    layer, x = FusedResidual(12, backend="cuda"), torch.randn(9, 12)
    layer.linear.register_forward_hook(lambda *_: None)
    (call,) = explain(layer, x).calls
    assert (call.backend, call.why) == ("eager", "by the layer, which calls its submodules")
    assert layer(x).shape == (9, 12) and call.why_not == {}


def test_a_transform_chooses_torch_s_operations():
    seen, layer = [], FusedResidual(12)
    torch.func.vmap(lambda x: seen.extend(explain(layer, x).calls) or x)(torch.randn(2, 9, 12))
    assert seen[0].backend == "reference" and "function transform" in seen[0].why


def test_here_is_what_torch_can_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not choice.is_here(torch.device("cuda")) and choice.is_here(torch.device("meta"))
