"""What the tests of the Triton backend share: cases, calls straight to the backend, launch counts.

On CPU tensors by Triton's interpreter where TRITON_INTERPRET=1, which counts only if it is set
before Triton is imported; else on a GPU. The interpreter computes bf16 wrongly.
"""

import os
from functools import cache

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # determinism; read when CUDA starts

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.backends import launch
from fusedres.backends import plan as planner
from fusedres.spec import STAGES
from oracle import KINKS, assert_by_size, eager, exact, fused, make_case, pre_activation

pytest.importorskip("triton")

from fusedres.backends import triton as backend

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
MARKS = [] if INTERPRET else pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16) if INTERPRET else (F32, F16, BF16)
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")
EPS = torch.finfo(F32).eps

# A recipe of every family: settings of make_case, and of the planner where sizes would not choose.
FAMILIES = {
    "tile": ({"norm": None}, {}),
    "tile, given": ({"norm": "batch", "training": False}, {}),
    "rows": ({}, {}),
    "rows, rms": ({"norm": "rms"}, {}),
    "wide": ({}, {"WIDEST_ROW": 0}),
    "wide, rms": ({"norm": "rms", "order": "postnorm"}, {"WIDEST_ROW": 0}),
    "columns": ({"norm": "batch"}, {}),
    "batch": ({"norm": "batch"}, {"TALLEST_COLUMN": 0}),
    "prologue": ({"order": "preact"}, {}),
    "prologue, rms": ({"order": "preact", "norm": "rms"}, {}),
    "prologue, given": ({"order": "prenorm", "norm": "batch", "training": False}, {}),
    "algebraic": ({"order": "prenorm", "dtype": F16}, {}),
    "prebatch": ({"order": "preact", "norm": "batch"}, {}),
    "tile, apart": ({"order": "preact"}, {"APART_FROM": 0, "APART_COSTS": -1e9}),
}


def force(monkeypatch, processors=None, **constants):
    """The planner with other constants, on a device of so many multiprocessors."""
    for name, value in constants.items():
        monkeypatch.setattr(planner, name, value)
    if processors is not None:
        device = planner.Device("any", processors, 160 << 10)
        monkeypatch.setattr(planner, "device_of", lambda _: device)
    forget()


def forget():
    """What planner and launches have cached."""
    planner.plan.cache_clear()
    planner.plan_whole.cache_clear()
    launch._calls.clear()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """torch.empty comes filled with NaN, so an element that no kernel writes fails the test.

    In the interpreter tiles are as large as for a device that two programs fill, and not smaller
    for narrow loads: it takes its time by the program.
    """
    if INTERPRET:
        force(monkeypatch, 2)
        monkeypatch.setattr(planner, "moved_at_once", lambda *_: 16)
    forget()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    forget()


def make(*args, **settings):
    """A case on DEVICE, its cotangent 0 where rounding could carry an element across a kink."""
    return on_device(aside(make_case(*args, **settings)))


def on_device(case):
    tensors = {name: t.to(DEVICE) for name, t in case.tensors.items()}
    return case.with_tensors(dy=case.dy.to(DEVICE), **tensors)


def aside(case):
    kinks = KINKS.get(case.spec.activation, ())
    if kinks and case.dy.numel() and case.spec.stages[-1] == "act":
        near = near_kink(case, kinks)
        case = case.with_tensors(dy=case.dy.masked_fill(near, 0.0))
    elif kinks and case.dy.numel() and "act" in case.spec.epilogue:
        # Everything that this row's gradient touches.
        near = near_kink(case, kinks)
        after = case.spec.stages[case.spec.stages.index("act") + 1 :]
        near = near.any(1, keepdim=True) if "norm" in after else near
        case = case.with_tensors(dy=case.dy.masked_fill(near, 0.0))
    return case


def near_kink(case, kinks):
    h = pre_activation(case, torch.float64)
    reach = (pre_activation(case, case.x.dtype) - h).abs().max()
    near = sum((h - kink).abs() <= reach for kink in kinks) > 0
    assert near.double().mean() <= 0.005, f"{near.sum()} of {near.numel()} lie near a kink"
    return near


def make_family(name, monkeypatch, *sizes, **settings):
    """A case that runs in this family."""
    given, constants = FAMILIES[name]
    force(monkeypatch, **constants)
    case = make(*sizes, **{"activation": "gelu", **given, **settings})
    (M, K), N = case.x.shape, case.tensors["weight"].shape[0]
    if M * N:
        assert planner.family_of(case.spec, case.x.dtype.itemsize, M, N, K) == name.split(",")[0]
        assert planner.is_apart(case.spec, M, N, K) == name.endswith("apart")
    return case


def ours(case, asked=None):
    return fused(case, "triton", asked)


def check(case, asked=None):
    spec, asked = case.spec, case.asked if asked is None else asked
    if spec.batch_stats and spec.epilogue[:1] == ("norm",):  # the bias' gradient is 0, and noise
        asked = tuple(name for name in asked if name != "bias")
    results = (run(case, asked=asked) for run in (ours, eager, exact))
    assert_by_size(case, *results, f"'{spec}', {case.x.dtype}")


def bitwise(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{(a[name] != b[name]).sum()} of {name} differ"


@cache
def seed_tensor(seed):
    return torch.tensor([seed], device=DEVICE)


def call(case, needs=None, recipe=None):
    """What forward returns, gradients: straight from the backend."""
    spec = case.spec
    recipe = str(spec) if recipe is None else recipe
    operands = [case.tensors.get(name) for name in NAMES]
    running = [None, None]
    if spec.norm == "batch" and not spec.batch_stats:
        running = [case.tensors["running_mean"], case.tensors["running_var"]]
    seed = seed_tensor(case.seed) if spec.random else None
    if needs is None:
        needs = sum(1 << i for i, t in enumerate(operands) if t is not None)
    outputs = backend.residual_forward(*operands, *running, seed, 1, recipe, True)
    return outputs, backend.residual_backward(
        case.dy.to(outputs[0].dtype), outputs[1:], *operands, *running, seed, 1, recipe, needs
    )


class Launches(TorchDispatchMode):
    """Lists launches: of kernels, which it does not run, and of torch ops that compute."""

    FREE = ("new_", "view", "t.", "slice", "select", "empty", "detach", "unbind", "as_strided")
    KERNELS = (
        ("forward", "residual_forward_kernel"),
        ("forward", "residual_forward_wide_kernel"),
        ("forward", "residual_forward_batch_kernel"),
        ("forward", "residual_forward_prebatch_kernel"),
        ("backward", "residual_backward_kernel"),
        ("backward", "residual_backward_product_kernel"),
        ("backward", "residual_backward_wide_kernel"),
        ("backward", "residual_backward_batch_kernel"),
        ("prologue", "residual_prologue_kernel"),
        ("products", "residual_products_kernel"),
        ("products", "residual_dx_kernel"),
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        for module, name in self.KERNELS:
            monkeypatch.setattr(getattr(backend, module), name, self.kernel(name))
        # As on a GPU, where programs can wait for each other.
        monkeypatch.setattr(backend, "interpreting", lambda: False)
        forget()
        torch.use_deterministic_algorithms(False)  # filling empty tensors is a launch too

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))

    def kernel(self, name):
        class Kernel:
            def __getitem__(_, grid):
                assert len(grid) == 1 and 0 < grid[0] < 1 << 31

                def launch(*args, **constants):
                    meeting = name.endswith("batch_kernel")
                    assert constants.get("launch_cooperative_grid", False) == meeting
                    self.seen.append(name)

                return launch

        return Kernel()

    def of(self, function, *args):
        """What `function` launches."""
        function(*args)  # clears the counters
        self.seen.clear()
        with self:
            result = function(*args)
        return list(self.seen), result


def orders(random, count):
    """Orders that are no alias, by random permutation."""
    for _ in range(count):
        stages = random.sample([s for s in STAGES if s != "linear"], random.randint(0, 6))
        stages.insert(random.randint(0, len(stages)), "linear")
        yield "-".join(stages)
