"""The chain's kernels compiled without a GPU, as test_triton_aot.py does it for layers."""

from dataclasses import replace

import pytest
import torch

from bench.compiled import aot
from bench.compiled.aot import SHARED, compiled
from fusedres.backends import CHAIN_WIDTHS
from fusedres.spec import make_spec
from fusedres.wiring import line_of
from test_triton_aot import BF16, F32, pytestmark  # noqa: F401
from test_triton_aot import pool as pool  # a fixture

from fusedres.backends import chain as backend  # isort: skip


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    dtype, M, N, order="note", block=1, activation="silu", depth=100, x_dtype=None, gate=None
):
    """What a training step of a chain launches, and its backward that computes z again, or, of 32
    features, one that does not sum up everything; under autocast x is of another dtype.
    """
    last = make_spec(order, "layer", activation, gate)
    order = "-".join(stage for stage in last.stages if stage not in ("add", "gate"))
    inner = make_spec(order, "layer", activation)
    if x_dtype is not None:
        name = str(x_dtype).removeprefix("torch.")
        last, inner = (replace(spec, x_dtype=name, y_dtype=name) for spec in (last, inner))
    lines = [line_of(0b111, 0, inner.text)] * (block - 1)
    links = "\n".join([*lines, line_of(0b1111 if gate else 0b111, block - 1, last.text)])
    x, vector = empty(M, N, dtype=x_dtype or dtype), empty(depth, N, dtype=F32)
    operands = [empty(depth, N, N, dtype=dtype), vector.to(dtype), vector, vector]
    if gate:
        operands.append(empty(depth // block, N if gate == "channel" else 1, dtype=F32))
    wanted = "1" * (1 + len(operands))
    y, *saved = backend.chain_forward(x, operands, links, depth, 1)
    backend.chain_backward(y, saved, x, operands, links, depth, wanted)
    if N > 32:
        backend.chain_backward(y, saved[:1], x, operands, links, depth, wanted)
    else:
        backend.chain_backward(y, saved, x, operands, links, depth, wanted[:-1] + "0")


def job(arguments):
    return arguments, compiled(arguments[0], launch, *arguments[1:])


RECIPES = (("note", 4, "gelu"), ("prenorm", 2, "silu"), ("postnorm", 2, "gelu"))
SPILLED = 256  # bytes, of a walk back through 256 features: the weight fills the registers
KERNELS = [f"residual_chain_{name}_kernel" for name in ("forward", "backward", "sums")]


@pytest.mark.parametrize("sm", SHARED)
def test_every_tile(sm, pool):
    """Few rows and many; each width with one of the recipes that take the most registers."""
    sizes = [(BF16, M, N) for N in CHAIN_WIDTHS for M in (512, 65536) if N < 256 or M == 512]
    sizes = [(F32, 512, 64), *sizes[2 : 9 - (sm == 80)]]  # 16 features have 32's tiles
    jobs = [(sm, *size, *RECIPES[(i + sm) % 3]) for i, size in enumerate(sizes)]
    jobs += [(sm, BF16, 65536, 128, *recipe, 100, F32) for recipe in RECIPES[:2]]  # autocast
    jobs += [(sm, BF16, 65536, 128, *recipe, 100, None, "channel") for recipe in RECIPES[1:]]
    told = []
    for arguments, found in pool.map(job, jobs):
        _, dtype, M, N, order, *more = arguments
        crowded = [F32 in more and order == "prenorm"] * 2  # forward, backward
        crowded[1] |= "channel" in more
        tiles = [
            backend.tile_of(dtype, M, N, aot.device(sm), back, crowded[back])
            for back in (False, True)
        ]
        assert [kernel["kernel"] for kernel in found] == KERNELS + KERNELS[1:]
        for kernel in found:
            forward = "forward" in kernel["kernel"]
            tile = tiles[not forward]
            large = forward and tile.BLOCK_M >= 64
            walks = "sums" not in kernel["kernel"]
            allowed = SPILLED if N == 256 and "backward" in kernel["kernel"] else 0
            wrong = {
                "spills": kernel["stack"] > allowed,
                "takes too much shared memory": kernel["shared"] > SHARED[sm],
                "takes A from registers, which is miscompiled": kernel["register_a"] > 0,
                "does not use wgmma": sm == 90 and large and not kernel["wgmma"],
                "waits for its weights": walks and tile.STAGES > 1 and not kernel["async_copies"],
            }
            what = [name for name, is_so in wrong.items() if is_so]
            told += [f"{arguments} {', '.join(what)}: {kernel}"] * bool(what)
    assert not told, "\n".join(told)


def codes(*depths):
    """What is compiled for chains of these depths."""

    def look(binary):
        return {"cubin": binary.asm["cubin"]}

    case = BF16, 512, 64, *RECIPES[1]
    found = [compiled(90, launch, *case, depth, look=look) for depth in depths]
    return [[kernel["cubin"] for kernel in kernels] for kernels in found]


def test_depth_changes_no_code(pool):
    first, *others = pool.submit(codes, 4, 8, 1000).result()
    assert first and all(other == first for other in others)
