"""The Triton backend's numbers: by the interpreter on CPU tensors, and by the same tests on a GPU.

TRITON_INTERPRET=1 counts only if it is set before Triton is imported: test_triton_interpreter.py
runs this file that way. The interpreter computes bf16 wrongly, so bf16 is left to GPUs.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # determinism; read when CUDA starts

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import ACTIVATIONS, make_spec
from oracle import (
    KINKS,
    assert_as_accurate,
    assert_close,
    eager,
    exact,
    fused,
    make_case,
    pre_activation,
)

triton = pytest.importorskip("triton")
tl = triton.language

from fusedres.backends import triton as backend  # noqa: E402
from fusedres.kernels import epilogue  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [] if INTERPRET else pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16) if INTERPRET else (F32, F16, BF16)
NORMS = (None, "layer", "rms")
SMOOTH = tuple(name for name in ACTIVATIONS if name not in KINKS)
EPS = torch.finfo(F32).eps


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """torch.empty comes filled with NaN, so an element that no kernel writes fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(*args, **settings):
    """A case on DEVICE, its cotangent 0 where rounding could carry an element across a kink."""
    case = make_case(*args, **settings)
    kinks = KINKS.get(case.spec.activation, ())
    if kinks and case.dy.numel():
        h = pre_activation(case, torch.float64)
        reach = (pre_activation(case, case.x.dtype) - h).abs().max()
        near = sum((h - kink).abs() <= reach for kink in kinks) > 0
        assert near.double().mean() <= 0.005, f"{near.sum()} of {near.numel()} lie near a kink"
        case = case.with_tensors(dy=case.dy.masked_fill(near, 0.0))
    tensors = {name: t.to(DEVICE) for name, t in case.tensors.items()}
    return case.with_tensors(dy=case.dy.to(DEVICE), **tensors)


def ours(case, asked=None):
    return fused(case, "triton", asked)


def check(case):
    assert_as_accurate(ours(case), eager(case), exact(case), f"'{case.spec}', {case.x.dtype}")


def bitwise(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{(a[name] != b[name]).sum()} of {name} differ"


# Accuracy: NUMERICS 1.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_as_accurate_as_eager(norm, activation, dtype):
    if dtype == BF16 and activation == "relu":
        activation = "elu"  # in bf16 more than 0.5 % of all elements lie near relu's kink
    check(make(96, 130, norm=norm, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"N": 200, "pad": True},
        {"N": 70, "residual": 70},
        {"N": 70, "residual": 33, "pad": True},
        {"order": "linear-norm-act", "N": 70},
        {"order": "linear", "N": 200},
        {"order": "linear-add"},
        {"order": "linear-norm", "N": 33},
        {"bias": False, "affine": False},
    ],
    ids=str,
)
def test_shortcuts_and_missing_stages(settings, norm, dtype):
    check(make(64, 96, norm=norm, activation="gelu", residual_scale=0.5, dtype=dtype, **settings))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    check(make(64, 130, activation=name, residual_scale=-2.0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale, mean", [(1e-3, 0.0), (1.0, 0.0), (1e3, 0.0), (1.0, 1e3)])
def test_scales(norm, scale, mean):
    # Without a norm few pre-activations of sigma 1e3 lie where gelu bends: too few for an RMS.
    activation = "gelu" if norm else "relu"
    settings = {"norm_bias": bool(norm), "scale": scale, "mean": mean}
    check(make(64, 128, norm=norm, activation=activation, **settings))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_past_the_end_of_a_block_do_not_disturb_sums_when_eps_is_zero(norm):
    check(make(33, 70, norm=norm, activation="silu", eps=0.0))


# Activations one by one.


@triton.jit
def apply_kernel(h_ptr, out_ptr, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """out = FUNCTION(h)"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, FUNCTION(tl.load(h_ptr + i, i < count, 0.0)), i < count)


def apply(function, h):
    h = h.to(DEVICE)
    out = torch.empty_like(h)
    apply_kernel[(triton.cdiv(h.numel(), 1024),)](h, out, h.numel(), function, 1024)
    return out.cpu()


def value_and_derivative(name, h):
    """By torch, in h's dtype."""
    h = h.clone().requires_grad_()
    value = ACTIVATION_FUNCTIONS[name](h)
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


def logarithmic(start, end):
    h = torch.logspace(start, end, 4001, dtype=torch.float64).float()
    return torch.cat([h, -h])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_derivative_are_as_accurate_as_torch(name):
    h = torch.cat([torch.linspace(-12, 12, 20011), logarithmic(-6, 4)])
    plain, true = value_and_derivative(name, h), value_and_derivative(name, h.double())
    for function, p, t in zip(epilogue.ACTIVATIONS[name], plain, true, strict=True):
        unit = t.abs().clamp(min=1.0)
        error, allowed = ((v.double() - t).abs() / unit for v in (apply(function, h), p))
        worst = error.argmax()
        told = f"{error[worst]:.3g} at {h[worst]}, torch {allowed.max():.3g}"
        assert error.max() <= 2 * allowed.max() + EPS, told


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_accurate_relative_to_its_value_near_zero(name):
    h = logarithmic(-30, 0)
    plain, true = value_and_derivative(name, h)[0], value_and_derivative(name, h.double())[0]
    kept = true.abs() > 1e-37  # below, fp32 has fewer digits
    value = apply(epilogue.ACTIVATIONS[name][0], h)
    error, allowed = (((v.double() - true) / true)[kept].abs() for v in (value, plain))
    assert error.max() <= 2 * allowed.max() + 2 * EPS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_kinks_infinities_and_nan(name):
    kinks = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0])
    true = value_and_derivative(name, kinks.double())
    for function, t in zip(epilogue.ACTIVATIONS[name], true, strict=True):
        torch.testing.assert_close(apply(function, kinks), t.float(), rtol=4 * EPS, atol=EPS)
    edges = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e15, -1e15])
    value = value_and_derivative(name, edges.double())[0].float()
    torch.testing.assert_close(apply(epilogue.ACTIVATIONS[name][0], edges), value, equal_nan=True)


def test_normal_cdf_error_bound():
    """fp32 numbers near 1 lie 1.2e-7 apart; a GPU's exp2 is off by 2 of these steps."""
    h = torch.cat([torch.linspace(-14, 14, 400001), logarithmic(-20, 10)])
    error = (apply(epilogue.normal_cdf, h).double() - torch.special.ndtr(h.double())).abs()
    assert error.max() < (8e-8 if INTERPRET else 1.5e-7)


# Shapes and layouts.

EDGES_N = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 339, 466, 511, 512)
EDGES_K = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 339)
EDGES_M = (1, 2, 15, 16, 17, 31, 33, 47, 127, 128, 129)


@pytest.mark.parametrize("block_m", ["small", "large"])
@pytest.mark.parametrize("i", range(40))
def test_shapes(i, block_m, monkeypatch):
    if block_m == "large":  # as if every launch filled the GPU
        monkeypatch.setattr(backend, "WAVE", 0)
    steps = ((EDGES_M, 1), (EDGES_K, 5), (EDGES_N, 3))
    M, K, N = (edges[i * step % len(edges)] for edges, step in steps)
    norm, dtype = NORMS[i % 3], DTYPES[i % len(DTYPES)]
    case = make(M, K, N, norm=norm, activation="gelu", eps=1e-2, dtype=dtype)
    assert_close(ours(case), eager(case), exact(case), terms=10 * (M + K + N), what=f"{M, K, N}")


@pytest.mark.parametrize("N", [513, 1023, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_rows(N, dtype):
    check(make(21, 64, N, activation="gelu", dtype=dtype))


def test_without_a_norm_any_width_runs():
    check(make(5, 40, 3001, norm=None, activation="tanh"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("M, K, N", [(0, 8, 8), (5, 0, 8), (5, 8, 0)])
def test_empty(M, K, N, norm):
    case = make(6, 9, 9, norm=norm, activation="gelu", residual=9)
    sizes = {"x": (M, K), "weight": (N, K), "residual": (M, N)}
    cut = {}
    for name, t in case.tensors.items():
        rows, columns = sizes.get(name, (N, None))
        cut[name] = t[:rows] if columns is None else t[:rows, :columns]
    case = case.with_tensors(dy=case.dy[:M, :N], **cut)
    (y, _), grads = call(case)
    assert y.shape == (M, N)
    for name, grad in zip(case.asked, grads, strict=True):
        assert grad.shape == case.tensors[name].shape and grad.isfinite().all()
        assert (M and N) or not grad.any()
    if not K:
        zeros = {"x": y.new_zeros(M, 1), "weight": y.new_zeros(N, 1)}
        torch.testing.assert_close(y.double(), exact(case.with_tensors(**zeros))["y"])


@pytest.mark.parametrize("norm", ["layer", None])
def test_many_programs_share_the_column_sums(norm, monkeypatch):
    monkeypatch.setattr(backend, "BACKWARD_TILE", 1024)
    monkeypatch.setattr(backend, "BACKWARD_PROGRAMS", 7)
    check(make(301, 48, 200, norm=norm, activation="gelu"))


def strided(t):
    """Tensors that equal `t`, by kind of layout."""
    rows, columns = t.shape
    wide = t.new_full((rows, 2 * columns + 3), float("nan"))
    wide[:, 3::2] = t
    offset = t.new_full((rows * columns + 1,), float("nan"))[1:].view(rows, columns)
    offset.copy_(t)
    return {"transposed": t.t().contiguous().t(), "sliced": wide[:, 3::2], "offset": offset}


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("name", ["x", "weight", "residual", "dy"])
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_do_not_change_a_bit(norm, name, layout):
    case = make(37, 48, 70, norm=norm, activation="gelu", residual=70)
    tensor = strided(case.dy if name == "dy" else case.tensors[name])[layout]
    a, b = ours(case), ours(case.with_tensors(**{name: tensor}))
    assert_close(b, eager(case), exact(case), terms=1)
    if name in ("x", "weight"):  # dx and dweight are the library's products, it may sum otherwise
        for product in ("dx", "dweight"):
            del a[product], b[product]
    bitwise(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_expanded_inputs(norm):
    case = make(37, 48, norm=norm, activation="gelu")
    x, dy = case.x[:1].expand(37, 48), case.dy[:1, :1].expand(37, 48)
    vectors = ("bias", "norm_weight") if norm else ("bias",)
    spread = case.with_tensors(dy=dy, x=x)
    dense = case.with_tensors(dy=dy.contiguous(), x=x.contiguous())
    bitwise(ours(spread, vectors), ours(dense, vectors))


# Promises.


def call(case, needs=None):
    """(y, z), gradients: straight from the backend."""
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")
    x, weight, bias, *rest = (case.tensors.get(name) for name in names)
    if needs is None:
        needs = sum(1 << i for i, name in enumerate(names) if name in case.tensors)
    y, z, stats = backend.residual_forward(
        x, weight, bias, *rest, None, None, None, 1, str(case.spec), True
    )
    return (y, z), backend.residual_backward(
        case.dy, x, weight, bias, *rest, None, None, None, z, stats, 1, str(case.spec), needs
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("M, N", [(37, 70), (129, 257), (16, 128)])
def test_nothing_outside_is_written_and_nothing_inside_is_left(M, N, norm, monkeypatch):
    case = make(M, 48, N, norm=norm, activation="gelu", residual=N - 3, pad=True)
    margin, canary, frames = 4096, 12345.0, []

    def framed(self, shape, dtype=None, **interpreter):
        if interpreter:  # the interpreter's own copies
            return torch.empty(shape, dtype=dtype, **interpreter)
        count = torch.empty(shape, device="meta").numel()
        frames.append(self.new_full((count + 2 * margin,), canary, dtype=dtype))
        return frames[-1][margin : margin + count].fill_(float("nan")).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", framed)
    outputs, grads = call(case)
    for t in (*outputs, *grads):
        assert t.isfinite().all()
    assert len(frames) > len(outputs) + len(grads)
    for frame in frames:
        assert (frame[:margin] == canary).all() and (frame[-margin:] == canary).all()


@pytest.mark.parametrize("norm", NORMS)
def test_each_gradient_alone_is_the_same(norm):
    case = make(37, 48, norm=norm, activation="gelu")
    _, together = call(case)
    for i, grad in enumerate(together):
        (alone,) = call(case, 1 << i)[1]
        assert torch.equal(alone, grad)


def test_the_same_call_twice_is_bitwise_equal_and_leaves_its_inputs(monkeypatch):
    monkeypatch.setattr(backend, "BACKWARD_TILE", 512)
    case = make(130, 48, 70, activation="gelu", residual=70)
    before = {name: (t.clone(), t._version) for name, t in {**case.tensors, "dy": case.dy}.items()}
    first = call(case)
    for _ in range(3):
        again = call(case)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b)
    for name, t in {**case.tensors, "dy": case.dy}.items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(poison, activation, norm):
    case = make(20, 24, 30, norm=norm, activation=activation, residual=30)
    case.x[3, 5] = poison
    (y, _), (dx, *_) = call(case)
    others = torch.arange(20, device=DEVICE) != 3
    assert y[others].isfinite().all() and dx[others].isfinite().all()
    if poison != poison:
        assert y[3].isnan().all()
    else:
        assert torch.equal(y[3].isfinite(), eager(case)["y"][3].isfinite())


class Launches(TorchDispatchMode):
    """Lists launches: of kernels, which it does not run, and of torch ops that compute."""

    FREE = ("new_", "view", "t.", "slice", "select", "empty", "detach")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))

    def kernel(self, name):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **constants: self.seen.append(name)

        return Kernel()


@pytest.mark.parametrize("norm", NORMS)
def test_one_launch_forward_and_three_backward(norm, monkeypatch):
    case = make(64, 48, norm=norm, activation="gelu")
    call(case)  # clears the workspace
    torch.use_deterministic_algorithms(False)  # filling empty tensors is a launch too
    launches = Launches()
    for name in ("residual_forward_kernel", "residual_backward_kernel"):
        monkeypatch.setattr(backend, name, launches.kernel(name))
    with launches:
        call(case)
    forward, *backward = launches.seen
    assert forward == "residual_forward_kernel"
    assert backward == ["residual_backward_kernel", "addmm.out", "mm.out"]


def test_z_is_saved_only_if_asked_for_and_needed():
    case = make(5, 8, activation="gelu")
    operands = [case.tensors.get(n) for n in ("x", "weight", "bias", "norm_weight", "norm_bias")]

    def saved(recipe, save):
        return backend.residual_forward(*operands, None, None, None, None, None, 1, recipe, save)[
            1
        ].shape

    assert saved(str(case.spec), True) == (5, 8)
    assert saved(str(case.spec), False) == (0,)
    assert saved("linear-add", True) == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays_and_shares_no_counters():
    case = make(300, 48, 70, activation="gelu", dtype=BF16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(case)
    for _ in range(3):
        case.x.normal_()
        graph.replay()
        expected = call(case)
        for a, b in zip((*captured[0], *captured[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(a, b)


# Choice.


def test_why_not():
    def why(N=64, dtype=F32, device=DEVICE, **settings):
        return backend.why_not(make_spec(**settings), dtype, torch.device(device), N, 64)

    assert why() is None and why(1024) is None and why(16384, norm=None) is None
    assert "1025 features" in why(1025) and "1024" in why(1025)
    assert "'gate'" in why(gate="scalar")
    assert "linear-norm-act-add" in why(order="prenorm")
    assert "'batch'" in why(norm="batch")
    assert "float64" in why(dtype=torch.float64)
    assert "meta" in why(device="meta")


def test_products_of_fp32_are_tf32_only_where_torch_says_so():
    assert backend._precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert backend._precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", backend.ELEMENT_SIZE)
@pytest.mark.parametrize("norm", NORMS)
def test_plan(norm, dtype):
    spec = make_spec(norm=norm)
    for N in range(1, 1025):
        for M in (1, 100, 10**6):
            tile = backend.plan(spec, dtype, M, N, 64)
            assert norm is None or N <= tile.BLOCK_N
            assert tile.BLOCK_M <= backend.plan(spec, dtype, 10**7, N, 64).BLOCK_M
