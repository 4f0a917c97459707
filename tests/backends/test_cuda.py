"""The CUDA backend as seen from Python on a machine without a GPU: what it refuses, plans, says."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres import ACTIVATIONS, ORDERS, FusedResidual, backends, fused_residual, ops
from fusedres.backends import native
from fusedres.dtypes import typed
from fusedres.spec import Spec, make_spec

pytestmark = pytest.mark.skipif(not native.has_cuda, reason="built without CUDA kernels")

CPU = torch.device("cpu")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
HOPPER = (132, 227 << 10, 9)  # multiprocessors, shared memory of a block, major capability
AMPERE, ADA = (108, 163 << 10, 8), (76, 99 << 10, 8)


def refusal(N=64, K=64, dtype="bfloat16", shared=227 << 10, gradients=True, **settings):
    return native.extension.cuda_why_not(str(make_spec(**settings)), dtype, N, K, shared, gradients)


def plan(M, N, K, device, dtype="bfloat16", **settings):
    return native.extension.cuda_plan(str(make_spec(**settings)), dtype, M, N, K, *device)


def test_without_a_gpu_the_error_says_so():
    x, weight = torch.zeros(3, 8), torch.zeros(8, 8)
    with pytest.raises(NotImplementedError, match=r"backend='cuda' cannot run .* device is cpu"):
        fused_residual(x, weight, norm=None, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"'fusedres::cuda_residual_forward'.*CPU"):
        ops.FORWARD["cuda"](x, weight, *[None] * 8, 1, "linear-add", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_layer_on_a_gpu_that_is_not_here():
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        FusedResidual(8, backend="cuda").to("cuda")


def test_what_the_kernels_take():
    for order in ORDERS:
        for norm in (None, "layer", "rms"):
            for activation in (None, *ACTIVATIONS):
                extra = {"gate": "channel", "dropout": 0.1, "drop_path": 0.1}
                settings = {"order": order, "norm": norm, "activation": activation, **extra}
                for dtype in ("float32", "float16", "bfloat16"):
                    assert refusal(1024, 1024, dtype, **settings) is None
    assert refusal(norm="batch", training=False) is None
    assert "running statistics only" in refusal(norm="batch", training=True)
    assert "float64" in refusal(dtype="float64")
    assert "2^20" in refusal(N=(1 << 20) + 1)


def calls_of_several_dtypes():
    """(recipe, product) of every call that torch's product takes, with and without autocast."""
    dtypes = (F32, F16, BF16, F64)
    for order in ("note", "prenorm", "linear-add-act", "act-add-linear"):
        plain = str(make_spec(order=order, activation="gelu"))
        for given in itertools.product(dtypes, dtypes, (None, *dtypes), (None, F16, BF16)):
            try:
                yield typed(plain, *given, "cuda")
            except TypeError:
                continue


def test_which_dtypes_may_meet():
    """float32 for x, residual and y beside a product of 16 bits, and nothing else; on the sm_80
    kernels, whatever the GPU.
    """
    taken = set()
    for recipe, product in set(calls_of_several_dtypes()):
        spec, dtype = Spec.parse(recipe), str(product).removeprefix("torch.")
        shared = HOPPER[1]
        reason = native.extension.cuda_why_not(recipe, dtype, 1024, 1024, shared, True)
        known = dtype != "float64" and set(spec.dtypes) <= {"float32"}
        assert (reason is None) == known, f"{recipe}, {dtype}: {reason}"
        assert known or "or float32" in reason or "float64" in reason
        if known and spec.dtypes:
            found = native.extension.cuda_plan(recipe, dtype, 65536, 1024, 1024, *HOPPER)
            assert found["kernel"] == "residual_forward_sm80_kernel"
            taken.add((dtype, spec.x_dtype, spec.residual_dtype, spec.y_dtype))
        if "float64" in spec.dtypes:
            assert "float64" in backends.why_not("cuda", spec, product, CPU, 8, 8)
    both = (None, "float32")
    halves = ("float16", "bfloat16")
    combinations = set(itertools.product(halves, both, both, both))
    assert taken == combinations - {(dtype, None, None, None) for dtype in halves}


def test_dtypes_that_may_not_meet_go_to_triton(fake_gpu):
    """An error for who asked for "cuda", no wrong numbers."""
    single = dict.fromkeys(("x_dtype", "residual_dtype", "y_dtype"), "float32")
    recipe = str(replace(make_spec(activation="gelu"), **single))
    for backend in ("cuda", "auto"):
        assert backends.choose(backend, recipe, BF16, fake_gpu, 64, 64, True) == "cuda"
    recipe = str(replace(make_spec(activation="gelu"), residual_dtype="float16"))
    assert backends.choose("auto", recipe, BF16, fake_gpu, 64, 64, True) == "triton"
    with pytest.raises(NotImplementedError, match=r"residual_dtype=float16.* or float32; backend="):
        backends.choose("cuda", recipe, BF16, fake_gpu, 64, 64)


def test_rows_too_wide_for_shared_memory():
    """Forward runs at any width, backward as far as z's rows fit; less on smaller GPUs."""
    for shared, fits in ((227 << 10, 4096), (99 << 10, 1024)):
        assert refusal(fits, 64, shared=shared) is None
        assert "rows of z" in refusal(1 << 16, 64, shared=shared)
        assert refusal(1 << 16, 64, shared=shared, gradients=False) is None
        assert "rows of x" in refusal(64, 1 << 16, shared=shared, order="preact")


def test_the_plan_fills_the_device_and_fits_it():
    for device in (HOPPER, AMPERE, ADA):
        for M in (1, 17, 256, 4096, 65536):
            for n in (1, 64, 339, 1024):
                found = plan(M, n, n, device)
                rows, columns = found["BLOCK_M"], found["BLOCK_N"]
                assert found["shared"] <= device[1]
                if found["kernel"] == "residual_forward_sm80_kernel":
                    assert found["programs"] == -(-M // rows) * -(-n // columns)
                else:
                    assert found["programs"] <= device[0]


def test_hopper_takes_wide_layers_of_many_rows():
    if native.extension.build_info()["hopper"] != "built":
        pytest.skip("built without CUTLASS")

    def on_hopper(M=65536, N=1024, K=1024, device=HOPPER, **settings):
        return "sm90" in plan(M, N, K, device, **settings)["kernel"]

    assert on_hopper() and on_hopper(dtype="float16") and on_hopper(order="prenorm")
    assert not on_hopper(M=256) and not on_hopper(N=128) and not on_hopper(dtype="float32")
    assert not on_hopper(device=AMPERE) and not on_hopper(order="preact")
    assert not on_hopper(K=339)  # rows that TMA cannot take
    assert not on_hopper(N=40000)  # rows of more tiles than multiprocessors


def test_registered_activations_are_not_for_these_kernels():
    import fusedres

    fusedres.register_activation("cubed_for_cuda", lambda h: h * h * h)
    spec = make_spec(activation="cubed_for_cuda")
    assert "built-in activations" in backends.why_not("cuda", spec, F32, torch.device("cuda"), 8, 8)


def test_both_backends_of_gpus_save_the_same():
    """Wide layers go forward in C++ and back in Triton."""
    text = [str(ops.FORWARD[name]._schema).partition("(")[2] for name in ("cuda", "cpu")]
    assert text[0] == text[1]
    spec = str(make_spec(activation="gelu"))
    x, weight = torch.empty(5, 8, device="meta"), torch.empty(7, 8, device="meta")
    y, z, stats = ops.FORWARD["cuda"](x, weight, *[None] * 8, 1, spec, True)
    assert (y.shape, z.shape, stats.shape) == ((5, 7), (5, 7), (10,))
    assert stats.dtype == F32


@pytest.mark.parametrize("order", ["note", "prenorm"])
def test_dtypes_of_what_is_saved_and_of_gradients(order):
    """y has its own, what is saved the product's, a gradient that of its operand."""
    x, residual = (torch.empty(5, n, device="meta") for n in (8, 7))
    weight = torch.empty(7, 8, device="meta", dtype=BF16)
    recipe, _ = typed(str(make_spec(order, activation="gelu")), F32, BF16, F32, BF16, "cuda")
    call = (x, weight, *[None] * 4, residual, None, None, None, 1, recipe)
    y, *saved = ops.FORWARD["cuda"](*call, True)
    operand = [((5, 8), BF16)] if order == "note" else []
    assert y.dtype == F32
    assert [(t.shape, t.dtype) for t in saved] == [((5, 7), BF16), ((10,), F32), *operand]
    grads = ops.BACKWARD["cuda"](y, saved, *call, 0b1000011)
    assert [(t.shape, t.dtype) for t in grads] == [
        (t.shape, t.dtype) for t in (x, weight, residual)
    ]


@pytest.mark.parametrize(
    "dtype, M, N, small",
    [
        (BF16, 4096, 1024, True),
        (BF16, 4097, 64, False),
        (BF16, 64, 1025, False),
        (F32, 256, 512, True),
        (F32, 4096, 1024, False),
    ],
)
def test_what_is_small(dtype, M, N, small):
    assert backends.is_small(torch.device("cuda"), dtype, M, N, N) == small
    assert not backends.is_small(CPU, dtype, M, N, N)
    first = backends.candidates(torch.device("cuda"), small)[0]
    assert first == ("cuda" if small else "vendor")


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU on which nothing runs: tensors without data, for what only looks at them."""
    from fusedres.backends import triton

    if torch.version.cuda is None:
        pytest.skip("this torch is a build without CUDA")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton, "prepare", lambda device: None)
    backends.choose.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")
    backends.choose.cache_clear()


def test_dynamo_traces_a_layer_on_a_gpu(fake_gpu):
    """In one graph, guarded by what "auto" asks of the batch size and by nothing else of it."""
    layer = FusedResidual(64, 64, activation="gelu", device=fake_gpu, dtype=BF16)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for M, traced in ((32, 1), (4096, 1), (4097, 2), (8192, 2), (64, 2)):
        y = compiled(torch.empty(M, 64, device=fake_gpu, dtype=BF16))
        assert y.shape == (M, 64) and y.device.type == "cuda" and len(graphs) == traced, M
