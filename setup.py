"""Builds the C++ extension fusedres._C, or a pure-Python wheel where torch is missing.

FUSEDRES_SKIP_EXT=1  build no extension; the package then runs on its other backends
FORCE_ONLY_CPU=1     build for the CPU only, which is all there is to build so far
FORCE_CUDA=1         an error so far: there are no CUDA kernels yet
MAX_JOBS=n           compile n files at once; default: one per core
"""

import os
import sys
from glob import glob

from setuptools import setup

# No -march=native: the binary runs on every CPU of its architecture. No -ffast-math: NaN stays NaN.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
]


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def extension() -> dict:
    """setup() arguments that build fusedres._C; none where there is nothing to build it with."""
    if flag("FORCE_CUDA"):
        sys.exit("fusedres: FORCE_CUDA=1 is set, but there are no CUDA kernels yet; unset it")
    if flag("FUSEDRES_SKIP_EXT"):
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "fusedres: torch is not importable here, so no extension is built. For the extension, "
            "install torch first, then: pip install --no-build-isolation .",
            file=sys.stderr,
        )
        return {}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        sys.exit(f"fusedres: found torch {torch.__version__}, needs torch >= 2.11")

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    module = CppExtension(
        "fusedres._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=CXX_FLAGS,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
