"""csrc/cuda compiled by g++ for an emulated GPU, see machine.h. The kernels' numbers are tested
with it on machines that have no GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "cuda_on_cpu"
KEPT = 24  # libraries in the cache: all that the tests build, and mutants

# -march=native for fused multiply-add, which nvcc's code has too. -fno-gnu-unique: two libraries
# are loaded at once, each with a machine of its own. What the two sanitizers find is an illegal
# instruction, which the machine catches.
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-shared",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
    "-DFUSEDRES_EMULATE",
]
CHECKED = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
WATCHED = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
MACHINE = [HERE / f"{name}.cpp" for name in ("machine", "threads", "memory", "exports")]


def missing() -> str | None:
    """Why there is no emulation here; None if there is."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    return None if shutil.which("g++") else "needs g++"


def _key(sources, flags, root: Path) -> str:
    """Changes with every file, flag, compiler and CPU that the library depends on."""
    key = hashlib.sha256(" ".join(map(str, (*flags, platform.machine()))).encode())
    key.update(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    native = ["g++", "-march=native", "-Q", "--help=target"]
    key.update(subprocess.run(native, capture_output=True, check=True).stdout)
    headers = (root / "csrc").rglob("*.h"), HERE.glob("*.h")
    for path in (*sources, *(path for folder in headers for path in sorted(folder))):
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def _compile(library: Path, sources, flags, root: Path, watched: bool) -> None:
    include = [f"-I{root / 'csrc'}", f"-I{HERE}"]
    objects = [library.with_suffix(f".{source.stem}.o") for source in sources]

    def compile_one(source: Path, out: Path) -> None:
        kernel = source.parent != HERE or source.name == "selftest.cpp"
        extra = [*CHECKED, *(WATCHED if watched else [])] if kernel else []
        _run(["g++", *FLAGS, *flags, *extra, *include, "-x", "c++", "-c", source, "-o", out])

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        unfinished = library.with_suffix(".unfinished")
        _run(["g++", *FLAGS, *objects, "-o", unfinished])
        unfinished.rename(library)
    finally:
        for path in objects:
            path.unlink(missing_ok=True)


def _run(command) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")


def load(name: str, *sources: Path, flags=(), root: Path = ROOT, watched=False) -> ctypes.CDLL:
    """The sources as one library with a machine in it, built once for all processes.

    `watched`: memory accesses are watched for races, which is slow. `root`: where csrc lies.
    """
    files = (*MACHINE, *sources, *((HERE / "instrumented.cpp",) if watched else ()))
    library = CACHE / f"{name}-{_key(files, (*FLAGS, *flags, watched), root)}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            os.utime(library)
        else:
            _compile(library, files, flags, root, watched)
            _forget_old()
        return ctypes.CDLL(str(library))


def _forget_old() -> None:
    libraries = sorted(CACHE.glob("*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in libraries[KEPT:]:
        path.unlink()


class Memory:
    """Tensors in guarded memory: touching what lies before or behind one ends the launch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.held = library, []
        library.emulator_allocate.restype = ctypes.c_void_p
        library.emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_bool]
        library.emulator_free.argtypes = [ctypes.c_void_p]

    def empty(self, *shape: int, dtype=torch.float32, flush_to_end=True) -> torch.Tensor:
        """Full of NaN, or of -1."""
        count = functools.reduce(int.__mul__, shape, 1)
        size = count * dtype.itemsize
        at = self.library.emulator_allocate(size, flush_to_end)
        self.held.append(at)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = (ctypes.c_char * size).from_address(at)
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    @staticmethod
    def sparse(count: int, dtype=torch.float32) -> torch.Tensor:
        """Any number of zeros, of which pages that are touched take memory. Not guarded."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)

    def put(self, t: torch.Tensor, flush_to_end=True) -> torch.Tensor:
        """A contiguous copy."""
        return self.empty(*t.shape, dtype=t.dtype, flush_to_end=flush_to_end).copy_(t)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Its tensors must not be used any more."""
        for at in self.held:
            self.library.emulator_free(at)
        self.held.clear()
