"""The emulated GPU itself: small kernels of cuda_on_cpu/selftest.cpp, right ones and wrong ones."""

import ctypes

import pytest
import torch

import cuda_on_cpu
from cuda_on_cpu import HERE, Memory, load

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

SEEDS = range(20)


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "watched"])
def library(request):
    library = load("selftest", HERE / "selftest.cpp", watched=request.param)
    library.watched = request.param
    return library


@pytest.fixture
def memory(library):
    with Memory(library) as memory:
        yield memory


def call(library, name, *arguments, seed=0, resident=3):
    """What the launch returned: None or an error."""
    library.emulator_set(ctypes.c_uint64(seed), resident)
    function = getattr(library, f"selftest_{name}")
    function.restype = ctypes.c_char_p
    pointers = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
    ]
    error = function(*pointers)
    return error if error is None else error.decode()


def outcomes(library, name, *arguments, expected, out, seeds=SEEDS, prepare=lambda: None):
    """For each seed: "right", "wrong", or the error."""
    seen = []
    for seed in seeds:
        out.fill_(float("nan"))
        prepare()
        error = call(library, name, *arguments, seed=seed)
        seen.append(error or ("right" if torch.equal(out, expected) else "wrong"))
    return seen


@pytest.mark.parametrize("barriers", [1, 0])
def test_a_missing_barrier_shows(library, memory, barriers):
    x = torch.randint(-100, 100, (5, 128)).float()
    given, out = memory.put(x), memory.empty(5)
    seen = outcomes(library, "reduce", 5, given, out, barriers, expected=x.sum(1), out=out)
    if barriers:
        assert set(seen) == {"right"}
    elif library.watched:
        assert all("race in shared memory" in outcome for outcome in seen)
    else:
        assert "wrong" in seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_mma_multiplies_what_ldmatrix_loads(library, memory, dtype, turned):
    a = torch.randint(-8, 8, (16, 16)).to(dtype)
    b = torch.randint(-8, 8, (16, 8)).to(dtype)
    c = torch.randint(-8, 8, (16, 8)).float()
    out = memory.put(c)
    name = f"multiply_{str(dtype).removeprefix('torch.')}"
    given = memory.put(a), memory.put(b.T.contiguous() if turned else b)
    assert call(library, name, *given, out, turned) is None
    assert torch.equal(out, c + a.float() @ b.float())


@pytest.mark.parametrize("count", [512, 509, 3, 1])
def test_asynchronous_copies_fill_up_with_zeros(library, memory, count):
    x = torch.randn(count)
    given, out = memory.empty(count, flush_to_end=False).copy_(x), memory.empty(512)
    expected = torch.nn.functional.pad(x, (0, 512 - count))
    seen = outcomes(library, "copy", given, out, count, 1, 1, expected=expected, out=out)
    assert set(seen) == {"right"}


@pytest.mark.parametrize(("waits", "barriers"), [(0, 1), (2, 1), (1, 0)])
def test_a_copy_that_nobody_waits_for_shows(library, memory, waits, barriers):
    x = torch.randn(512)
    given, out = memory.put(x), memory.empty(512)
    seen = outcomes(library, "copy", given, out, 512, waits, barriers, expected=x, out=out)
    assert "right" not in seen


def test_shuffles(library, memory):
    x = torch.randint(-100, 100, (2, 32)).float()
    given, out = memory.put(x), memory.empty(2)
    assert call(library, "butterfly", given, out, -1) is None
    assert torch.equal(out, x.sum(1))
    assert "while other lanes of the warp are in" in call(library, "butterfly", given, out, 7)


@pytest.mark.parametrize("barrier", [1, 0])
def test_the_last_block_sees_what_all_have_written(library, memory, barrier):
    x = torch.randint(-100, 100, (6, 32)).float()
    given, partial, out = memory.put(x), memory.empty(6, 32), memory.empty(1)
    arrived = memory.empty(1, dtype=torch.int32)

    def clear():
        arrived.zero_()
        partial.fill_(float("nan"))

    arguments = 6, given, partial, out, arrived, barrier, 0
    expected = x.sum()[None]
    seen = outcomes(library, "last_block", *arguments, expected=expected, out=out, prepare=clear)
    if barrier:
        assert set(seen) == {"right"}
        assert arrived.item() == 0
    elif library.watched:
        assert any("race in global memory" in outcome for outcome in seen)
    else:
        assert "wrong" in seen


@pytest.mark.parametrize(
    ("wrong", "error"), [(1, "reads through L1"), (2, "race in global"), (3, "race in global")]
)
def test_races_between_blocks(library, memory, wrong, error):
    if not library.watched:
        pytest.skip("only a watched build sees them")
    given, partial, out = memory.put(torch.ones(6, 32)), memory.empty(6, 32), memory.empty(1)
    arrived = memory.empty(1, dtype=torch.int32).zero_()
    assert error in call(library, "last_block", 6, given, partial, out, arrived, 1, wrong)


@pytest.mark.parametrize(
    ("which", "error"),
    [
        (0, "outside of a buffer: 256 bytes from its start"),
        (1, "bytes from the start of shared memory, which has 240"),
        (2, "behind the end of shared memory"),
        (3, "sync_threads"),
        (4, "misaligned access"),
        (5, "index outside of an array"),
        (7, "cp_async: global address not 16-byte aligned"),
        (8, "sync_"),
    ],
)
def test_misbehaviour_ends_the_launch(library, memory, which, error):
    out = memory.empty(64)
    assert error in call(library, "misbehave", out, which)
    assert call(library, "misbehave", out, 9) is None  # and does no harm to the next


def test_shared_memory_is_not_zero(library, memory):
    out = memory.empty(64)
    error = call(library, "misbehave", out, 6)
    if library.watched:
        assert "read and was never written" in error
    else:
        assert error is None
        assert out[1:32].isnan().all()
