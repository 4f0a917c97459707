"""Builds the extension fusedres._C, or a pure-Python wheel where torch is missing.

With nvcc and a CUDA build of torch it has the CUDA kernels, else the CPU's alone. Neither a GPU nor
its driver is needed, to build or to import.

FUSEDRES_SKIP_EXT=1   build no extension; the package then runs on its other backends
CXX                   the C++ compiler; default: c++
FORCE_ONLY_CPU=1      leave out the CUDA kernels
FORCE_CUDA=1          fail where they cannot be built, and say why
TORCH_CUDA_ARCH_LIST  what they are built for; default: "8.0+PTX;9.0a;10.0", as far as nvcc knows it
FUSEDRES_CUTLASS      folder of CUTLASS' headers; default: those of the package nvidia-cutlass
MAX_JOBS=n            compile n files, or architectures of a file, at once; default: one per core
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import __version__, setup
from setuptools.command.build_py import build_py

if int(__version__.partition(".")[0]) < 77:
    needed = "needs 77 or newer: pip install 'setuptools>=77'"
    sys.exit(f"fusedres: found setuptools {__version__}, {needed}")

# A binary that tells nothing of the folders it was built in.
MAPPED = [f"-ffile-prefix-map={top}/=" for top in (os.getcwd(), sysconfig.get_path("platlib"))]
# No -march=native: the binary runs on every CPU of its architecture. No -ffast-math: NaN stays NaN.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    *MAPPED,
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    *(f"-Xcompiler={option}" for option in ("-fPIC", "-fvisibility=hidden", *MAPPED)),
    "-Icsrc",
]
CXX_PROBE = "static_assert(__cplusplus >= 202002L && __builtin_bit_cast(int, 1.0f));"
NOTE = (
    "without_extension.txt"  # in the package: why it has none; fusedres/backends/native.py reads it
)
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def run(*command: str | Path) -> str:
    """What it printed. Where it fails: an error with what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fusedres: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Cuda:
    """nvcc, what it builds and for which GPUs; `missing` says why it cannot."""

    def __init__(self, torch_cuda: str | None) -> None:
        home = os.environ.get("CUDA_HOME")
        self.nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
        self.missing = ""
        if torch_cuda is None:
            self.missing = "this torch is a build without CUDA"
        elif self.nvcc is None:
            self.missing = f"no nvcc in {home}/bin" if home else "no nvcc on PATH"
        if self.missing:
            return
        # nvcc on PATH may be a link or a script, so it is asked where its toolkit is.
        top = re.search(r"TOP=(.*)", run(self.nvcc, "--dryrun", "none.cu"))
        self.home = Path(top[1].strip()).resolve()
        version = re.search(r"release ([\d.]+)", run(self.nvcc, "--version"))
        self.version = version[1]
        self.release = tuple(map(int, self.version.split(".")))
        if self.release[0] != int(torch_cuda.split(".")[0]):
            self.missing = f"nvcc is of CUDA {self.version}, this torch of CUDA {torch_cuda}"
        elif self.release < (12, 5):
            self.missing = f"nvcc is of CUDA {self.version}, 12.5 is needed"
        if self.missing:
            return
        self.architectures = self.wanted()
        self.cutlass = self.find_cutlass()
        self.sources = [s for s in sorted(glob("csrc/cuda/*.cu")) if self.architectures_of(s)]

    def wanted(self) -> list[str]:
        """For example ["8.0", "8.0+PTX", "9.0a"]."""
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        found = []
        for name in re.split("[; ,]+", (listed or "8.0+PTX;9.0a;10.0").strip("; ,")):
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                sys.exit(f"fusedres: TORCH_CUDA_ARCH_LIST has '{name}', expected e.g. '8.0+PTX'")
            found += [name.removesuffix("+PTX")] + [name] * name.endswith("+PTX")
        known = run(self.nvcc, "--list-gpu-code") if listed is None else None
        return [a for a in found if known is None or f"sm_{number(a).rstrip('af')}\n" in known]

    @staticmethod
    def find_cutlass() -> str | None:
        folder = os.environ.get("FUSEDRES_CUTLASS")
        package = importlib.util.find_spec("cutlass_library")
        if not folder and package:
            folder = str(Path(package.origin).parent / "source" / "include")
        if folder and not Path(folder, "cutlass", "cutlass.h").exists():
            sys.exit(f"fusedres: no cutlass/cutlass.h in {folder}, expected CUTLASS' headers there")
        return folder or None

    def architectures_of(self, source: str) -> list[str]:
        """By the file's name: ..._sm80.cu for every GPU, ..._sm90.cu for Hopper alone."""
        if source.endswith("_sm80.cu"):
            return self.architectures
        hopper = any(a.startswith("9.0") for a in self.architectures)
        return ["9.0a"] if hopper and self.cutlass else []

    def macros(self) -> list[tuple[str, str | None]]:
        """For the C++ files, which say what is built and call it."""
        built = [("FUSEDRES_SM90", None)] if any("_sm90" in s for s in self.sources) else []
        text = f'"{self.version}, for {" ".join(self.architectures)}"'
        return [("FUSEDRES_CUDA", text), *built]

    def command(self, source: str, target: Path) -> list[str]:
        codes = []
        for name in self.architectures_of(source):
            kind = "compute" if name.endswith("+PTX") else "sm"
            codes.append(f"-gencode=arch=compute_{number(name)},code={kind}_{number(name)}")
        options = [f"-isystem={self.cutlass}"] if "_sm90" in source else []
        if self.release >= (12, 8):
            options.append("--compress-mode=size")  # a sixth of it
        options += ["-MMD", "-MF", str(target.with_suffix(".d"))]
        return [self.nvcc, "-c", source, "-o", str(target), *NVCC_FLAGS, *codes, *options]

    def compile(self, folder: Path) -> list[str]:
        """The object files of all sources; those that are up to date stay as they are."""
        folder.mkdir(parents=True, exist_ok=True)
        jobs, objects = [], []
        for source in self.sources:
            stem = Path(source).stem
            target, made_by, seen = (folder / f"{stem}{end}" for end in (".o", ".txt", ".d"))
            objects.append(str(target))
            command = self.command(source, target)
            read = re.findall(r"csrc/\S+", seen.read_text()) if seen.exists() else ["none"]
            known = target.exists() and all(map(os.path.exists, read))
            fresh = known and target.stat().st_mtime > max(map(os.path.getmtime, read))
            if not (fresh and made_by.exists() and made_by.read_text() == str(command)):
                jobs.append((command, made_by))

        at_once = int(os.environ["MAX_JOBS"])
        threads = max(1, at_once // max(1, len(jobs)))  # that nvcc spreads the architectures over

        def make(job: tuple[list[str], Path]) -> None:
            command, made_by = job
            print(run(*command, f"--threads={threads}"), end="")
            made_by.write_text(str(command))

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(make, jobs))
        return objects


def number(architecture: str) -> str:
    """ "9.0a" -> "90a" """
    return architecture.removesuffix("+PTX").replace(".", "")


def find_cuda(torch_cuda: str | None) -> Cuda | None:
    if flag("FORCE_ONLY_CPU") and flag("FORCE_CUDA"):
        sys.exit("fusedres: FORCE_ONLY_CPU=1 and FORCE_CUDA=1 are both set; unset one")
    if flag("FORCE_ONLY_CPU") or not glob("csrc/cuda/*.cu"):
        return None
    cuda = Cuda(torch_cuda)
    if not cuda.missing:
        if not cuda.cutlass:
            print(
                "fusedres: no CUTLASS, so the Hopper kernels are left out. For them: "
                "pip install nvidia-cutlass, or set FUSEDRES_CUTLASS",
                file=sys.stderr,
            )
        return cuda
    if flag("FORCE_CUDA"):
        sys.exit(f"fusedres: FORCE_CUDA=1 is set, but {cuda.missing}")
    print(f"fusedres: built without CUDA kernels: {cuda.missing}", file=sys.stderr)
    return None


def check_compiler() -> None:
    """One line instead of the many that a build without one ends in."""
    if {"egg_info", "sdist"} & {*sys.argv}:
        return
    instead = "or set FUSEDRES_SKIP_EXT=1 to build no extension"
    command = shlex.split(os.environ.get("CXX") or "c++")  # as torch's build does
    expected = f"expected g++ 11 or newer, of that name or named by CXX, {instead}"
    if not shutil.which(command[0]):
        sys.exit(f"fusedres: no C++ compiler {command[0]}, {expected}")
    probe = [*command, "-std=c++20", "-fsyntax-only", "-xc++", "-"]
    if subprocess.run(probe, input=CXX_PROBE, text=True, capture_output=True).returncode:
        version = run(*command, "--version").partition("\n")[0]
        sys.exit(f"fusedres: {command[0]} is '{version}' and knows no C++20, {expected}")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        sys.exit(f"fusedres: no Python.h in {include}, install e.g. python3-dev, {instead}")


def without(reason: str) -> dict:
    """setup() arguments that build no extension and leave a note why."""

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            folder = "." if self.editable_mode else self.build_lib
            Path(folder, "fusedres", NOTE).write_text(reason)

    return {"cmdclass": {"build_py": BuildPython}}


def extension() -> dict:
    """setup() arguments that build fusedres._C; where torch is missing, that build none."""
    if flag("FUSEDRES_SKIP_EXT"):
        return without("FUSEDRES_SKIP_EXT=1 was set")
    try:
        import torch
    except ImportError:
        print(
            "fusedres: torch is not importable here, so no extension is built. For the extension, "
            "install torch first, then: pip install --no-build-isolation .",
            file=sys.stderr,
        )
        return without("torch was not importable in the build, as in an isolated one")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        sys.exit(f"fusedres: found torch {torch.__version__}, needs torch >= 2.11")
    check_compiler()
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    cuda = find_cuda(torch.version.cuda)
    sources = set(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    options = {}
    if cuda is None:
        sources -= {"csrc/cuda_ops.cpp"}
    else:  # the runtime statically: the one of torch's package may be another version
        options = {
            "define_macros": cuda.macros(),
            "libraries": ["cudart_static", "rt", "pthread", "dl"],
            "library_dirs": [str(cuda.home / lib) for lib in ("lib64", "lib")],
        }

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            if cuda is not None:
                ext.extra_objects = cuda.compile(Path(self.build_temp) / "cuda")
            super().build_extension(ext)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            Path("fusedres", NOTE).unlink(missing_ok=True)  # of an earlier install without

    module = CppExtension(
        "fusedres._C",
        sorted(sources),
        depends=HEADERS,
        include_dirs=[os.path.abspath("csrc")] + ([str(cuda.home / "include")] if cuda else []),
        extra_compile_args=CXX_FLAGS,
        **options,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
