"""The schedule of the Hopper kernel, walked through on the CPU: every tile is finished exactly
once, nothing is read before it is there or overwritten before it is read, nothing waits forever.
"""

import ctypes
import itertools
import random

import pytest

import cuda_on_cpu
from cuda_on_cpu import HERE, ROOT

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

SHARED_LIMIT = 227 << 10  # bytes a block may have on Hopper
SIZE, INT, FLAG = ctypes.c_int64, ctypes.c_int, ctypes.c_bool

# What each wait and each arrival is for: without it, some walk goes wrong.
BREAKS = {
    "load waits for slots": ("b.emptied[ring.slot].wait(ring.parity ^ 1);", ""),
    "survey waits for slots": ("b.filled[ring.slot].wait(ring.parity);\n      add", "add"),
    "survey frees slots": ("add(k, ring.slot);\n      b.emptied[ring.slot].arrive();", ""),
    "survey waits to be applied": ("b.applied.wait(parity ^ 1);", ""),
    "multiply waits for slots": ("b.filled[ring.slot].wait(ring.parity);\n      mult", "mult"),
    "multiply frees the last slot": ("end();\n    b.emptied[before].arrive();", "end();"),
    "multiply frees what it has read": ("if (k > 0) b.emptied[before]", "b.emptied[ring.slot]"),
    "multiply waits for the survey": ("b.surveyed.wait(parity);", ""),
    "multiply waits for finish": ("b.unparked.wait(parity ^ 1);", ""),
    "finish waits for multiply": ("if (!whole) b.parked.wait(parity);", ""),
    "the ring turns": ("slot = 0, parity ^= 1;", "slot = 0;"),
    "all who read a slot free it": ("kMultiplyWarps + (survey_rows ? kSurveyWarps : 0)", "2"),
    "blocks share out the tiles": ("for (int tile = block; ", "for (int tile = 0; "),
    "tiles are posted before they are waited for": (
        "finish(s.at(tile - whole * blocks), whole)",
        "finish(s.at(std::min(tile, s.tiles - 1)), whole)",
    ),
    "the last tile is completed": ("(shared_rows ? blocks : 0)", "0"),
}


def broken_schedules() -> str:
    """Every break in a namespace of its own."""
    text = (ROOT / "csrc" / "cuda" / "schedule.h").read_text().replace("#pragma once", "")
    parts = []
    for i, (old, new) in enumerate(BREAKS.values()):
        assert text.count(old) >= 1, old
        names = f"#define sm90 sm90_{i}\n#define FUSEDRES_WALK walk_{i}\n"
        walk = '#include "walk.cpp"\n#undef sm90\n#undef FUSEDRES_WALK\n'
        parts += [names, text.replace(old, new), walk]
    return "".join(parts)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    broken = tmp_path_factory.mktemp("walk") / "broken.cpp"
    broken.write_text(broken_schedules())
    return cuda_on_cpu.load("walk", HERE / "walk.cpp", HERE / "plan_sm90.cpp", broken)


def function(library, name, *types):
    found = getattr(library, name)
    found.restype, found.argtypes = ctypes.c_char_p, types
    return found


def walker(library, name="walk_schedule"):
    return function(library, name, SIZE, SIZE, SIZE, INT, INT, INT, FLAG, FLAG, ctypes.c_uint64)


def walks(count):
    """Sizes about the edges of tiles, from one block to one for each tile, all or few resident."""
    draw = random.Random(0)
    for seed in range(count):
        M = draw.choice([1, 127, 128, 129, 300, 640])
        N = draw.choice([1, 128, 255, 256, 257, 700, 1100])
        K = draw.choice([8, 64, 72, 128, 192, 200, 520])
        blocks, columns = draw.choice([1, 2, 3, 5, 8, 132]), draw.choice([128, 256])
        resident = draw.choice([1, 2, blocks])
        if shared := seed % 3 > 0:  # as a cooperative launch sees to
            resident = blocks = max(blocks, -(-N // columns))
        yield M, N, K, columns, blocks, resident, seed % 2 == 0, shared, seed


@pytest.mark.parametrize("part", range(4))
def test_walks(library, part):
    walk = walker(library)
    for arguments in itertools.islice(walks(240), part, None, 4):
        assert walk(*arguments) is None, arguments


@pytest.mark.parametrize("number, name", list(enumerate(BREAKS)))
def test_a_walk_sees(library, number, name):
    walk = walker(library, f"walk_{number}")
    assert any(walk(*arguments) is not None for arguments in walks(60)), name


@pytest.mark.parametrize("blocks, resident", [(5, 1), (3, 3), (4, 4)])
def test_blocks_that_share_rows_must_all_be_there(library, blocks, resident):
    """Nine tiles of columns: nine blocks are enough, if all are resident."""
    error = walker(library)(640, 1100, 64, 128, blocks, resident, False, True, 0)
    assert error and b"deadlock" in error
    assert walker(library)(640, 1100, 64, 128, 9, 9, False, True, 0) is None


def planner(library):
    return function(library, "plan_sm90", SIZE, SIZE, SIZE, FLAG, INT, INT, ctypes.POINTER(SIZE))


def test_plans(library):
    """A program at most for each multiprocessor and tile: all are resident at once."""
    found, draw = (SIZE * 5)(), random.Random(0)
    for _ in range(400):
        M, N, K = (draw.choice([1, 64, 500, 1024, 4096, 65536, 1 << 20]) for _ in range(3))
        K, multiprocessors = -(-K // 8) * 8, draw.choice([1, 114, 132])
        norm_first, norm = draw.random() < 0.5, draw.randrange(3)
        if M * N > 1 << 34:
            continue
        plan = planner(library)
        assert plan(M, N, K, norm_first, norm, multiprocessors, found) is None
        block_n, programs, shared, floats, counters = found
        tiles = -(-M // 128) * -(-N // block_n)
        assert programs == min(tiles, multiprocessors) and shared <= SHARED_LIMIT
        if norm and norm_first:
            assert floats == 2 * N and counters == 2  # without a norm_weight
        elif norm and block_n < N:
            assert floats == 3 * -(-N // block_n) * M and counters == 2 * -(-M // 128)
        else:
            assert floats == counters == 0


@pytest.mark.parametrize(
    "M, N, K, reason",
    [(64, 64, 12, "16 bytes"), (64, (1 << 20) + 1, 64, "features"), (1 << 40, 64, 64, "tiles")],
)
def test_refusals(library, M, N, K, reason):
    assert reason in planner(library)(M, N, K, False, 0, 132, (SIZE * 5)()).decode()
