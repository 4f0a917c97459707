"""The planner of the Triton backend: from a recipe and sizes to a kernel family, a tile, a grid.

    family       what it is                                            statistics of the norm
    "tile"       a tile a program, no norm or given statistics         given
    "rows"       whole rows of z in one program, N <= 256              rows
    "wide"       the last tile of a row block finishes it              rows, merged
    "columns"    whole columns of z in one program, M <= 512           columns
    "batch"      programs meet between statistics and finish           columns, merged
    "prologue"   stages before `linear` act on the tile of x           given, or rows of x
    "algebraic"  norm straight before `linear`, 16-bit types           rows of x, algebraic
    "prebatch"   batch norm before `linear`: programs meet             columns of x, merged

Where every column tile would compute the stages before `linear` again, they are a launch of their
own, see `is_apart`, and the family is that of a layer without them.

Tiles come from kernels/configs/*.json: generic.json, then what an architecture's or a device's file
says otherwise; `python -m fusedres tune` writes the last. A size that nobody tuned gets the largest
tile whose grid fills the device.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..spec import Spec

CONFIGS = Path(__file__).parent.parent / "kernels" / "configs"
WIDEST_ROW = 256  # whole rows of z in one program: beyond, every row block reads all of the weight
TALLEST_COLUMN = 512  # rows of a batch that one program takes, half of it element by element
MOST_COLUMNS = 1 << 20
BACKWARD_TILE = 2048  # elements of a tile of the backward kernels
BACKWARD_ROW = 2048  # the widest norm over rows whose backward takes a row at once
BACKWARD_PLAIN_ROW = 4096  # the same where masks, a gate, narrow moves and casts take no registers
BACKWARD_WARPS = 8
BACKWARD_SHARED = 128 << 10  # bytes of three stages with four tensors in fp32, at most
BACKWARD_WIDTH = 128  # columns of one where nothing needs whole rows
BACKWARD_PROGRAMS = 512  # a constant, so that sums do not depend on the GPU
MOST_WALKERS = 256
WIDEST_PRODUCT = 512  # features of z for dz and dx in one launch
REREADS = 5.6  # of the weight in L2 while memory moves what `plan_whole` says
# Up to this K two programs with tiles of 128 columns, one's finish beside the other's product, beat
# one of 256 that has a multiprocessor to itself, by `python -m bench gpu-model`: not measured.
SHALLOW = 2048
APART_FROM = 256  # features of z: up to there stages before `linear` are part of the product
APART_SAVES, APART_COSTS = 0.5, 1.75  # ps an element of x, see `is_apart`
LIBRARY = 1 << 27  # M N K from which true fp32 wants the library's products, as in "auto": a guess
PASS_TILE = 4096  # elements of a tile of a pass over rows, forward
MOST_MOVES = 15  # of a thread for one step of a product: more, and 128 x 128 spills
MOST_SINGLE = 4096  # elements of a tile that are moved one by one, in 16-bit types
MOST_SPLITS = 32  # parts of the rows in the product dz.T @ x

FAMILIES = {  # family -> (kernel, what it takes statistics over)
    "tile": ("residual_forward_kernel", "given"),
    "rows": ("residual_forward_kernel", "rows"),
    "wide": ("residual_forward_wide_kernel", ""),
    "columns": ("residual_forward_kernel", "columns"),
    "batch": ("residual_forward_batch_kernel", ""),
    "prologue": ("residual_forward_kernel", "given"),
    "algebraic": ("residual_forward_kernel", "rows of x, algebraic"),
    "prebatch": ("residual_forward_prebatch_kernel", ""),
}
FULL = 0.9  # of a device's multiprocessors: 128 programs fill 132
NARROW = 8  # bytes moved at once: with fewer, tiles are smaller
COOPERATIVE = ("batch", "prebatch")
COLLECTIVES = 32  # multiprocessors that NCCL's programs may hold


class Device(NamedTuple):
    """What the planner knows of a GPU."""

    name: str
    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that a block may have
    architecture: str = "sm_90"
    shared_with_collectives: bool = False

    @property
    def resident(self) -> int:
        """How many programs may wait for each other, one a multiprocessor. They start only when all
        can: beside NCCL they would wait for a collective, which may in turn wait for them.
        """
        spared = min(COLLECTIVES, self.processors // 2) if self.shared_with_collectives else 0
        return self.processors - spared


UNKNOWN = Device("any", 132, 227 << 10)  # an H100 or H200


def registers(num_warps: int) -> int:
    """For each thread, if one program has all of a multiprocessor's."""
    return min(255, 65536 // (32 * num_warps))


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread, if not by the rule of `options`

    def options(self, size: int) -> dict[str, int]:
        """As a kernel's keyword arguments, for elements of `size` bytes.

        16-bit kernels are told that they may take every register, or ptxas spills one for room for
        another program. fp32 kernels are not: ptxas would take them all for copies of their
        operands, and spill.
        """
        most = registers(self.num_warps) if size == 2 else None
        found = {**self._asdict(), "maxnreg": self.maxnreg or most}
        return {name: value for name, value in found.items() if value is not None}

    def shared(self, size: int, mixed: bool = False) -> int:
        """Bytes of shared memory of its pipeline for elements of `size` bytes, at most. `mixed`: x
        may be float32.
        """
        row = self.BLOCK_M * (4 if mixed else size) + self.BLOCK_N * size
        return self.num_stages * self.BLOCK_K * row

    def narrowed(self, width: int, size: int) -> Tile:
        """For elements of `size` bytes that are moved `width` bytes at once: with more warps, and
        fewer columns of the operands in a step, where addresses would not leave enough registers.
        """
        if width >= 16:
            return self
        if width >= NARROW:
            most = 16 if self.BLOCK_N == WIDEST_ROW else 8
            warps = max(self.num_warps, min(most, self.BLOCK_M * self.BLOCK_N // 1024))
            return self._replace(num_warps=warps, maxnreg=None if size == 2 else self.maxnreg)
        threads = self.BLOCK_M * self.BLOCK_N // (16 if width == 2 else 64)
        tile = self._replace(num_warps=max(self.num_warps, threads // 32))
        step = MOST_MOVES * 32 * tile.num_warps * width // (size * (self.BLOCK_M + self.BLOCK_N))
        return tile._replace(BLOCK_K=min(self.BLOCK_K, max(16, 1 << step.bit_length() - 1)))

    def grid(self, M: int, N: int) -> int:
        return ceil_div(M, self.BLOCK_M) * ceil_div(N, self.BLOCK_N)


class Plan(NamedTuple):
    """The forward launch of the product."""

    family: str
    kernel: str
    over: str
    tile: Tile
    programs: int
    walkers: int  # programs that share a column tile, where programs meet
    shared: int  # bytes
    waves: float  # programs for each multiprocessor
    apart: bool  # after a launch for the stages before `linear`

    @property
    def cooperative(self) -> bool:
        return self.family in COOPERATIVE


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def moved_at_once(N: int, K: int, size: int, align: int = 16) -> int:
    """Bytes, of rows of N and of K elements of `size` bytes: a power of two. `align` divides what
    lies from row to row, if not all are contiguous.
    """
    return min(16, size * math.gcd(16, N, K, align))


def device_of(device: torch.device) -> Device:
    """What there is to know of `device`; for one that is not here, UNKNOWN."""
    return _device_of(device, dist.is_available() and dist.is_initialized())


@cache
def _device_of(device: torch.device, distributed: bool) -> Device:
    if device.type != "cuda" or not torch.cuda.is_available():
        return UNKNOWN
    found: Any = torch.cuda.get_device_properties(device)
    architecture = f"sm_{found.major}{found.minor}"
    shared = found.shared_memory_per_block_optin
    return Device(found.name, found.multi_processor_count, shared, architecture, distributed)


def config_file(name: str) -> Path:
    return CONFIGS / f"{name.replace(' ', '-').replace('/', '-')}.json"


@cache
def config(name: str, architecture: str) -> dict[str, Any]:
    """The tables "tiles", "tuned" and "auto" for a device: its own file's lines before its
    architecture's, those before its kin's and those before generic.json's.
    """
    found: dict[str, Any] = {"tiles": {}, "tuned": {}, "auto": {}}
    kin = ["sm_80"] * architecture.startswith(("sm_8", "sm_12"))  # without wgmma, too
    for path in map(config_file, dict.fromkeys(("generic", *kin, architecture, name))):
        if path.exists():
            read = json.loads(path.read_text())
            for table, lines in found.items():
                for key, value in read.get(table, {}).items():
                    merged = isinstance(value, dict) and key in lines
                    lines[key] = {**lines[key], **value} if merged else value
    return found


def limits_of_auto(device: torch.device) -> dict[str, Any]:
    """Up to how many "rows", "features" and, in true fp32, products of numbers the CUDA C++ kernels
    go before others; "rows by size": measured ones by `size_key`.
    """
    found = device_of(device)
    return config(found.name, found.architecture)["auto"]


def size_key(size: int, N: int, K: int) -> str:
    """What measured limits of rows are filed under: bits of an element, and the sizes of weight
    rounded up to a power of two.
    """
    return f"{8 * size} {power_of_two(N)}x{power_of_two(K)}"


def is_apart(spec: Spec, M: int, N: int, K: int, backward: bool = False) -> bool:
    """Whether stages before `linear` are a launch of their own, which writes what is multiplied.

    By the model of bench/compiled/cost.py, not measured: every 128 columns of z cost an element of
    x APART_SAVES ps more than in the bare product, to write and to read what the launch makes costs
    it APART_COSTS ps, and the launch 2 us; of a small product, which fills no device, an element
    costs more, hence 0.5. Batch norm has the statistics of all rows only in backward.
    """
    unknown = "norm" in spec.prologue and spec.batch_stats and not backward
    if not spec.prologue or unknown or N <= APART_FROM:
        return False
    return M * K * (APART_SAVES * N / 128 - APART_COSTS) > 0.5e6


def family_of(spec: Spec, size: int, M: int, N: int, K: int = 0, align: int = 16) -> str:
    """The first row of the table above that fits elements of `size` bytes; `align` as in
    `moved_at_once`.
    """
    rows = spec.norm in ("layer", "rms")
    if "norm" in spec.epilogue and rows:
        return "rows" if N <= WIDEST_ROW else "wide"
    if "norm" in spec.epilogue and spec.batch_stats:
        singly = moved_at_once(N, K, size, align) == size  # addresses take registers
        tallest = TALLEST_COLUMN // 2 if singly else TALLEST_COLUMN
        return "columns" if tallest >= M else "batch"
    if "norm" in spec.prologue and spec.batch_stats:
        return "prebatch"
    if is_apart(spec, M, N, K):
        return "tile"
    if spec.prologue == ("norm",) and rows and size == 2 and spec.x_dtype is None:
        return "algebraic"
    return "prologue" if spec.prologue else "tile"


def key_of(spec: Spec, size: int, M: int, N: int, K: int, align: int = 16) -> str:
    """What tuned tiles are filed under: family, bits, and sizes rounded up to a power of two;
    "narrow" where little is moved at once.
    """
    sizes = "x".join(str(power_of_two(n)) for n in (M, N, K))
    kind = " random" * spec.random + " mixed" * bool(spec.dtypes)
    kind += " narrow" * (moved_at_once(N, K, size, align) < NARROW)
    return f"{family_of(spec, size, M, N, K, align)}{kind} {8 * size} {sizes}"


def tiles_of(
    family: str, random: bool, size: int, device: Device, mixed: bool = False, width: int = 16
) -> list[Tile]:
    """The tiles of a family for elements of `size` bytes, largest first; `random`: for recipes with
    dropout or drop-path, `mixed`: with dtypes beside the product's. Stages are dropped, then
    columns of the operands, to fit the device's shared memory. `width`: bytes moved at once; with
    few, addresses take as many registers as masks do.
    """
    hopper = device.architecture.startswith("sm_9")  # whose products' operands take no registers
    holds_most = family in ("algebraic", "tile" if size == 2 else "wide")
    holds_most |= family == "rows" and size == 2 and not hopper
    random = random or width < (16 if holds_most else NARROW)
    tiles = config(device.name, device.architecture)["tiles"]
    both = [" random mixed"] * (random and mixed)
    kinds = [*both, *[" random"] * random, *[" mixed"] * mixed, ""]
    by_kind = (tiles.get(family + kind, {}).get(str(8 * size)) for kind in kinds)
    found = []
    for row in next(rows for rows in by_kind if rows is not None):
        tile = Tile(*row)
        while tile.shared(size, mixed) > device.shared and tile.num_stages > 1:
            if tile.num_stages > 2 or tile.BLOCK_K <= 16:
                tile = tile._replace(num_stages=tile.num_stages - 1)
            else:  # with one stage nothing would be loaded ahead
                tile = tile._replace(BLOCK_K=tile.BLOCK_K // 2)
        found.append(tile)
    return found


def can_compute(family: str, tile: Tile, M: int, N: int) -> bool:
    """Rows and columns must be whole where a family says so."""
    if family == "rows":
        return power_of_two(N) == tile.BLOCK_N
    return family != "columns" or tile.BLOCK_M >= M


def choose_tile(
    family: str,
    random: bool,
    size: int,
    M: int,
    N: int,
    device: Device,
    mixed: bool = False,
    width: int = 16,
    K: int = MOST_COLUMNS,
) -> Tile:
    """The first tile within the matrix that fills the device, else the one of most programs."""
    tiles = tiles_of(family, random, size, device, mixed, width)
    tiles = [t for t in tiles if can_compute(family, t, M, N)]
    if family == "wide" and (K <= SHALLOW or width < 16):  # narrow loads would spill, too
        tiles = [t for t in tiles if t.BLOCK_N <= 128]
    if width == 2:
        tiles = [t for t in tiles if t.BLOCK_M * t.BLOCK_N <= MOST_SINGLE] or tiles[-1:]
    fitting = [t for t in tiles if power_of_two(N) >= t.BLOCK_N and power_of_two(M) >= t.BLOCK_M]
    fitting = fitting or tiles[-1:]
    full = (t for t in fitting if t.grid(M, N) >= FULL * device.processors)
    return next(full, max(fitting, key=lambda t: (t.grid(M, N), t.BLOCK_M * t.BLOCK_N)))


@lru_cache(maxsize=4096)
def plan(
    spec: Spec,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    device: Device = UNKNOWN,
    tile: Tile | None = None,
    align: int = 16,
) -> Plan:
    """The forward launch for x (M, K) and weight (N, K), with `tile` or the one of the tables;
    `align` as in `moved_at_once`.
    """
    size = dtype.itemsize
    family, apart = family_of(spec, size, M, N, K, align), is_apart(spec, M, N, K)
    kernel, over = FAMILIES[family]
    if family == "prologue" and "norm" in spec.prologue and spec.norm in ("layer", "rms"):
        over = "rows of x"
    if tile is None:
        key = key_of(spec, size, M, N, K, align)
        tuned = config(device.name, device.architecture)["tuned"].get(key)
        tile = Tile(*tuned) if tuned else None
        if tile is None or not can_compute(family, tile, M, N):
            width = moved_at_once(N, K, size, align)
            mixed = bool(spec.dtypes)
            tile = choose_tile(family, spec.random, size, M, N, device, mixed, width, K)
            tile = tile.narrowed(width, size)
    programs, walkers = tile.grid(M, N), 1
    if family in COOPERATIVE:
        columns = ceil_div(N, tile.BLOCK_N) if family == "batch" else ceil_div(K, tile.BLOCK_K)
        walkers = min(max(1, device.resident // max(1, columns)), ceil_div(M, tile.BLOCK_M))
        most = walkers * columns if family == "batch" else max(walkers * columns, programs)
        programs = min(device.resident, most)
    shared = tile.shared(size, bool(spec.dtypes))
    waves = programs / device.processors
    return Plan(family, kernel, over, tile, programs, walkers, shared, waves, apart)


def pass_tile(C: int) -> tuple[int, int]:
    """Rows and columns of a tile of a pass over rows of C elements, forward."""
    width = min(power_of_two(C), 1024)
    return max(1, PASS_TILE // width), width


class BackwardPlan(NamedTuple):
    """One launch of a row-major backward kernel on (M, C)."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    tiles: int
    walkers: int
    wide: bool  # a norm over rows that go through in several tiles
    stages: int  # of its loop over rows, if not wide

    def options(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        sizes = {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "num_warps": self.num_warps}
        return sizes | {"maxnreg": registers(self.num_warps)}


def plan_backward(
    M: int, C: int, over: str | None, device: Device = UNKNOWN, plain: bool = False
) -> BackwardPlan:
    """`over`: "rows" for a norm over whole rows, "columns" for one over this batch, else None.
    `plain`: no masks, gate or casts, and 16 bytes moved at once.
    """
    width = power_of_two(C)
    widest = BACKWARD_PLAIN_ROW if plain else BACKWARD_ROW
    wide = over == "rows" and widest < C
    if wide:
        width = 512
    elif over == "columns":
        width = min(width, 64)
        while ceil_div(C, width) > device.resident:
            width *= 2
    elif over is None:
        width = min(width, BACKWARD_WIDTH)
    height = max(1, BACKWARD_TILE // width)
    tiles, blocks = ceil_div(C, width), ceil_div(M, height)
    programs = device.resident if over == "columns" else BACKWARD_PROGRAMS
    walkers = max(1, min(blocks, programs // (1 if wide else tiles), MOST_WALKERS))
    large = over == "rows" and width > BACKWARD_TILE
    warps = 2 * BACKWARD_WARPS if large else BACKWARD_WARPS
    stages = 2 if large or device.shared < BACKWARD_SHARED else 3
    return BackwardPlan(height, width, warps, tiles, walkers, wide, stages)


class WholePlan(NamedTuple):
    """One launch of the backward kernel that makes dz and dx of whole rows."""

    tile: Tile
    walkers: int


@lru_cache(maxsize=4096)
def plan_whole(
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    random: bool,
    device: Device = UNKNOWN,
    align: int = 16,
) -> WholePlan | None:
    """dz (M, N) and dx (M, K) in one launch; `random`: masks after `linear`. None where two
    launches are better: each row block reads all of the weight.

    By arithmetic: a launch saved pays for that where one wave of programs is enough. Beyond, the
    4 M N elements that go to and from memory must hide it; L2 gives about 2.4 times what memory
    does, so K / BLOCK_M + 4 <= 2.4 * 4.
    """
    size, width = dtype.itemsize, moved_at_once(N, K, dtype.itemsize, align)
    tiles = tiles_of("whole", random, size, device, width=width)
    tile = next((t for t in tiles if power_of_two(N) == t.BLOCK_N), None)
    if tile is None or N > WIDEST_PRODUCT or width == 2:
        return None
    blocks = ceil_div(M, tile.BLOCK_M)
    if blocks > device.processors and K > REREADS * tile.BLOCK_M:
        return None
    return WholePlan(tile.narrowed(width, size), max(1, min(blocks, MOST_WALKERS)))


class ProductsPlan(NamedTuple):
    """One launch of both products of the backward pass."""

    BLOCK: int
    BLOCK_R: int
    options: dict[str, int]  # num_warps, num_stages, ...
    splits: int  # of dweight's sum over the rows
    rows: int  # of each
    programs: int


def plan_products(
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    dx: bool,
    random: bool,
    device: Device = UNKNOWN,
    mixed: bool = False,
    align: int = 16,
) -> ProductsPlan:
    """dweight (N, K) and, if `dx`, dx (M, K); `random`: masks before `linear`; `mixed`: as
    in `tiles_of`.
    """
    size, width = dtype.itemsize, moved_at_once(N, K, dtype.itemsize, align)
    tiles = tiles_of("products", random, size, device, mixed, width)
    fitting = [t for t in tiles if power_of_two(min(N, K)) >= t.BLOCK_M] or tiles[-1:]
    full = (t for t in fitting if t.grid(M, K) >= FULL * device.processors)
    tile = next(full, fitting[-1]).narrowed(width, size)
    if width == NARROW:  # 64 x 64 by 4 warps spills in fp16
        tile = tile._replace(num_warps=max(tile.num_warps, min(8, tile.BLOCK_M**2 // 512)))
    block, step = tile.BLOCK_M, tile.BLOCK_K
    of_weight = tile.grid(N, K)
    wanted = min(ceil_div(2 * device.processors, of_weight), MOST_SPLITS, ceil_div(M, 4 * step))
    rows = ceil_div(ceil_div(M, max(1, wanted)), step) * step
    splits = max(1, ceil_div(M, rows)) if rows else 1
    programs = of_weight * splits + dx * tile.grid(M, K)
    options = {k: v for k, v in tile.options(size).items() if not k.startswith("BLOCK")}
    return ProductsPlan(block, step, options, splits, rows, programs)
