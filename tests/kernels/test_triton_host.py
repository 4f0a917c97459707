"""What the Triton backend does before a launch: threads, streams' counters, tools it needs, export.

Kernels run by the interpreter, or by a driver that does nothing, in processes of their own, so that
nothing here needs a GPU.
"""

import os
import subprocess
import sys
import weakref
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from fusedres.backends import launch, tape, why_not
from fusedres.backends import triton as backend
from fusedres.spec import make_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

FIRST_USE_BY_THREADS = """
import threading
import torch
from fusedres import FusedResidual, backends
from fusedres.spec import make_spec

ready, chosen = threading.Barrier(4), []
spec, x = make_spec(), torch.randn(3, 16)

def first_use():
    ready.wait()
    chosen.append(backends.choose("triton", spec.text, torch.float32, x.device, 16, 16))

threads = [threading.Thread(target=first_use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert chosen == ["triton"] * 4
assert len(backends.triton._arenas) == 1
assert FusedResidual(16, backend="triton")(x).shape == (3, 16)
"""

SAVE = """
import sys, torch
from fusedres import FusedResidual
torch.manual_seed(0)
layer, x = FusedResidual(16, activation="gelu", backend="triton"), torch.randn(5, 16)
program = torch.export.export(layer, (x,), strict=False)
calls = [node for node in program.graph.nodes if node.op == "call_function"]
names = [str(node.target) for node in calls]
assert calls[names.index("fusedres.residual_layer.default")].args[-1] == "triton"
assert not [name for name in names if "zeros" in name or "empty" in name], names
arenas = list(sys.modules["fusedres.backends.triton"]._arenas.values())
assert [type(arena) for arena in arenas] == [torch.Tensor]  # made for real, and not in the graph
torch.export.save(program, sys.argv[1])
torch.save((x, layer(x).detach()), sys.argv[2])
"""

LOAD = """
import sys, torch, fusedres
program = torch.export.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert torch.equal(program.module()(x), y)
"""


def in_the_interpreter(script, *arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_four_threads_use_the_backend_first():
    in_the_interpreter(FIRST_USE_BY_THREADS)


def test_an_exported_program_loads_in_another_process(tmp_path):
    files = tmp_path / "layer.pt2", tmp_path / "values.pt"
    in_the_interpreter(SAVE, *files)
    in_the_interpreter(LOAD, *files)


LAUNCH_AGAIN = """
import sys, tempfile, torch
sys.path.insert(0, sys.argv[1])
import stub_driver
stub, given = stub_driver.install(tempfile.mkdtemp(), record=True)
from triton import knobs
from triton.runtime.jit import JITFunction
from fusedres.backends import launch, triton as backend
from fusedres.spec import make_spec

through, run = [], JITFunction.run
def counted(self, *args, **kwargs):
    through.append(self)
    return run(self, *args, **kwargs)
JITFunction.run = counted

def told(value):
    if isinstance(value, tuple):
        return tuple(map(told, value))
    return (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value

def launched(call):
    "What is launched: whether through Triton, and with which arguments past hooks and stream."
    through.clear(), given.clear()
    before = stub.stub_launches()
    call()
    assert stub.stub_launches() - before == len(given) > 0
    return len(through), [(args[:3], told(args[9:])) for args in given]

for settings in ({}, {"M": 520, "norm": "batch"}, {"order": "preact"}, {"N": 300, "K": 300}):
    for call in stub_driver.layer(**{"M": 64, "N": 32, "K": 32, **settings}):
        call()
        launch._calls.clear()
        first, again = launched(call), launched(call)
        assert first[0] == len(first[1]) and again[0] == 0, (settings, first[0], again[0])
        assert first[1] == again[1], settings
        knobs.runtime.launch_enter_hook = seen = lambda metadata: None
        assert launched(call)[0] == len(first[1])  # a profiler's hook is called by Triton
        knobs.runtime.launch_enter_hook = None
        assert launched(call)[0] == 0

# Whatever Triton compiles another kernel for goes by Triton the first time.
x, w = torch.randn(65, 32), torch.randn(32, 32)
spec = str(make_spec("note", None, "gelu"))
def forward(x, w, spec=spec):
    return launched(lambda: backend.residual_forward(x, w, *[None] * 8, 1, spec, False))[0]
odd = torch.randn(64 * 32 + 1)[1:].view(64, 32)
for x in (x[:64], odd, x, x[:64].half()):
    w = w.to(x.dtype)
    assert (forward(x, w), forward(x, w)) == (1, 0)

# Another number of rows cuts the work otherwise and compiles nothing anew.
from fusedres.kernels import backward, products
kernels = backward.residual_backward_kernel, products.residual_products_kernel
def compiled():
    return [len(kernel.device_caches[0][0]) for kernel in kernels]

counts = []
for M in (4096, 4224, 8192):  # 64, 66 and 128 walkers, 16, 17 and 32 splits
    stub_driver.layer("preact", M=M, N=32, K=32)[1]()
    counts.append(compiled())
assert counts[0] == counts[1] == counts[2] and all(counts[0]), counts
"""


def test_a_later_launch_goes_past_triton_with_the_same_arguments():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", LAUNCH_AGAIN, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_call_is_computed_once_and_calls_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(launch, "MOST_CALLS", 2)
    x, computed = torch.empty(3, 8), []

    def call_of(*tensors):
        return launch.call_of(tuple(launch.key_of(tensors)))

    call = call_of(x, None)
    for _ in range(2):
        assert call.once("sum", lambda a, b: computed.append(0) or a + b, 1, 2) == 3
    assert len(computed) == 1 and call_of(x, None) is call
    others = (x.t(), x[:2], x.half(), x.to("meta"), torch.empty(25)[1:].view(3, 8))
    assert len({tuple(launch.key_of((t, None))) for t in (x, *others)}) == 6
    for rows in range(5):
        call_of(x[:rows], None)
        assert len(launch._calls) <= 2


class Pair(NamedTuple):
    tensor: object
    number: int


def test_a_tape_repeats_its_steps_on_other_tensors_and_keeps_none():
    x, y = torch.ones(3), torch.full((3,), 2.0)
    taken = tape.Tape((x, y, None, x))
    a, b, _, c = taken.inputs
    total = taken.do(torch.add, a, b)
    taken.do(lambda pair, out: out.add_(pair.tensor[0] * pair.number), Pair((c, "c"), 10), total)
    assert taken.do(lambda: None) is None
    wide = taken.do(torch.cat, (total, a))
    assert wide.tolist() == [13.0] * 3 + [1.0] * 3
    taken.end([wide, total])
    made = [weakref.ref(t) for t in (a, b, c, total, wide)]
    del a, b, c, total, wide
    assert not any(t() is not None for t in made)
    again = taken.repeat((y, x, None, torch.full((3,), 4.0)))  # x and c need not be one tensor
    assert [t.tolist() for t in again] == [[43.0] * 3 + [2.0] * 3, [43.0] * 3]


def test_a_tensor_from_elsewhere_cannot_go_on_a_tape():
    with pytest.raises(KeyError):
        tape.Tape((torch.ones(3),)).do(torch.neg, torch.ones(3))


# Arrival counters


@pytest.fixture
def nothing_prepared(monkeypatch):
    monkeypatch.setattr(backend, "_arenas", {})
    monkeypatch.setattr(backend, "_slots", {})


def test_a_stream_clears_its_own_counters_and_only_once(nothing_prepared):
    backend.prepare(CPU)
    backend._arenas[CPU].fill_(7)
    first, second = backend._new_slot(CPU, 1), backend._new_slot(CPU, 2)
    assert first.data_ptr() != second.data_ptr()
    assert len(first) == len(second) == backend.SLOT
    assert not first.any() and not second.any()
    assert (backend._arenas[CPU][2 * backend.SLOT :] == 7).all()
    first[0] = 1
    assert backend._new_slot(CPU, 1)[0] == 1


def test_counters_are_zeros_for_streams_without_a_slot_and_for_large_launches(nothing_prepared):
    backend.prepare(CPU)
    for stream in range(backend.SLOTS):
        assert backend._new_slot(CPU, stream + 1).numel()
    x = torch.empty(0)
    for count in (5, backend.SLOT, backend.SLOT + 1):
        counters = backend._counters(x, count)
        assert len(counters) >= count and not counters.any()
    assert not backend._new_slot(CPU, 0).numel()


def test_counters_made_in_inference_mode_serve_training(nothing_prepared):
    with torch.inference_mode():
        backend._counters(torch.empty(0), 1)
    assert not backend._new_slot(CPU, 1).is_inference()


# Without a C compiler


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU; what `without_compiler` found is forgotten."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.delenv("CC", raising=False)
    backend.without_compiler.cache_clear()
    yield lambda: why_not("triton", make_spec(), torch.float32, CUDA, 64, 64)
    backend.without_compiler.cache_clear()


def test_no_c_compiler_is_a_reason(gpu, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in gpu()
    monkeypatch.undo()
    assert "no C compiler" in backend.without_compiler()  # asked once a process


def test_a_compiler_of_one_s_own_that_is_not_there_is_a_reason(gpu, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in gpu()


def test_no_headers_of_python_are_a_reason(gpu, monkeypatch, tmp_path):
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda scheme: paths)
    assert "Python.h" in gpu()
    (tmp_path / "Python.h").touch()
    backend.without_compiler.cache_clear()
    assert gpu() is None
