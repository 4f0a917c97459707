"""Every shipped tile compiled without a GPU: no spills, little shared memory, wgmma on Hopper.

bench/compiled/aot.py says how. All of that in processes of its own, which it leaves with a driver
that cannot launch.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from bench.compiled import aot  # noqa: E402
from bench.compiled.aot import SHARED, compiled, operands  # noqa: E402
from fusedres.backends import plan as planner  # noqa: E402
from fusedres.backends import triton as backend  # noqa: E402
from fusedres.spec import ACTIVATIONS, make_spec  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NEVER = 1 << 62  # of what the planner does from some size on
APART_FROM = planner.APART_FROM
PLAN_WHOLE = planner.plan_whole  # which `whole` replaces
EVERYTHING = {"gate": "channel", "dropout": 0.1, "drop_path": 0.1}

# family -> order without and with everything on, norm
RECIPES = {
    "tile": ("linear-act-add", "linear-act-gate-dropout-droppath-add", None),
    "rows": ("linear-norm-act-add", "linear-norm-act-gate-dropout-droppath-add", "layer"),
    "wide": ("linear-norm-act-add", "linear-act-gate-dropout-droppath-add-norm", "layer"),
    "prologue": ("norm-act-linear-add", "norm-act-gate-dropout-droppath-linear-add", "layer"),
    "algebraic": ("norm-linear-act-add", "norm-linear-act-gate-dropout-droppath-add", "layer"),
    "columns": ("linear-norm-act-add", "linear-act-gate-dropout-droppath-add-norm", "batch"),
    "batch": ("linear-norm-act-add", "linear-act-gate-dropout-droppath-add-norm", "batch"),
    "prebatch": ("norm-act-linear-add", "norm-act-gate-dropout-droppath-linear-add", "batch"),
}


def forward(dtype, precision, family, tile, random, activation):
    """Launches the family's kernel with this tile."""
    planner.choose_tile, planner.APART_FROM = lambda *_: tile, NEVER
    planner.plan.cache_clear()
    torch.backends.cuda.matmul.fp32_precision = precision
    plain, everything, norm = RECIPES[family]
    settings = {"norm": norm, "activation": activation, "training": True}
    settings |= {"order": everything, **EVERYTHING} if random else {"order": plain}
    spec = make_spec(**settings)
    M = tile.BLOCK_M if family == "columns" else 65536
    N = {"rows": tile.BLOCK_N, "wide": 1024}.get(family, 512)
    assert planner.plan(spec, dtype, M, N, 512).family == family
    backend.residual_forward(*operands(spec, dtype, M, N, 512), 1, str(spec), True)


def backward(dtype, norm, random, width):
    """Launches the backward kernels of both sides, and the products between them."""
    planner.APART_FROM, planner.LIBRARY = NEVER, NEVER
    plain = RECIPES["prebatch" if norm == "batch" else "prologue"]
    settings = {"order": plain[1] if random else "norm-linear-act-add", "norm": norm}
    settings |= {"activation": "silu", "training": True} | (EVERYTHING if random else {})
    spec, M = make_spec(**settings), 4096
    tensors = operands(spec, dtype, M, width, width)
    dy = torch.empty(M, width, dtype=dtype, device="meta")
    shape = (2, width) if norm == "batch" else (2 * M,)
    stats = torch.empty(shape, dtype=F32, device="meta")
    needs = sum(1 << i for i, t in enumerate(tensors[:7]) if t is not None)
    saved = [dy, stats] if spec.saves_z else [stats]
    backend.residual_backward(dy, saved, *tensors, 1, str(spec), needs)


def whole(sm, dtype, tile, random, activation, order):
    """Launches the backward kernel that makes dz and dx, with this tile."""
    planner.plan_whole = lambda *_: planner.WholePlan(tile, 256)
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # TF32 goes another way
    settings = {"order": order, "norm": "layer", "activation": activation}
    spec, M, N, K = make_spec(**settings, **(EVERYTHING if random else {})), 4096, tile.BLOCK_N, 512
    tensors = operands(spec, dtype, M, N, K)
    dy = torch.empty(M, N, dtype=dtype, device="meta")
    stats = torch.empty(2 * M, dtype=F32, device="meta")
    needs = sum(1 << i for i, t in enumerate(tensors[:7]) if t is not None)
    saved = [dy, stats] if spec.norm else [dy]
    backend.residual_backward(dy, saved, *tensors, 1, str(spec), needs)


def mixed(family, tile, x_dtype, random):
    """Launches a family's forward, by this tile, and its backward, weight in bf16 and the residual
    and y in fp32; x in `x_dtype`, None: in bf16.
    """
    planner.plan_whole, planner.APART_FROM = PLAN_WHOLE, NEVER
    planner.choose_tile = lambda *_: tile
    planner.plan.cache_clear()
    plain, everything, norm = RECIPES[family]
    settings = {"order": everything, **EVERYTHING} if random else {"order": plain}
    spec = make_spec(norm=norm, activation="silu", training=True, **settings)
    spec = replace(spec, x_dtype=x_dtype, residual_dtype="float32", y_dtype="float32")
    M = tile.BLOCK_M if family == "columns" else 65536
    N = {"rows": tile.BLOCK_N, "wide": 1024}.get(family, 512)
    tensors = operands(spec, BF16, M, N, 512)
    y, *saved = backend.residual_forward(*tensors, 1, str(spec), True)
    needs = sum(1 << i for i, t in enumerate(tensors[:7]) if t is not None)
    backend.residual_backward(y, saved, *tensors, 1, str(spec), needs)


def mixed_job(job):
    return job, compiled(job[0], mixed, *job[1:])


def whole_job(job):
    return job, compiled(job[0], whole, *job)


def forward_job(job):
    sm, *rest = job
    return job, compiled(sm, forward, *rest)


def backward_job(job):
    sm, *rest = job
    return job, compiled(sm, backward, *rest)


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor


@cache
def shipped(sm):
    """(family, random, bytes, tile) of every tile shipped for an architecture."""
    found = []
    for name, by_bits in planner.config("any", f"sm_{sm}")["tiles"].items():
        family, _, random = name.partition(" ")
        if "mixed" in random:
            continue
        for bits, rows in by_bits.items():
            for row in rows:
                found.append((family, bool(random), int(bits) // 8, planner.Tile(*row)))
    return found


def forward_jobs(sm):
    """Every tile, in fp32 by the tensor cores' TF32 and, on Hopper, in true fp32 too; with masks on
    Hopper only in the latter, whose sums take more registers.
    """
    for i, (family, random, size, tile) in enumerate(shipped(sm)):
        if family in ("products", "whole"):
            continue
        activation = ("silu", "gelu")[i % 2]  # these take the most registers
        if size == 2 or sm != 90 or not random:
            yield sm, BF16 if size == 2 else F32, "tf32", family, tile, random, activation
        if size == 4 and sm == 90:
            yield sm, F32, "ieee", family, tile, random, activation


def wrong(sm, found, tensor_cores):
    """What is wrong with a compiled kernel, None if nothing."""
    checks = {
        "spills": found["stack"] > 0,
        "takes too much shared memory": found["shared"] > aot.device(sm).shared,
        "has offsets of 32 bits": found["offsets"] != ["i64"],
        "takes A from registers, which is miscompiled": found["register_a"] > 0,
        "is (not) cooperative": found["cooperative"] != ("batch" in found["kernel"]),
        "does not use wgmma": sm == 90 and tensor_cores and not found["wgmma"],
    }
    return ", ".join(what for what, is_so in checks.items() if is_so)


@pytest.mark.parametrize("sm", SHARED)
def test_every_shipped_tile(sm, pool):
    count, told = 0, []
    for job, found in pool.map(forward_job, forward_jobs(sm), chunksize=4):
        _, dtype, precision, family, tile, _, _ = job
        (found,) = found  # one launch
        count += 1
        left = tile.BLOCK_N if family in ("prologue", "prebatch") else tile.BLOCK_M
        what = wrong(sm, found, left >= 64 and (dtype != F32 or precision == "tf32"))
        if not found["async_copies"]:
            what += ", loads without a pipeline"
        if found["shared"] > 1.1 * tile.shared(dtype.itemsize) + 4096:
            what += ", takes more shared memory than the planner says"
        if what:
            told.append(f"{job} {what}: {found}")
    assert not told, "\n".join(told)
    assert count >= 80


@pytest.mark.parametrize("sm", SHARED)
def test_backward(sm, pool):
    told, jobs = (
        [],
        [
            (sm, dtype, norm, random, width)
            for dtype in ((BF16, F32) if sm == 90 else (BF16,))
            for norm in ("layer", "rms", "batch")
            for random in ((False, True) if dtype == BF16 and norm == "layer" else (True,))
            for width in ((16, 256, 2048, 4096) if norm == "layer" else (128, 1024))
            if sm == 90 or (norm == "layer" and width in (256, 4096))
        ],
    )
    for job, kernels in pool.map(backward_job, jobs, chunksize=2):
        names = [found["kernel"] for found in kernels]
        assert 2 <= len(names) <= 3 and "residual_products_kernel" in names
        for found in kernels:
            products = found["kernel"] == "residual_products_kernel"
            what = wrong(sm, found, products and job[1] == BF16 and job[-1] >= 256)
            if not found["async_copies"] and "wide" not in found["kernel"]:
                what += ", loads without a pipeline"
            if what:
                told.append(f"{job} {what}: {found}")
    assert not told, "\n".join(told)


@pytest.mark.parametrize("sm", SHARED)
def test_backward_of_whole_rows(sm, pool):
    told, jobs = [], []
    for i, (family, random, size, tile) in enumerate(shipped(sm)):
        orders = ("note", "linear-norm-gate-act-add" if tile.BLOCK_N > 256 else "postnorm")
        orders = (RECIPES["tile"][1],) if random else orders if sm == 90 else orders[-1:]
        job = sm, BF16 if size == 2 else F32, tile, random, ("silu", "gelu")[i % 2]
        jobs += [(*job, order) for order in orders if family == "whole"]
    for job, (found,) in pool.map(whole_job, jobs, chunksize=2):
        assert found["kernel"] == "residual_backward_product_kernel"
        what = wrong(sm, found, job[1] == BF16)
        if not found["async_copies"] and sm == 90:
            what += ", loads without a pipeline"
        if what:
            told.append(f"{job} {what}: {found}")
    assert len(jobs) >= 10 and not told, "\n".join(told)


@pytest.mark.parametrize("sm", SHARED)
def test_several_dtypes(sm, pool):
    """Of each family the largest tiles; with what backward launches, the dz and dx of whole rows
    and products that convert among it.
    """
    device, told, jobs = planner.Device("any", 132, SHARED[sm], f"sm_{sm}"), [], []
    for family in RECIPES:
        for x_dtype, random in (("float32", False), (None, False), ("float32", True)):
            if x_dtype and family == "algebraic":
                continue  # it is "prologue" then
            tiles = planner.tiles_of(family, random, 2, device, True)
            jobs += [(sm, family, tile, x_dtype, random) for tile in tiles[: 1 + (not random)]]
    for job, found in pool.map(mixed_job, jobs, chunksize=2):
        _, family, tile, x_dtype, _ = job
        first, *back = found
        assert "forward" in first["kernel"] and 1 <= len(back) <= 3, job
        turned = x_dtype or family in ("prologue", "prebatch")
        tensor_cores = (tile.BLOCK_N if turned else tile.BLOCK_M) >= 64
        for kernel in found:
            products = kernel is first or "product" in kernel["kernel"] or "dx" in kernel["kernel"]
            large = family != "columns"  # else of few rows
            what = wrong(sm, kernel, tensor_cores if kernel is first else products and large)
            if products and not kernel["async_copies"]:
                what += ", loads without a pipeline"
            if kernel is first and kernel["shared"] > tile.shared(2, bool(x_dtype)) + 4096:
                what += ", takes more shared memory than the planner says"
            if what:
                told.append(f"{job} {what}: {kernel}")
    assert not told, "\n".join(told)
    assert len(jobs) >= 35


def activation_job(name):
    tile = planner.Tile(64, 64, 64, 4, 3)
    return name, compiled(90, forward, BF16, "ieee", "rows", tile, False, name)


def test_every_activation(pool):
    """The sine is a library function that reduces its argument in 32 bytes of stack."""
    for name, (found,) in pool.map(activation_job, ACTIVATIONS, chunksize=2):
        assert found["stack"] == (32 if name == "sin" else 0), f"{name}: {found}"
        assert (found["tanh"] > 0) == (name in ("silu", "gelu_tanh", "tanh")), f"{name}: {found}"


# Widths and row strides that 16 does not divide.

CHOOSE_TILE = planner.choose_tile  # which `forward` replaces
WIDTHS = (168, 200, 339, 466, 1000, 1004)
STRIDED = (  # and by 8 bytes; sm, family, dtype, rows, width, elements to the next row
    (90, "wide", BF16, 65536, 1024, 1032),
    (90, "wide", BF16, 65536, 1000, 1004),
    (80, "wide", F32, 65536, 1000, 1001),
    (90, "tile", BF16, 65536, 1000, 1001),
    (80, "rows", F16, 65536, 168, 170),
    (80, "algebraic", BF16, 65536, 1000, 1001),
    (90, "columns", BF16, 512, 1024, 1026),
    (80, "prebatch", F32, 65536, 1024, 1026),
    (90, "rows", F16, 65536, 236, None),
    (80, "rows", F16, 65536, 236, None),
)


def width_cases():
    """(sm, family, dtype, rows, width, stride): each family in each width and dtype, on one of both
    architectures, and all of them in each width on both.
    """
    for i, family in enumerate(RECIPES):
        widths = [n for n in WIDTHS if {"rows": n <= 256, "wide": n > 256}.get(family, True)]
        dtypes = (BF16, F16, F32)[: 2 if family == "algebraic" else 3]
        for j, width in enumerate(widths):
            rows = 65536 if family != "columns" else 256 if width % 2 else 512
            for k, dtype in enumerate(dtypes):
                yield (90, 80)[(i + j + k) % 2], family, dtype, rows, width, None
    yield from STRIDED


BACKWARD_WIDTHS = (  # family, dtype, rows, width, elements from row to row, architectures
    ("rows", BF16, 2048, 200, None, (90,)),  # dz and dx in one launch
    ("prologue", BF16, 65536, 1004, None, (90,)),
    ("prologue", F16, 65536, 1004, None, (80,)),
    ("prologue", F16, 65536, 466, None, (80,)),
    ("prologue", BF16, 65536, 1024, 1032, (90,)),
    ("prologue", BF16, 65536, 1000, 1001, (90,)),
    ("prebatch", F16, 65536, 339, None, (90,)),
)


def of_width(direction, family, dtype, M, width, stride):
    """Launches a family as the planner cuts it."""
    planner.APART_FROM = NEVER
    planner.choose_tile, planner.plan_whole = CHOOSE_TILE, PLAN_WHOLE
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    order, _, norm = RECIPES[family]
    spec = make_spec(order, norm, "silu", training=True)
    assert planner.family_of(spec, dtype.itemsize, M, width) == family
    getattr(aot, direction)(spec, dtype, M, width, width, stride)


def width_job(job):
    sm, *rest = job
    return job, compiled(sm, of_width, *rest)


def test_widths_and_strides(pool):
    """Copies run ahead, and products are stored by as many bytes as rows allow."""
    told, count = [], 0
    jobs = [(sm, "forward", *case) for sm, *case in width_cases()]
    assert len(jobs) > 100
    jobs += [
        (sm, "backward", *case) for *case, architectures in BACKWARD_WIDTHS for sm in architectures
    ]
    for job, kernels in pool.map(width_job, jobs):
        sm, direction, family, dtype, _, width, stride = job
        at_once = min(16, dtype.itemsize * math.gcd(16, width, stride or 0))
        for found in kernels:
            count += 1
            multiplies = direction == "forward" or "product" in found["kernel"]
            large = family != "columns" and dtype != F32 and at_once >= 8
            what = wrong(sm, found, multiplies and large)
            if multiplies and at_once >= 4 and not found["async_copies"]:
                what += ", loads without a pipeline"
            if multiplies and max(found["stores"]) < 8 * at_once:
                what += ", stores by fewer bytes than it could"
            if what:
                told.append(f"{job} {what}: {found}")
    assert not told, "\n".join(told)
    assert count == len(jobs) + 2 * (len(BACKWARD_WIDTHS) - 1)


@pytest.mark.parametrize("sm", aot.SMALL)
def test_gpus_of_little_shared_memory(sm, pool):
    """They take the tiles of sm_80, with as many stages as there is room for."""
    assert aot.device(sm).shared < SHARED[80]
    sizes = 512 if sm == 120 else 1024, None
    jobs = [
        (sm, "forward", family, BF16, 512 if family == "columns" else 65536, *sizes)
        for family in RECIPES
        if family != "rows" and (sm == 120 or family in ("tile", "wide", "batch"))
    ]
    jobs += [(sm, "forward", "rows", BF16, 65536, n, None) for n in (128, 256)]
    jobs += [(sm, "backward", family, BF16, 65536, *sizes) for family in ("wide", "prologue")]
    told = []
    for job, kernels in pool.map(width_job, jobs):
        for found in kernels:
            what = wrong(sm, found, False)
            if not found["async_copies"]:
                what += ", loads without a pipeline"
            if what:
                told.append(f"{job} {what}: {found}")
    assert not told, "\n".join(told)


# Stages before `linear` in a launch of their own.

APART = (  # order, norm, masks, dtype, rows, width, elements from row to row, architectures
    ("norm-act-linear-add", "layer", False, BF16, 65536, 1000, None, (80, 90)),
    ("norm-linear-act-add", "rms", False, F16, 65536, 1004, None, (90,)),
    ("norm-linear-act-add", "layer", False, F32, 65536, 466, None, (80, 90)),
    ("act-linear-norm-add", "layer", False, BF16, 65536, 1024, 1032, (90,)),
    ("norm-act-gate-dropout-droppath-linear-add", "layer", True, BF16, 4096, 4096, None, (80, 90)),
    ("norm-act-gate-dropout-droppath-linear-add", "layer", True, F32, 4096, 1024, None, (90,)),
)


def apart(order, norm, random, dtype, M, width, stride):
    """Launches forward and backward as the planner cuts them."""
    planner.choose_tile, planner.APART_FROM = CHOOSE_TILE, APART_FROM
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    spec = make_spec(order, norm, "gelu", training=True, **(EVERYTHING if random else {}))
    for direction in (aot.forward, aot.backward):
        direction(spec, dtype, M, width, width, stride)


def apart_job(job):
    sm, *rest = job
    return job, compiled(sm, apart, *rest)


def test_stages_before_the_product_in_a_launch_of_their_own(pool):
    told = []
    jobs = [(sm, *case) for *case, architectures in APART for sm in architectures]
    for job, kernels in pool.map(apart_job, jobs):
        names = [found["kernel"] for found in kernels]
        assert names[0] == names[-2] == "residual_prologue_kernel", names
        assert "forward" in names[1] and 4 <= len(names) <= 5, names
        for found in kernels:
            product = "forward" in found["kernel"]
            what = wrong(job[0], found, product)
            if not found["async_copies"] and "wide" not in found["kernel"]:
                what += ", loads without a pipeline"
            if what:
                told.append(f"{job} {what}: {found}")
    assert not told, "\n".join(told)


# The measures themselves must be able to tell.


def test_a_spill_is_seen(pool):
    job = (90, BF16, "ieee", "tile", planner.Tile(128, 128, 64, 4, 3), True, "silu")
    _, (found,) = pool.submit(forward_job, job).result()
    assert found["stack"] > 0


@triton.jit
def register_operand_kernel(x_ptr, weight_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = relu(x) @ weight, with relu(x) in registers"""
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(tl.where(x < 0, 0.0, x).to(tl.bfloat16), tl.load(weight_ptr + at)))


def register_operand_job():
    x, y = (torch.empty(64, 64, dtype=dtype, device="meta") for dtype in (BF16, F32))
    grid = register_operand_kernel[(1,)]
    return compiled(90, lambda: grid(x, x, y, BLOCK=64, num_warps=4))


def test_an_operand_in_registers_and_a_short_offset_are_seen(pool):
    (found,) = pool.submit(register_operand_job).result()
    assert found["wgmma"] > 0 and found["register_a"] > 0 and found["offsets"] == ["i32"]
