"""The CUDA kernels of the built extension, without a GPU: no spills, registers and shared memory
within limits, tensor cores and asynchronous copies where they belong.
"""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from fusedres.backends import native

THREADS = {"sm80": 256, "sm90": 512}  # of a block, by family
REGISTERS = 65536  # of a multiprocessor
# family -> architecture -> instructions that each 16-bit kernel must have
EXPECTED = {
    ("sm80", "sm_80"): ("HMMA", "LDGSTS"),
    ("sm80", "sm_90a"): ("HMMA", "LDGSTS"),
    ("sm90", "sm_90a"): ("HGMMA", "UTMALDG", "STSM", "USETMAXREG"),
}


def cuobjdump() -> str | None:
    """CUDA's or that of Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def why_not_built() -> str | None:
    if native.extension is None:
        return native.missing
    if native.extension.build_info()["cuda"] == "none":
        return "the extension was built without CUDA kernels"
    return None


def test_built_where_it_can_be():
    """With nvcc and a CUDA torch, an extension without CUDA kernels is a mistake of setup.py."""
    if not shutil.which("nvcc") or torch.version.cuda is None or native.extension is None:
        pytest.skip("needs nvcc, a CUDA build of torch and the extension")
    if os.environ.get("FORCE_ONLY_CPU", "0") not in ("", "0"):
        pytest.skip("FORCE_ONLY_CPU is set")
    assert why_not_built() is None


@pytest.fixture(scope="module")
def dump():
    """dump(*options): what cuobjdump says of the extension."""
    if why_not_built():
        pytest.skip(why_not_built())
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of CUDA or in Triton's package")

    def run(*options: str) -> str:
        command = [tool, *options, native.extension.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return cache(run)


def resources(text):
    """(architecture, kernel, {"REG": ..., "STACK": ...}) of each kernel."""
    architecture = None
    lines = iter(text.splitlines())
    for line in lines:
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\S+):", line):
            counts = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", next(lines))
            yield architecture, found[1], {name: int(count) for name, count in counts}


def code(text):
    """kernel -> its instructions."""
    parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def family_of(kernel: str) -> str:
    return re.search(r"residual_\w+?_(sm\d+)_kernel", kernel)[1]


def wrong(family, counts):
    """What is wrong with a kernel's use of registers and memory."""
    return (
        [name for name in ("STACK", "LOCAL") if counts[name]]
        + ["REG"] * (counts["REG"] * THREADS[family] > REGISTERS)
        + ["SHARED"] * (counts["SHARED"] > 1024)  # 1024 are the system's
    )


def test_registers_and_stack(dump):
    """No stack is no spill, and no local memory. On the GPUs that the kernels are made for."""
    known = {architecture for _, architecture in EXPECTED}
    found = [row for row in resources(dump("-res-usage")) if row[0] in known]
    told = [
        (architecture, kernel, counts)
        for architecture, kernel, counts in found
        if wrong(family_of(kernel), counts)
    ]
    assert not told, "\n".join(map(str, told))
    names = " ".join(kernel for _, kernel, _ in found)
    for name in ("forward_sm80", "backward_sm80", "sums_sm80"):
        assert f"residual_{name}_kernel" in names


@pytest.mark.parametrize("family, architecture", EXPECTED)
def test_instructions(family, architecture, dump):
    if architecture not in {built for built, _, _ in resources(dump("-res-usage"))}:
        pytest.skip(f"not built for {architecture}")
    kernels = {
        kernel: text
        for kernel, text in code(dump("-sass", "-arch", architecture)).items()
        if family_of(kernel) == family
    }
    if family == "sm90" and not kernels:
        pytest.skip("built without CUTLASS")
    half = 0
    for kernel, text in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{kernel} uses local memory"
        if "float16" not in kernel:  # nor bfloat16
            continue
        half += 1
        missing = [name for name in EXPECTED[family, architecture] if name not in text]
        # The product reads its operands from shared memory, by descriptors: "gdesc".
        assert not missing, f"{kernel} has no {missing}"
        assert "HGMMA" not in text or re.search(r"HGMMA\S* R\d+, gdesc", text)
    assert half >= 4


def test_the_extension_needs_no_driver(dump):
    """It must load on machines without one."""
    needed = subprocess.run(
        ["readelf", "-d", native.extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert libraries and not [name for name in libraries if re.match(r"libcud|libtorch_cuda", name)]


def test_spills_are_seen():
    usage = "REG:128 STACK:16 SHARED:1024 LOCAL:0"
    text = f"arch = sm_90a\n Function residual_forward_sm90_kernel:\n  {usage}"
    ((architecture, kernel, counts),) = resources(text)
    assert architecture == "sm_90a" and wrong(family_of(kernel), counts) == ["STACK"]
