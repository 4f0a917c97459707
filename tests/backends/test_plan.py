"""The planner as plain Python: families, tiles that can compute what they must, grids, files."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fusedres.backends import plan as planner
from fusedres.backends.plan import Device, Tile
from fusedres.spec import ORDERS, make_spec

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
NORMS = ((None, False), ("layer", False), ("rms", False), ("batch", False), ("batch", True))
ROWS = (1, 17, 100, 513, 10**6)
WIDE = (1000, 1024, 4096, 10**5, 2**20)
MANY = 2**31 - 1
DEVICES = (
    Device("any", 132, 227 << 10, "sm_90"),
    Device("any", 108, 163 << 10, "sm_80"),
    Device("any", 84, 99 << 10, "sm_89"),
    Device("any", 148, 227 << 10, "sm_100"),
    Device("any", 132, 227 << 10, "sm_90", True),
)
FAMILIES = {  # order, norm, dtype and M, N that lead there
    "tile": ("note", None, F16, 4096, 512),
    "rows": ("note", "layer", F16, 4096, 128),
    "wide": ("note", "layer", F16, 4096, 512),
    "columns": ("note", "batch", F16, 512, 512),
    "batch": ("note", "batch", F16, 4096, 512),
    "prologue": ("preact", "layer", F16, 4096, 512),
    "algebraic": ("prenorm", "layer", F16, 4096, 512),
    "prebatch": ("preact", "batch", F16, 4096, 512),
}


APART_FROM = planner.APART_FROM


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No plan made with another test's files; stages before `linear` are part of the product."""
    monkeypatch.setattr(planner, "APART_FROM", MANY)
    planner.config.cache_clear()
    planner.plan.cache_clear()
    yield
    planner.config.cache_clear()
    planner.plan.cache_clear()


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """Writes files of tiles into a folder of their own, beside a copy of generic.json."""
    generic = (planner.CONFIGS / "generic.json").read_text()
    monkeypatch.setattr(planner, "CONFIGS", tmp_path)
    (tmp_path / "generic.json").write_text(generic)

    def write(name, **tables):
        planner.config_file(name).write_text(json.dumps(tables))
        planner.config.cache_clear()
        planner.plan.cache_clear()

    return write


def spec_of(order, norm, training=True, **settings):
    return make_spec(order, norm, "gelu", training=training, **settings)


def uncached(*args, **kwargs):
    return planner.plan.__wrapped__(*args, **kwargs)


def of_family(family, M=None, N=None, K=384, device=planner.UNKNOWN, **settings):
    order, norm, dtype, rows, columns = FAMILIES[family]
    rows, columns = rows if M is None else M, columns if N is None else N
    chosen = uncached(spec_of(order, norm, **settings), dtype, rows, columns, K, device)
    assert chosen.family == family
    return chosen


def specs():
    """Every order and norm, plain and with masks; alike ones once."""
    found = {}
    for order, (norm, training), dropout in itertools.product(
        (*ORDERS, "act-linear-norm-add", "add-norm-act-linear", "linear"), NORMS, (0.0, 0.1)
    ):
        spec = spec_of(order, norm, training or dropout > 0, dropout=dropout)
        found[spec] = None
    return list(found)


# Families


@pytest.mark.parametrize(
    "order, norm, training, dtype, M, N, family, over",
    [
        ("note", None, True, F32, 64, 64, "tile", "given"),
        ("linear", "layer", True, BF16, 64, 4096, "tile", "given"),
        ("note", "batch", False, F16, 64, 64, "tile", "given"),
        ("note", "layer", True, F32, 64, 256, "rows", "rows"),
        ("note", "rms", True, F16, 64, 1, "rows", "rows"),
        ("postnorm", "layer", True, BF16, 10**6, 256, "rows", "rows"),
        ("act-linear-norm-add", "layer", True, F32, 64, 256, "rows", "rows"),
        ("note", "layer", True, F32, 64, 257, "wide", ""),
        ("bert-output", "rms", True, BF16, 1, 10**5, "wide", ""),
        ("note", "batch", True, F32, 512, 300, "columns", "columns"),
        ("branch-norm", "batch", True, BF16, 1, 4096, "columns", "columns"),
        ("note", "batch", True, F32, 513, 300, "batch", ""),
        ("note", "batch", True, F32, 256, 339, "columns", "columns"),
        ("note", "batch", True, F32, 257, 339, "batch", ""),  # moved one by one
        ("note", "batch", True, F16, 257, 339, "batch", ""),
        ("note", "batch", True, F32, 512, 338, "columns", "columns"),
        ("postnorm", "batch", True, F16, 10**6, 16, "batch", ""),
        ("preact", "layer", True, F32, 64, 64, "prologue", "rows of x"),
        ("preact", "rms", True, BF16, 64, 4096, "prologue", "rows of x"),
        ("preact", "batch", False, F16, 64, 64, "prologue", "given"),
        ("preact", None, True, F16, 64, 64, "prologue", "given"),
        ("act-linear-add", None, True, F16, 64, 64, "prologue", "given"),
        ("prenorm", "batch", False, BF16, 64, 64, "prologue", "given"),
        ("prenorm", "layer", True, F32, 64, 64, "prologue", "rows of x"),
        ("prenorm", "layer", True, BF16, 64, 64, "algebraic", "rows of x, algebraic"),
        ("prenorm", "rms", True, F16, 64, 4096, "algebraic", "rows of x, algebraic"),
        ("prenorm", "batch", True, BF16, 64, 64, "prebatch", ""),
        ("preact", "batch", True, F32, 10**6, 64, "prebatch", ""),
    ],
)
def test_family(order, norm, training, dtype, M, N, family, over):
    chosen = planner.plan(spec_of(order, norm, training), dtype, M, N, 64)
    assert (chosen.family, chosen.over) == (family, over)
    assert chosen.kernel == planner.FAMILIES[family][0]
    assert chosen.cooperative == (family in ("batch", "prebatch"))
    key = planner.key_of(spec_of(order, norm, training), dtype.itemsize, M, N, 64)
    narrow = " narrow" * (planner.moved_at_once(N, 64, dtype.itemsize) < 8)
    assert key.startswith(f"{family}{narrow} {8 * dtype.itemsize} ")


# What every plan must be


def must_hold(chosen, M, N, K, dtype, device):
    """A plan that cannot compute its layer, or does not fit the device, fails here."""
    tile, blocks = chosen.tile, math.ceil(M / chosen.tile.BLOCK_M)
    columns = math.ceil(N / tile.BLOCK_N)
    assert N <= tile.BLOCK_N or chosen.family != "rows"
    assert M <= tile.BLOCK_M or chosen.family != "columns"
    assert 0 < chosen.programs < 2**31
    assert chosen.shared == tile.shared(dtype.itemsize) <= device.shared
    assert chosen.waves == chosen.programs / device.processors
    assert tile.num_stages >= 1 and tile.num_warps in (4, 8, 16)
    most = device.resident
    if not chosen.cooperative:
        assert chosen.programs == blocks * columns and chosen.walkers == 1
        return
    met = columns if chosen.family == "batch" else math.ceil(K / tile.BLOCK_K)
    assert 1 <= chosen.walkers <= max(1, blocks)
    assert chosen.programs <= most
    # Nobody is left without work, so all that wait for each other have some.
    work = chosen.walkers * met if chosen.family == "batch" else blocks * columns
    assert chosen.programs <= max(work, chosen.walkers * met)
    assert chosen.walkers == 1 or chosen.walkers * met <= most


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.architecture)
def test_every_plan_can_compute_its_layer(device):
    """Every order, norm, dtype and device at some widths."""
    for spec, dtype, M, N in itertools.product(
        specs(), (F32, BF16), ROWS, (1, 16, 17, 255, 256, 257, 339, 1000, 4096)
    ):
        must_hold(uncached(spec, dtype, M, N, 339, device), M, N, 339, dtype, device)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width(family):
    """Every N to 300 and some wide ones, also as K."""
    order, norm, _, _, _ = FAMILIES[family]
    reached = set()
    for dropout in (0.0, 0.1):
        spec = spec_of(order, norm, dropout=dropout)
        for dtype, M, N in itertools.product(DTYPES, ROWS, (*range(1, 301), *WIDE)):
            chosen = uncached(spec, dtype, M, N, N)
            must_hold(chosen, M, N, N, dtype, planner.UNKNOWN)
            reached.add(chosen.family)
    assert family in reached


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.architecture)
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_memory_of_every_tile(family, device):
    """Also of tiles that no size here is given; stages are dropped only where they must be, and
    two are kept, with fewer columns of the operands.
    """
    sizes = (2,) if family == "algebraic" else (2, 4)
    for random, size in itertools.product((False, True), sizes):
        tables = planner.config("any", device.architecture)["tiles"]
        by_bits = (random and tables.get(f"{family} random")) or tables[family]
        tiles = planner.tiles_of(family, random, size, device)
        for row, tile in zip(by_bits[str(8 * size)], tiles, strict=True):
            shipped = Tile(*row)
            fewer = {"num_stages": tile.num_stages, "BLOCK_K": tile.BLOCK_K}
            assert tile == shipped._replace(**fewer) and tile.num_stages >= 2
            assert tile.shared(size) <= device.shared
            more = tile._replace(num_stages=tile.num_stages + 1)
            if tile.BLOCK_K < shipped.BLOCK_K:
                assert tile.num_stages == 2
                more = tile._replace(BLOCK_K=2 * tile.BLOCK_K)
            assert tile == shipped or more.shared(size) > device.shared


@pytest.mark.parametrize("N", (1, 2, 16, 17, 33, 64, 300, 4096))
def test_many_elements(N):
    """More than 2^31 elements, and as many rows as 32 bits count, to 2^40 elements."""
    for spec, dtype, M in itertools.product(specs(), DTYPES, (MANY // N + 2, MANY)):
        if M * N <= 2**40:
            must_hold(uncached(spec, dtype, M, N, N), M, N, N, dtype, planner.UNKNOWN)


def test_no_columns():
    """K = 0: nothing to take statistics of."""
    for spec, dtype, M in itertools.product(specs(), DTYPES, ROWS):
        must_hold(uncached(spec, dtype, M, 64, 0), M, 64, 0, dtype, planner.UNKNOWN)


def test_wide_and_many():
    for spec, dtype in itertools.product(specs(), DTYPES):
        chosen = uncached(spec, dtype, 2**20, 2**18, 64)
        must_hold(chosen, 2**20, 2**18, 64, dtype, planner.UNKNOWN)


# What makes a plan a good one


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_device_gets_more_programs(family):
    devices = [Device("any", count, 227 << 10) for count in (8, 24, 132, 264, 1000)]
    some = set()
    for M in (200, 120) if family == "columns" else (600, 4096, 65536):
        programs = [of_family(family, M, device=device).programs for device in devices]
        assert programs == sorted(programs)
        some |= {*programs}
    assert len(some) > (0 if family == "columns" else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_rows_get_smaller_tiles(family):
    few, many = (16, 512) if family == "columns" else (600, 65536)
    small, large = (of_family(family, M).tile for M in (few, many))
    assert small.BLOCK_M < large.BLOCK_M
    assert small.BLOCK_M * small.BLOCK_N < large.BLOCK_M * large.BLOCK_N


@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_is_filled_where_there_is_enough_work(family):
    N = {"rows": 128, "columns": 10**5}.get(family, 4096)
    chosen = of_family(family, None if family == "columns" else 65536, N, 4096)
    assert chosen.waves >= 0.96 if chosen.cooperative else chosen.waves >= 1


def test_masks_get_tiles_of_their_own():
    plain, masked = (of_family("tile", 65536, 4096, dropout=p).tile for p in (0.0, 0.1))
    assert plain.BLOCK_M * plain.BLOCK_N > masked.BLOCK_M * masked.BLOCK_N
    # A family without a list for them uses its plain one.
    assert of_family("columns", dropout=0.1).tile == of_family("columns").tile


def test_several_dtypes_get_tiles_of_their_own():
    spec = spec_of("note", "layer")
    mixed = replace(spec, x_dtype="float32", y_dtype="float32")
    one, several = (planner.plan(s, BF16, 65536, 128, 512) for s in (spec, mixed))
    assert one.tile[:4] == (64, 128, 64, 4) and several.tile[:4] == (64, 128, 64, 8)
    assert several.shared == 3 * 64 * (64 * 4 + 128 * 2)
    assert planner.key_of(mixed, 2, 9, 12, 12) == "rows mixed 16 16x16x16"
    assert planner.key_of(mixed, 2, 9, 9, 9) == "rows mixed narrow 16 16x16x16"
    # The algebraic form multiplies x as it comes.
    mixed = replace(spec_of("prenorm", "layer"), x_dtype="float32")
    assert planner.plan(mixed, BF16, 64, 64, 64).family == "prologue"


def test_hopper_has_tiles_of_its_own():
    hopper, other = (of_family("wide", 65536, 4096, 4096, device=d).tile for d in DEVICES[:2])
    assert hopper[:2] == (128, 256) and other[:2] == (128, 128)
    two_programs = of_family("wide", 65536, 4096, planner.SHALLOW).tile
    assert two_programs[:2] == (128, 128) and two_programs.num_warps == 4
    narrow = of_family("wide", 65536, 4004, 4004).tile
    assert narrow[:2] == (128, 128) and narrow.num_warps == 8


def test_architectures_without_wgmma_read_the_tiles_of_ampere():
    for name in ("sm_86", "sm_89", "sm_120"):
        assert planner.config("any", name) == planner.config("any", "sm_80")
    assert planner.config("any", "sm_100") != planner.config("any", "sm_80")


def test_powers_of_two_fill_a_device_of_132():
    """128 programs are enough."""
    for family, M, N, tile in (
        ("tile", 256, 512, (16, 64)),
        ("rows", 8192, 64, (64, 64)),
        ("rows", 8192, 128, (64, 128)),
        ("wide", 2048, 1024, (128, 128)),
        ("algebraic", 1024, 512, (64, 64)),
    ):
        assert of_family(family, M, N).tile[:2] == tile, family
    assert planner.plan_products(F16, 8192, 256, 256, True, False).BLOCK == 128


@pytest.mark.parametrize("align", (1, 2, 4, 8))
def test_what_cannot_be_moved_by_8_bytes_gets_narrower_tiles(align):
    """Up to 15 moves a thread and step; in ones, 16 elements of a tile a thread."""
    for family, dtype in itertools.product(FAMILIES, (F16, F32)):
        if family == "algebraic" and dtype == F32:
            continue
        order, norm, _, M, N = FAMILIES[family]
        spec, size = spec_of(order, norm), dtype.itemsize
        usual, tile = (uncached(spec, dtype, M, n, 512).tile for n in (N, N - 16 + align))
        width, threads = min(16, align * size), 32 * tile.num_warps
        assert width == planner.moved_at_once(N - 16 + align, 512, size)
        moves = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K / (align * threads)
        assert moves <= 15 or tile.BLOCK_K == 16 or width >= 8, (family, tile)
        assert width > 2 or 16 * threads >= tile.BLOCK_M * tile.BLOCK_N
        fewer = width == 8 and family in ("algebraic", "rows", "tile", "wide")
        assert tile == usual or width < 8 or fewer, (family, tile)


def test_whole_rows_moved_by_8_bytes():
    """With as many rows as wgmma wants by 16 warps, elsewhere with fewer."""
    spec = spec_of("linear-norm-act-add", "layer")
    hopper, ampere, newer = (
        planner.plan(spec, F16, 65536, 236, 236, planner.UNKNOWN._replace(architecture=sm)).tile
        for sm in ("sm_90", "sm_80", "sm_100")
    )
    assert hopper[:4] == (64, 256, 64, 16)
    assert ampere[:4] == newer[:4] == (32, 256, 64, 8)


@pytest.mark.parametrize("align", (1, 2, 4))
def test_views_of_wider_matrices_are_moved_as_their_row_strides_allow(align):
    """Planned as if their sizes were no better."""
    for family, dtype in itertools.product(FAMILIES, (F16, F32)):
        order, norm, _, M, N = FAMILIES[family]
        spec, size = spec_of(order, norm), dtype.itemsize
        view = uncached(spec, dtype, M, N, 512, planner.UNKNOWN, None, align)
        narrow = uncached(spec, dtype, M, N, 512 + align)
        assert (view.family, view.tile) == (narrow.family, narrow.tile)
        key = planner.key_of(spec, size, M, N, 512, align)
        assert (" narrow " in key) == (align * size < 8)
    whole = planner.plan_whole(F16, 256, 256, 256, False, align=align)
    assert whole == planner.plan_whole(F16, 256, 256, 256 + align, False)
    products = planner.plan_products(F16, 4096, 512, 512, True, False, align=align)
    narrow = planner.plan_products(F16, 4096, 512, 512 + align, True, False)
    assert products[:3] == narrow[:3]


def test_a_tile_asked_for_is_taken():
    spec, tile = spec_of("note", "batch"), Tile(64, 32, 64, 4, 2, 128)
    chosen = planner.plan(spec, F16, 4096, 512, 512, planner.UNKNOWN, tile)
    assert chosen.tile == tile and chosen.shared == 2 * (64 + 32) * 64 * 2
    assert chosen.walkers == 132 // 16 and chosen.programs == 8 * 16
    assert tile.options(2)["maxnreg"] == tile.options(4)["maxnreg"] == 128
    ruled = tile._replace(maxnreg=None)
    assert ruled.options(2)["maxnreg"] == 255 and "maxnreg" not in ruled.options(4)
    assert planner.plan(spec, F16, 4096, 512, 512).tile != tile


@pytest.mark.parametrize(
    "order, norm, M, N, K, apart, backward",
    [
        ("preact", "layer", 65536, 1024, 1024, True, True),
        ("prenorm", "layer", 256, 1024, 1024, True, True),
        ("act-linear-norm-add", "rms", 4096, 512, 512, True, True),
        ("preact", "layer", 65536, 512, 512, True, True),
        ("preact", "layer", 65536, 256, 4096, False, False),
        ("preact", "layer", 256, 512, 512, False, False),
        ("preact", "layer", 16, 1024, 1024, False, False),
        ("preact", "batch", 65536, 1024, 1024, False, True),
        ("note", "layer", 65536, 1024, 1024, False, False),
        ("linear", None, 65536, 1024, 1024, False, False),
    ],
)
def test_stages_before_the_product_of_many_columns_are_a_launch_of_their_own(
    order, norm, M, N, K, apart, backward, monkeypatch
):
    monkeypatch.setattr(planner, "APART_FROM", APART_FROM)
    spec = spec_of(order, norm)
    chosen = uncached(spec, F16, M, N, K)
    assert chosen.apart == planner.is_apart(spec, M, N, K) == apart
    assert planner.is_apart(spec, M, N, K, backward=True) == backward
    if apart:  # then the product is that of a layer without them
        linear = spec.stages.index("linear")
        after = replace(spec, stages=spec.stages[linear:])
        assert chosen == uncached(after, F16, M, N, K)._replace(apart=True)
        assert planner.key_of(spec, 2, M, N, K) == planner.key_of(after, 2, M, N, K)


@pytest.mark.parametrize("C", (1, 16, 17, 300, 1024, 1025, MANY))
def test_a_pass_over_rows_has_tiles_of_one_size(C):
    rows, columns = planner.pass_tile(C)
    assert rows * columns == planner.PASS_TILE and columns >= min(C, 1024)


# Backward


@pytest.mark.parametrize("collectives", (False, True))
@pytest.mark.parametrize("processors", (8, 84, 132))
@pytest.mark.parametrize("over", (None, "rows", "columns"))
def test_backward(over, processors, collectives):
    device = Device("any", processors, 227 << 10, "sm_90", collectives)
    columns = (*range(1, 301), 2048, 2049, 4097, *WIDE)
    for M, C, plain in itertools.product((0, *ROWS, MANY), columns, (False, True)):
        chosen = planner.plan_backward(M, C, over, device, plain)
        blocks, programs = math.ceil(M / chosen.BLOCK_M), chosen.walkers * chosen.tiles
        for size in (chosen.BLOCK_M, chosen.BLOCK_N):
            assert size & (size - 1) == 0
        assert chosen.tiles == math.ceil(C / chosen.BLOCK_N)
        assert 1 <= chosen.walkers <= max(1, blocks)
        # Arrival counters are in groups of 16 of at most 16 groups.
        assert chosen.walkers <= planner.MOST_WALKERS == 16**2
        widest = 4096 if plain else 2048
        assert chosen.wide == (over == "rows" and widest < C)
        if over == "rows" and 2048 < C <= 4096 and plain:
            assert chosen[:3] == (1, 4096, 16) and chosen.stages == 2
        else:
            assert chosen.num_warps == 8
            assert chosen.stages == (3 if device.shared > 100 << 10 else 2)
        assert chosen.wide or over != "rows" or chosen.tiles == 1
        if over == "columns":
            assert programs <= device.resident  # they wait for each other
            assert M < 10**6 or C < 10**4 or 2 * programs > device.resident
        else:
            launched = chosen.walkers if chosen.wide else programs
            assert launched <= max(planner.BACKWARD_PROGRAMS, chosen.tiles * (not chosen.wide))
            assert chosen == planner.plan_backward(
                M, C, over, plain=plain
            )  # on any device the same sums
            assert M < 10**6 or launched >= 256  # enough to fill a device


@pytest.mark.parametrize("random", (False, True))
def test_products(random):
    splits = set()
    for dtype, M, N, K, device in itertools.product(
        DTYPES, (0, *ROWS, 8224, MANY // 64), (1, 17, 64, 339, 4096), (1, 16, 300, 4096), DEVICES
    ):
        chosen = planner.plan_products(dtype, M, N, K, True, random, device)
        tile = Tile(chosen.BLOCK, chosen.BLOCK, chosen.BLOCK_R, **chosen.options)
        of_weight, of_x = tile.grid(N, K), tile.grid(M, K)
        assert chosen.splits * chosen.rows >= M  # all rows are summed up ...
        assert (chosen.splits - 1) * chosen.rows < max(M, 1)  # ... no part is empty
        assert chosen.rows % chosen.BLOCK_R == 0
        assert 1 <= chosen.splits <= planner.MOST_SPLITS
        assert chosen.programs == of_weight * chosen.splits + of_x < 2**31
        without = planner.plan_products(dtype, M, N, K, False, random, device)
        assert without.programs == of_weight * without.splits
        assert chosen.options.keys() >= {"num_warps", "num_stages"}
        assert not any(name.startswith("BLOCK") for name in chosen.options)
        assert tile.shared(dtype.itemsize) <= device.shared
        splits.add(chosen.splits)
    assert {1, planner.MOST_SPLITS} <= splits


@pytest.mark.parametrize("random", (False, True))
def test_dz_and_dx_in_one_launch(random):
    for dtype, M, N, K, device in itertools.product(
        DTYPES, (0, *ROWS, MANY), (1, 16, 17, 64, 256, 257, 512, 513), (1, 339, 4096), DEVICES
    ):
        chosen = planner.plan_whole(dtype, M, N, K, random, device)
        if chosen is None:
            continue
        tile, blocks = chosen.tile, math.ceil(M / chosen.tile.BLOCK_M)
        assert tile.BLOCK_N == planner.power_of_two(N) <= 512
        assert 1 <= chosen.walkers <= max(1, min(blocks, planner.MOST_WALKERS))
        assert blocks <= device.processors or K <= planner.REREADS * tile.BLOCK_M
    hopper = Device("any", 132, 227 << 10, "sm_90")
    ampere = hopper._replace(architecture="sm_80")

    def whole(*args):
        return planner.plan_whole(*args, False) is not None

    one_wave = 132 * 16
    assert whole(F16, one_wave, 512, 512) and not whole(F16, one_wave + 1, 512, 512)
    assert whole(F16, 65536, 128, 128) and not whole(F16, 65536, 256, 256)
    assert not whole(F16, 256, 513, 64)
    assert planner.plan_whole(F16, 256, 64, 64, False, ampere) is None
    assert planner.plan_whole(F32, 256, 64, 64, False, ampere) is not None


# Files


def rows_in(path):
    """(family, bits, rows) of a file."""
    for family, by_bits in json.loads(path.read_text())["tiles"].items():
        for bits, rows in by_bits.items():
            yield family, bits, rows


def test_generic_has_every_family():
    tiles = json.loads((planner.CONFIGS / "generic.json").read_text())["tiles"]
    for family in (*FAMILIES, "products", "whole"):
        assert tiles[family].keys() == ({"16"} if family == "algebraic" else {"16", "32"})
    assert {name.split(" ")[0] for name in tiles} == {*FAMILIES, "products", "whole"}
    assert {kind for name in tiles for kind in name.split(" ")[1:]} == {"random", "mixed"}
    assert {*FAMILIES} == {*planner.FAMILIES}


@pytest.mark.parametrize("path", sorted(planner.CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_shipped_files(path):
    read = json.loads(path.read_text())
    assert read.keys() <= {"device", "note", "date", "torch", "triton", "tiles", "tuned", "auto"}
    assert planner.config_file(read["device"]) == path or path.stem == "generic"
    for family, bits, rows in rows_in(path):
        tiles = [Tile(*row) for row in rows]
        whole = family.startswith("whole")
        assert len({*tiles}) == len(tiles) > 0 or whole, (family, bits)
        for tile in tiles:
            assert all(n >= (8 if whole else 16) and n & (n - 1) == 0 for n in tile[:3]), (
                family,
                bits,
                tile,
            )
            assert tile.num_warps in (4, 8, 16) and tile.num_stages in (2, 3, 4)
            assert tile.maxnreg is None or tile.maxnreg * 32 * tile.num_warps <= 65536
        sizes = [(t.BLOCK_M * t.BLOCK_N, t.BLOCK_M) for t in tiles]
        if family.startswith("rows"):  # largest first for each width
            sizes = [(tile.BLOCK_N, tile.BLOCK_M) for tile in tiles]
            assert {tile.BLOCK_N for tile in tiles} == {16, 32, 64, 128, 256}
        if whole:  # one for each width, the widest first
            widths = [tile.BLOCK_N for tile in tiles]
            assert widths == sorted({*widths}, reverse=True)
            continue
        areas = [first for first, _ in sizes]
        assert areas == sorted(areas, reverse=True), (family, bits)
        if family.startswith("rows"):
            assert sizes == sorted(sizes, reverse=True)
        if family.startswith("columns"):
            assert tiles[0].BLOCK_M == planner.TALLEST_COLUMN


def test_a_device_goes_before_its_architecture_and_that_before_generic(configs):
    """Table by table, and within a table bits by bits."""
    spec, device = spec_of("note", None), Device("NVIDIA H9/x 80GB", 4, 227 << 10, "sm_99")
    assert planner.config_file(device.name).name == "NVIDIA-H9-x-80GB.json"

    def tile(dtype, N=4096):
        return list(planner.plan(spec, dtype, 4096, N, 64, device).tile[:5])

    generic = {dtype: tile(dtype) for dtype in (F16, F32)}
    configs("sm_99", tiles={"tile": {"16": [[64, 128, 32, 4, 2]], "32": [[32, 32, 32, 4, 2]]}})
    assert (tile(F16), tile(F32)) == ([64, 128, 32, 4, 2], [32, 32, 32, 4, 2])
    configs(device.name, tiles={"tile": {"16": [[16, 64, 16, 4, 2]]}})
    assert (tile(F16), tile(F32)) == ([16, 64, 16, 4, 2], [32, 32, 32, 4, 2])
    wide = spec_of("note", "layer")
    other = planner.plan(wide, F16, 4096, 4096, 64, device)
    assert (
        other.tile
        == planner.plan(
            wide, F16, 4096, 4096, 64, planner.UNKNOWN._replace(processors=4, architecture="sm_1")
        ).tile
    )
    elsewhere = planner.plan(spec, F16, 4096, 4096, 64, device._replace(architecture="sm_1"))
    assert list(elsewhere.tile[:5]) == [16, 64, 16, 4, 2]
    nobody = Device("other", 4, 227 << 10, "sm_1")
    for dtype, was in generic.items():
        assert list(planner.plan(spec, dtype, 4096, 4096, 64, nobody).tile[:5]) == was


def test_tuned_rows_merge_like_tiles(configs):
    device = Device("mine", 132, 227 << 10, "sm_99")
    a, b = "tile 16 64x64x64", "tile 16 128x64x64"
    configs("sm_99", tuned={a: [16, 16, 16, 4, 2], b: [16, 16, 32, 4, 2]})
    configs("mine", tuned={a: [32, 32, 32, 4, 2, 96]})
    spec = spec_of("note", None)
    assert planner.plan(spec, F16, 64, 64, 64, device).tile == (32, 32, 32, 4, 2, 96)
    assert planner.plan(spec, F16, 128, 64, 64, device).tile == (16, 16, 32, 4, 2, None)


def test_a_tuned_row_is_for_its_key_only(configs):
    device = Device("mine", 132, 227 << 10)
    tile = Tile(64, 256, 32, 4, 2)
    configs("mine", tuned={"rows 16 4096x256x512": [*tile[:5]]})
    note, batch = spec_of("note", "layer"), spec_of("note", "batch")

    def taken(spec=note, dtype=F16, M=4096, N=256, K=512, device=device):
        return planner.plan(spec, dtype, M, N, K, device).tile == tile

    assert taken() and taken(dtype=BF16) and taken(spec_of("resnet-v1", "rms"))
    assert taken(M=2049) and taken(N=132) and taken(K=260)
    for other in (
        {"dtype": F32},
        {"M": 4097},
        {"M": 2048},
        {"N": 128},
        {"N": 257},
        {"N": 130},
        {"K": 256},
        {"K": 513},
        {"spec": batch},
        {"device": planner.UNKNOWN},
    ):
        assert not taken(**other), other


def test_no_gpu_is_a_device_that_nobody_knows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planner._device_of.cache_clear()
    for device in ("cpu", "cuda", "meta"):
        assert planner.device_of(torch.device(device)) == planner.UNKNOWN
    planner._device_of.cache_clear()


def test_programs_that_wait_for_each_other_leave_room_for_collectives(monkeypatch):
    """Where torch.distributed is at work; else they take every multiprocessor."""
    assert [Device("any", n, 0).resident for n in (1, 8, 132)] == [1, 8, 132]
    assert [Device("any", n, 0, "", True).resident for n in (1, 8, 84, 132)] == [1, 4, 52, 100]
    found = SimpleNamespace(name="any", major=9, minor=0, multi_processor_count=132)
    found.shared_memory_per_block_optin = 227 << 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    planner._device_of.cache_clear()
    programs = {}
    for at_work in (False, True, False):
        monkeypatch.setattr(planner.dist, "is_initialized", lambda at_work=at_work: at_work)
        device = planner.device_of(torch.device("cuda"))
        for family in FAMILIES:
            chosen = of_family(family, 10**5, device=device) if family != "columns" else None
            programs.setdefault((family, at_work), chosen and chosen.programs)
            assert programs[family, at_work] == (chosen and chosen.programs)
    planner._device_of.cache_clear()
    for family in FAMILIES:
        alone, beside = programs[family, False], programs[family, True]
        if family in planner.COOPERATIVE:
            assert alone > 100 >= beside
        else:
            assert alone == beside
