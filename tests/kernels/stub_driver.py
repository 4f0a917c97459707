"""Host time of the Triton backend without a GPU: the real JIT and launcher, a driver of no use.

`python tests/kernels/stub_driver.py` prints microseconds of a forward and a backward. Operands lie
in the CPU's memory; kernels are compiled for sm_90 and never run, so numbers mean nothing.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "driver/libcuda.c"


def install(folder, record=False):
    """Makes the stub the active driver; to be called before Triton has one. Returns the library,
    and a list to which every launch adds what the launcher in C was given, if they are to be kept.
    """
    library = Path(folder, "libcuda.so.1")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", SOURCE, "-o", library]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    given = []

    class Launcher(CudaLauncher):
        def __call__(self, *args):
            given.append(args)
            super().__call__(*args)

    class Driver:
        utils, launcher_cls = CudaUtils(), Launcher if record else CudaLauncher

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    torch.mm = torch.addmm = lambda *args, **kwargs: None  # the library's products cost no time
    return stub, given


def microseconds(run, calls=50, rounds=100):
    """Of the thread's own time, in the fastest round."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        found.append((time.thread_time() - start) / calls * 1e6)
    return min(found)


def layer(order="note", norm="layer", M=256, N=256, K=256, dtype=torch.bfloat16):
    """forward, backward of a layer that trains, straight from the backend."""
    from fusedres.backends import triton as backend
    from fusedres.spec import make_spec

    spec = make_spec(order, norm, "gelu", training=True)
    torch.manual_seed(0)
    C = spec.width("norm", K, N)
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    tensors = [t.to(dtype) for t in (x, weight, bias, torch.ones(C), torch.zeros(C))]
    operands = (*tensors, None, None, None, None, None, 1, str(spec))
    saved = backend.residual_forward(*operands, True)[1:]
    dy, needs = torch.randn(M, N).to(dtype), 0b11111
    return (
        lambda: backend.residual_forward(*operands, True),
        lambda: backend.residual_backward(dy, saved, *operands, needs),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        stub, _ = install(folder)
        for order in ("note", "preact"):  # small, or malloc counts
            told = []
            for run in layer(order, M=64, N=64, K=64):
                before = stub.stub_launches()
                run()
                launches = stub.stub_launches() - before
                told.append(f"{microseconds(run):.1f} us ({launches} launches of our own)")
            print(f"{order}: forward {told[0]}, backward {told[1]}")
