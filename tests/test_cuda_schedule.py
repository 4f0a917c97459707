"""The schedule of the Hopper kernel, walked through on the CPU: every tile is finished exactly
once, nothing is read before it is there or overwritten before it is read, nothing waits forever.
"""

import ctypes
import itertools
import random
import shutil

import pytest

import cuda_on_cpu
from cuda_on_cpu import HERE, ROOT

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

SHARED_LIMIT = 227 << 10  # bytes a block may have on Hopper


def load(root=ROOT) -> ctypes.CDLL:
    library = cuda_on_cpu.load("walk", HERE / "walk.cpp", root=root)
    library.walk_schedule.restype = library.plan.restype = ctypes.c_char_p
    library.walk_schedule.argtypes = [
        *[ctypes.c_int64] * 3, *[ctypes.c_int] * 3, ctypes.c_bool, ctypes.c_bool, ctypes.c_uint64,
    ]  # fmt: skip
    library.plan.argtypes = [
        *[ctypes.c_int64] * 3, ctypes.c_bool, ctypes.c_int, ctypes.c_int,
        ctypes.POINTER(ctypes.c_int64),
    ]  # fmt: skip
    return library


@pytest.fixture(scope="module")
def library():
    return load()


def walks(count):
    """Sizes about the edges of tiles, from one block to one for each tile, all or few resident."""
    draw = random.Random(0)
    for seed in range(count):
        M = draw.choice([1, 127, 128, 129, 300, 640])
        N = draw.choice([1, 128, 255, 256, 257, 700, 1100])
        K = draw.choice([8, 64, 72, 128, 192, 200, 520])
        blocks = draw.choice([1, 2, 3, 5, 8, 132])
        resident = draw.choice([1, 2, blocks])
        yield M, N, K, draw.choice([128, 256]), blocks, resident, seed % 2 == 0, seed % 3 > 0, seed


@pytest.mark.parametrize("part", range(4))
def test_walks(library, part):
    for arguments in itertools.islice(walks(240), part, None, 4):
        assert library.walk_schedule(*arguments) is None, arguments


# What each wait and each arrival is for: without it, some walk goes wrong.
BREAKS = {
    "load waits for slots": ("b.emptied[ring.slot].wait(ring.parity ^ 1);", ";"),
    "survey waits for slots": ("    b.filled[ring.slot].wait(ring.parity);\n      add", "add"),
    "survey frees slots": ("add(k, ring.slot);\n      b.emptied[ring.slot].arrive();", ";"),
    "survey waits to be applied": ("b.applied.wait(parity ^ 1);", ";"),
    "multiply waits for slots": ("b.filled[ring.slot].wait(ring.parity);\n      mult", "mult"),
    "multiply frees what it has read": ("b.emptied[before].arrive();\n      b", "b"),
    "and not what it reads": ("if (k > 0) b.emptied[before]", "b.emptied[ring.slot]"),
    "multiply waits for the survey": ("b.surveyed.wait(parity);", ";"),
    "multiply waits for finish": ("b.unparked.wait(parity ^ 1);", ";"),
    "finish waits for multiply": ("b.parked.wait(parity);", ";"),
    "the ring turns": ("if (++slot == kSlots) slot = 0, parity ^= 1;", "slot = (slot + 1) % 3;"),
    "all who read a slot free it": ("kMultiplyWarps + (survey_rows ? kSurveyWarps : 0)", "2"),
    "blocks share out the tiles": ("for (int tile = block; ", "for (int tile = 0; "),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_walk_sees(name, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "cuda" / "schedule.h"
    text = header.read_text()
    old, new = BREAKS[name]
    assert old in text
    header.write_text(text.replace(old, new))
    broken = load(tmp_path)
    assert any(broken.walk_schedule(*arguments) is not None for arguments in walks(60))


def test_plans(library):
    """A program at most for each multiprocessor and tile: all are resident at once."""
    found = (ctypes.c_int64 * 5)()
    draw = random.Random(0)
    for _ in range(400):
        M, N, K = (draw.choice([1, 64, 500, 1024, 4096, 65536, 1 << 20]) for _ in range(3))
        K, multiprocessors = -(-K // 8) * 8, draw.choice([1, 114, 132])
        norm_first, norm = draw.random() < 0.5, draw.randrange(3)
        if M * N > 1 << 34:
            continue
        assert library.plan(M, N, K, norm_first, norm, multiprocessors, found) is None
        block_n, programs, shared, floats, counters = found
        tiles = -(-M // 128) * -(-N // block_n)
        assert programs == min(tiles, multiprocessors) and shared <= SHARED_LIMIT
        if norm and norm_first:
            assert floats >= 2 * N and counters == 2
        elif norm and N > block_n:
            assert floats == 3 * -(-N // block_n) * M and counters == -(-M // 128)
        else:
            assert floats == counters == 0


@pytest.mark.parametrize(
    "M, N, K, reason",
    [(64, 64, 12, "16 bytes"), (64, (1 << 20) + 1, 64, "features"), (1 << 40, 64, 64, "tiles")],
)
def test_refusals(library, M, N, K, reason):
    assert reason in library.plan(M, N, K, False, 0, 132, (ctypes.c_int64 * 5)()).decode()
