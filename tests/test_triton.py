"""The Triton backend's numbers: by the interpreter on CPU tensors, and by the same tests on a GPU.

TRITON_INTERPRET=1 counts only if it is set before Triton is imported: test_triton_interpreter.py runs this file
that way. The interpreter computes bf16 wrongly, so bf16 is left to GPUs.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for determinism

import pytest
import torch
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
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import ACTIVATIONS, make_spec

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
    """torch.empty comes filled with NaN, so that an element that no kernel writes fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(*args, **settings):
    """A case on DEVICE whose cotangent is 0 where rounding could carry a pre-activation across a kink."""
    case = make_case(*args, **settings)
    kinks = KINKS.get(case.spec.activation, ())
    if kinks and case.dy.numel():
        h = pre_activation(case, torch.float64)
        reach = (pre_activation(case, case.x.dtype) - h).abs().max()
        near = sum((h - kink).abs() <= reach for kink in kinks) > 0
        assert near.double().mean() <= 0.005, f"{near.sum()} of {near.numel()} elements lie near a kink"
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
        assert torch.equal(a[name], b[name]), f"{name}: {(a[name] != b[name]).sum()} elements differ"


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
    check(make(64, 128, norm=norm, norm_bias=bool(norm), activation="gelu", scale=scale, mean=mean))


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
        assert error.max() <= 2 * allowed.max() + EPS, f"{h[worst]}: {error[worst]}, torch {allowed.max()}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_accurate_relative_to_its_value_near_zero(name):
    h = logarithmic(-30, 0)
    plain, true = value_and_derivative(name, h)[0], value_and_derivative(name, h.double())[0]
    kept = true.abs() > 1e-37  # below, fp32 has fewer digits
    error, allowed = (
        ((v.double() - true) / true)[kept].abs() for v in (apply(epilogue.ACTIVATIONS[name][0], h), plain)
    )
    assert error.max() <= 2 * allowed.max() + 2 * EPS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_kinks_infinities_and_nan(name):
    kinks = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0])
    for function, expected in zip(epilogue.ACTIVATIONS[name], value_and_derivative(name, kinks), strict=True):
        torch.testing.assert_close(apply(function, kinks), expected, rtol=4 * EPS, atol=EPS)
    edges = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e38, -3e38])
    value = value_and_derivative(name, edges)[0]
    if name == "relu2":
        value[3] = float("inf")
    torch.testing.assert_close(apply(epilogue.ACTIVATIONS[name][0], edges), value, equal_nan=True)


def test_normal_cdf_error_bound():
    """1.2e-7, the distance of two fp32 numbers at 1, is what erf in fp32 itself allows."""
    h = torch.cat([torch.linspace(-14, 14, 400001), logarithmic(-20, 10)])
    true = torch.special.ndtr(h.double())
    assert (apply(epilogue.normal_cdf, h).double() - true).abs().max() < (7e-8 if INTERPRET else 1.5e-7)


# Shapes and layouts.

EDGES_N = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 339, 466, 511, 512)
EDGES_K = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 339)
EDGES_M = (1, 2, 15, 16, 17, 31, 33, 47, 127, 128, 129)


@pytest.mark.parametrize("block_m", ["small", "large"])
@pytest.mark.parametrize("i", range(40))
def test_shapes(i, block_m, monkeypatch):
    if block_m == "large":  # as if every launch filled the GPU
        monkeypatch.setattr(backend, "WAVE", 0)
    M, K, N = (edges[i * step % len(edges)] for edges, step in ((EDGES_M, 1), (EDGES_K, 5), (EDGES_N, 3)))
    norm, dtype = NORMS[i % 3], DTYPES[i % len(DTYPES)]
    case = make(M, K, N, norm=norm, activation="gelu", eps=1e-2, dtype=dtype)
    assert_close(ours(case), eager(case), exact(case), terms=M + K + N, what=f"{M, K, N}")


@pytest.mark.parametrize("N", [513, 1023, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_rows(N, dtype):
    check(make(21, 64, N, activation="gelu", dtype=dtype))


def test_without_a_norm_any_width_runs():
    check(make(5, 40, 3001, norm=None, activation="tanh"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("M, K, N", [(0, 8, 8), (5, 0, 8), (5, 8, 0)])
def test_empty(M, K, N, norm):
    if norm and not N:
        pytest.skip("torch has no norm over no features")
    case = make(M, K or 1, N or 1, norm=norm, activation="gelu", residual=N or 1)
    cut = {"x": case.x[:, :K], "weight": case.tensors["weight"][:N, :K]}
    cut |= {name: case.tensors[name][..., :N] for name in ("bias", "residual")}
    case = case.with_tensors(dy=case.dy[:, :N], **cut)
    assert_close(ours(case), eager(case), exact(case), terms=1)


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
    return {"transposed": t.t().contiguous().t(), "sliced": wide[:, 3::2], "offset": offset.copy_(t)}


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("name", ["x", "weight", "residual", "dy"])
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_do_not_change_a_bit(norm, name, layout):
    case = make(37, 48, 70, norm=norm, activation="gelu", residual=70)
    tensor = strided(case.dy if name == "dy" else case.tensors[name])[layout]
    spread = case.with_tensors(**{name: tensor})
    y = ["y"] if name in ("x", "weight") else ["y", "dx", "dweight", "dbias"]
    a, b = ours(case), ours(spread)
    bitwise({key: a[key] for key in a if key in y}, {key: b[key] for key in a if key in y})
    assert_close(b, eager(case), exact(case), terms=1)


@pytest.mark.parametrize("norm", NORMS)
def test_expanded_inputs(norm):
    case = make(37, 48, norm=norm, activation="gelu")
    x, dy = case.x[:1].expand(37, 48), case.dy[:1, :1].expand(37, 48)
    bitwise(
        ours(case.with_tensors(dy=dy, x=x), ("norm_weight", "bias") if norm else ("bias",)),
        ours(case.with_tensors(dy=dy.contiguous(), x=x.contiguous()), ("norm_weight", "bias") if norm else ("bias",)),
    )


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
        case.dy, x, weight, *rest, None, None, None, z, stats, 1, str(case.spec), needs
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("M, N", [(37, 70), (129, 257), (16, 128)])
def test_nothing_outside_is_written_and_nothing_inside_is_left(M, N, norm, monkeypatch):
    case = make(M, 48, N, norm=norm, activation="gelu", residual=N - 3, pad=True)
    margin, canary, frames = 4096, 12345.0, []

    def framed(self, *shape, dtype=None):
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        dtype = dtype or self.dtype
        count = torch.Size(shape).numel()
        frames.append(torch.full((count + 2 * margin,), canary, dtype=dtype, device=self.device))
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


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


class Products(TorchDispatchMode):
    """Counts matrix products, and the torch ops that compute anything else."""

    FREE = ("empty", "view", "t.", "transpose", "slice", "select", "detach", "fill", "zeros", "new_", "prim")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_one_launch_forward_and_three_backward(norm, monkeypatch):
    case = make(64, 48, norm=norm, activation="gelu")
    call(case)
    kernels = [Counted(backend.residual_forward_kernel), Counted(backend.residual_backward_kernel)]
    monkeypatch.setattr(backend, "residual_forward_kernel", kernels[0])
    monkeypatch.setattr(backend, "residual_backward_kernel", kernels[1])
    torch.use_deterministic_algorithms(False)  # filling empty tensors is a launch too
    with Products() as torch_ops:
        call(case)
    assert [kernel.launches for kernel in kernels] == [1, 1]
    assert torch_ops.seen == ["addmm.out", "mm.out"]


def test_z_is_saved_only_if_asked_for_and_needed():
    case = make(5, 8, activation="gelu")
    operands = [case.tensors.get(n) for n in ("x", "weight", "bias", "norm_weight", "norm_bias")]

    def saved(recipe, save):
        return backend.residual_forward(*operands, None, None, None, None, None, 1, recipe, save)[1].shape

    assert saved(str(case.spec), True) == (5, 8)
    assert saved(str(case.spec), False) == (0,)
    assert saved("linear-add", True) == (0,)


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


def test_products_of_fp32_are_tf32_only_where_torch_says_so(monkeypatch):
    assert backend._precision() == "ieee"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert backend._precision() == "tf32"


@pytest.mark.parametrize("dtype", backend.ELEMENT_SIZE)
@pytest.mark.parametrize("norm", NORMS)
def test_plan(norm, dtype):
    spec = make_spec(norm=norm)
    for N in range(1, 1025):
        for M in (1, 100, 10**6):
            tile = backend.plan(spec, dtype, M, N, 64)
            assert norm is None or N <= tile.BLOCK_N
            assert tile.BLOCK_M <= backend.plan(spec, dtype, 10**7, N, 64).BLOCK_M
