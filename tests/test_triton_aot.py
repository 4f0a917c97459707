"""Every shipped tile compiled without a GPU: no spills, little shared memory, wgmma on Hopper."""

import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fusedres.backends import triton as backend  # noqa: E402
from fusedres.kernels.backward import residual_backward_kernel  # noqa: E402
from fusedres.kernels.epilogue import ACTIVATIONS, NORMS  # noqa: E402
from fusedres.kernels.forward import residual_forward_kernel  # noqa: E402
from fusedres.spec import make_spec  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # bytes a block, by compute capability
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
EPILOGUES = ("silu", "relu", "gelu", None)  # silu takes the most registers


def compiled(kernel, sm, pointers, constants, num_warps=8, num_stages=3):
    """The kernel for `pointers` (name -> element type), everything a multiple of 16."""

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in pointers:
            return f"*{pointers[name]}"
        return "fp32" if name in ("eps", "residual_scale") else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = [i for i, (name, t) in enumerate(signature.items()) if t[0] in "*i" and name != "M"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def properties(binary):
    """What a compiled kernel needs and contains."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = binary.asm["ptx"]
    return {
        "stack": sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "register_a": len(re.findall(r"wgmma\.mma_async[^;]*?\}\s*,\s*\{", ptx)),
        "async_copies": ptx.count("cp.async.c"),
    }


def forward(sm, dtype, precision, norm, activation, tile):
    names = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "z_ptr", "y_ptr")
    pointers = dict.fromkeys(names, TYPES[dtype])
    pointers |= {"norm_weight_ptr": "fp32", "norm_bias_ptr": "fp32"}
    constants = {
        "NORM": NORMS[norm][0], "ACT": ACTIVATIONS[activation][0], "PRECISION": precision,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "stride_xk": 1, "stride_wk": 1, "stride_rn": 1,
    }  # fmt: skip
    if norm is None:
        constants |= {"norm_weight_ptr": None, "norm_bias_ptr": None}
    return compiled(
        residual_forward_kernel, sm, pointers, constants, tile.num_warps, tile.num_stages
    )


def backward(sm, dtype, norm, activation, block_n):
    names = ("dy_ptr", "z_ptr", "dz_ptr", "dresidual_ptr", "dbias_ptr")
    vectors = ("norm_weight_ptr", "norm_bias_ptr", "dnorm_weight_ptr", "dnorm_bias_ptr")
    pointers = dict.fromkeys(names, TYPES[dtype])
    pointers |= dict.fromkeys((*vectors, "partial_ptr"), "fp32") | {"arrived_ptr": "i32"}
    norm_function, norm_grad = NORMS[norm]
    constants = {
        "NORM": norm_function, "NORM_GRAD": norm_grad, "ACT_GRAD": ACTIVATIONS[activation][1],
        "BLOCK_M": backend.BACKWARD_TILE // block_n, "BLOCK_N": block_n, "stride_dyn": 1,
    }  # fmt: skip
    if norm is None:
        constants |= dict.fromkeys(vectors)
    return compiled(residual_backward_kernel, sm, pointers, constants, backend.BACKWARD_WARPS)


def forward_properties(job):
    return job, properties(forward(*job))


def backward_properties(job):
    return job, properties(backward(*job))


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor


def shipped(norm, dtype):
    """Every forward tile that plan() can choose."""
    sizes = itertools.product((1, 10**6), backend.TILES)
    return sorted({backend.plan(make_spec(norm=norm), dtype, M, N, 64) for M, N in sizes})


def forward_jobs(sm):
    """Every tile, norm and precision on Hopper, with silu and another epilogue; less elsewhere."""
    bf16, fp32 = TYPES
    cases = [
        (dtype, precision, norm, tile)
        for dtype, precision in ((bf16, "ieee"), (fp32, "ieee"), (fp32, "tf32"))
        for norm in (("layer", "rms", None) if sm == 90 else ("layer", None))
        for tile in shipped(norm, dtype)
    ]
    for i, (dtype, precision, norm, tile) in enumerate(cases):
        for activation in {"silu", EPILOGUES[i % 4]} if sm == 90 else {EPILOGUES[i % 4]}:
            yield sm, dtype, precision, norm, activation, tile


@pytest.mark.parametrize("sm", SHARED_LIMIT)
def test_forward(sm, pool):
    for job, found in pool.map(forward_properties, forward_jobs(sm), chunksize=4):
        _, dtype, precision, _, _, tile = job
        assert found["stack"] == 0, f"{job} spills: {found}"
        assert found["shared"] <= min(SHARED_LIMIT[sm], backend.SHARED_MEMORY), f"{job}: {found}"
        assert found["async_copies"] > 0, f"{job} loads without a pipeline: {found}"
        assert found["register_a"] == 0, f"{job}: wgmma with A in registers is miscompiled"
        if sm == 90 and tile.BLOCK_M >= 64 and (dtype != torch.float32 or precision == "tf32"):
            assert found["wgmma"] > 0, f"{job} does not use wgmma: {found}"


@pytest.mark.parametrize("sm", SHARED_LIMIT)
def test_backward(sm, pool):
    jobs = [
        (sm, dtype, norm, EPILOGUES[i % 4], block_n)
        for dtype in TYPES
        for norm in (("layer", "rms", None) if sm == 90 else ("layer",))
        for i, block_n in enumerate(backend.TILES)
        if norm or block_n <= backend.WIDEST_TILE
    ]
    for job, found in pool.map(backward_properties, jobs, chunksize=4):
        assert found["stack"] == 0, f"{job} spills: {found}"
        assert found["shared"] <= 48 << 10, f"{job}: {found}"


# The measures themselves must be able to tell.


def test_a_spill_is_seen():
    tile = backend.Tile(64, 512, 64, 8, 3)
    assert properties(forward(90, torch.bfloat16, "ieee", "layer", "silu", tile))["stack"] > 0


@triton.jit
def register_operand_kernel(x_ptr, weight_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = relu(x) @ weight, with relu(x) in registers"""
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(tl.where(x < 0, 0.0, x).to(tl.bfloat16), tl.load(weight_ptr + at)))


def test_an_operand_in_registers_is_seen():
    pointers = {"x_ptr": "bf16", "weight_ptr": "bf16", "y_ptr": "fp32"}
    found = properties(compiled(register_operand_kernel, 90, pointers, {"BLOCK": 64}, num_warps=4))
    assert found["wgmma"] > 0 and found["register_a"] > 0
