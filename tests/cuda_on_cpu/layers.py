"""A case of cases.py by the launchers of csrc/cuda, on the emulated GPU.

Every tensor lies in guarded memory, inputs between columns of NaN where they are strided, and
outputs and workspaces start as NaN, so what is read or written in the wrong place shows.
"""

import ctypes
from ctypes import Structure, byref, c_bool, c_float, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch

from cuda_on_cpu import HERE, ROOT, Memory, load
from fusedres.reference import rows_per_sample
from fusedres.spec import ACTIVATIONS, NORMS, STAGES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STAGES = 6
SPARSE = 1 << 26  # elements: from here on the columns between rows take no memory
VECTORS = ("bias", "norm_weight", "norm_bias", "gate")
KERNELS = ("forward_sm80.cu", "backward_sm80.cu", "sums_sm80.cu")


# ---- csrc/cuda/layer.h


class Stages(Structure):
    _fields_ = [("stage", c_int * MOST_STAGES), ("count", c_int)]


class Vector(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Layer(Structure):
    _fields_ = [
        ("dtype", c_int), ("M", c_int64), ("N", c_int64), ("K", c_int64), ("R", c_int64),
        ("x", Matrix), ("weight", Matrix), ("residual", Matrix), ("bias", Vector),
        ("norm_weight", Vector), ("norm_bias", Vector), ("running_mean", Vector),
        ("running_var", Vector), ("gate", Vector), ("seed", c_void_p), ("sample_rows", c_int64),
        ("prologue", Stages), ("epilogue", Stages), ("norm", c_int), ("act", c_int),
        ("scalar_gate", c_bool), ("residual_is_x", c_bool), ("eps", c_float),
        ("residual_scale", c_float), ("dropout", c_uint64), ("drop_path", c_uint64),
        ("dropout_scale", c_float), ("drop_path_scale", c_float),
    ]  # fmt: skip


class Tile(Structure):
    _fields_ = [
        ("block_m", c_int), ("block_n", c_int), ("parts", c_int), ("sum_parts", c_int),
        ("programs", c_int64), ("shared_bytes", c_int), ("partial_floats", c_int64),
        ("counters", c_int64),
    ]  # fmt: skip


class ForwardOut(Structure):
    _fields_ = [
        ("z", Matrix), ("y", Matrix), ("stats", c_void_p), ("partial", c_void_p),
        ("arrived", c_void_p),
    ]  # fmt: skip


class BackwardOut(Structure):
    _fields_ = [
        ("dy", Matrix), ("z", Matrix), ("stats", c_void_p), ("dz", Matrix), ("dt", Matrix),
        ("dx", Matrix), ("dresidual", Matrix), ("row_means", c_void_p), ("partial", c_void_p),
        ("arrived", c_void_p),
    ]  # fmt: skip


class SumsOut(Structure):
    _fields_ = [
        ("from_", BackwardOut), ("dweight", Matrix), ("dbias", c_void_p),
        ("dnorm_weight", c_void_p), ("dnorm_bias", c_void_p), ("dgate", c_void_p),
        ("partial", c_void_p), ("arrived", c_void_p),
    ]  # fmt: skip


class Device(Structure):
    """Of launchers.cpp."""

    _fields_ = [
        (name, c_int)
        for name in ["processors", "shared_limit", "block_m", "block_n", "parts", "sum_parts"]
    ]


STRUCTS = (Stages, Vector, Matrix, Layer, Tile, ForwardOut, BackwardOut, SumsOut)


@cache
def kernels(watched: bool = False, root=ROOT) -> ctypes.CDLL:
    """The sm_80 kernels as a library."""
    sources = [HERE / "launchers.cpp", *(root / "csrc" / "cuda" / name for name in KERNELS)]
    return prepared(load("kernels", *sources, watched=watched, root=root))


def prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    found = (ctypes.c_size_t * (2 * len(STRUCTS)))()
    library.layouts(found)
    for struct, size, last in zip(STRUCTS, found[::2], found[1::2], strict=True):
        ours = ctypes.sizeof(struct), getattr(struct, struct._fields_[-1][0]).offset
        assert ours == (size, last), f"{struct.__name__}: {ours} here, {(size, last)} in layer.h"
    for name in ("refusal", "forward", "backward", "sums"):
        getattr(library, name).restype = ctypes.c_char_p
    library.wants_row_means.restype = c_bool
    return library


# ---- one call


@dataclass(frozen=True)
class Settings:
    """How a case runs: what must not change its result, and the device."""

    seed: int = 0  # of the order in which threads and blocks run
    resident: int = 3  # blocks at a time
    processors: int = 4
    shared_limit: int = 99 << 10  # the smallest of the GPUs from sm_80 on
    block: tuple[int, int] = (0, 0)  # rows and columns of a tile; 0: as planned
    parts: tuple[int, int] = (0, 0)  # of the rows in residual_sums; 0: as planned
    gap: int = 0  # columns between the rows of x, residual, weight and dy
    shift: int = 0  # elements from the 16-byte boundary on where they start
    watched: bool = False


class Call:
    """One case's tensors in guarded memory, launched step by step. Use it in `with`."""

    def __init__(self, case, settings=None, *, asked=None, keep=True, library=None) -> None:
        """`keep`: forward keeps what backward needs. `asked`: the gradients wanted."""
        self.case, self.settings, self.spec = case, settings or Settings(), case.spec
        self.asked = case.asked if asked is None else asked
        self.keep, self.library = keep, library or kernels(self.settings.watched)
        self.memory, self.inputs = Memory(self.library), []
        self.dtype = case.x.dtype
        t = {name: t.reshape(-1, t.shape[-1]) for name, t in case.tensors.items() if t.dim() > 1}
        self.t = {**case.tensors, **t}
        self.M, self.K = self.t["x"].shape
        self.N = len(self.t["weight"])
        self.layer = self._layer()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.memory.__exit__()

    # tensors

    def _input(self, t):
        """A copy of t and the bytes around it, which must stay as they are."""
        if t.dim() == 1:
            placed = self._empty(len(t), dtype=t.dtype).copy_(t)
            self.inputs.append((placed, placed.clone()))
            return placed
        rows, columns = t.shape
        stride, shift = columns + self.settings.gap, self.settings.shift
        size = shift + rows * stride
        small = size < SPARSE
        whole = self._empty(size, dtype=t.dtype) if small else Memory.sparse(size, t.dtype)
        placed = whole[shift:].view(rows, stride)[:, :columns]
        placed.copy_(t)
        watched = whole if small else placed
        self.inputs.append((watched, watched.clone()))
        return placed

    def _empty(self, *shape, dtype=None):
        """Starts as aligned as an allocator has it, and ends at a page where that goes along with
        it, or where alignment is not wanted.
        """
        dtype = dtype or self.dtype
        size = dtype.itemsize
        for n in shape:
            size *= n
        return self.memory.empty(
            *shape, dtype=dtype, flush_to_end=size % 16 == 0 or bool(self.settings.shift)
        )

    # structs

    def _vector(self, name):
        t = self.t.get(name)
        if t is None:
            return Vector(None, 0)
        return Vector(address(self._input(t)), DTYPES.index(t.dtype))

    def _layer(self):
        spec, t = self.spec, self.t
        x = self._input(t["x"])
        residual = self._input(t["residual"]) if "residual" in t else x
        self.seed = self._input(torch.tensor([self._drawn_seed()]))
        return Layer(
            dtype=DTYPES.index(self.dtype), M=self.M, N=self.N, K=self.K, R=residual.shape[1],
            x=matrix(x), weight=matrix(self._input(t["weight"])), residual=matrix(residual),
            bias=self._vector("bias"), norm_weight=self._vector("norm_weight"),
            norm_bias=self._vector("norm_bias"), running_mean=self._vector("running_mean"),
            running_var=self._vector("running_var"), gate=self._vector("gate"),
            seed=address(self.seed), sample_rows=rows_per_sample(self.case.x),
            prologue=stages(spec.prologue), epilogue=stages(spec.epilogue),
            norm=index(spec.norm, NORMS), act=index(spec.activation, ACTIVATIONS),
            scalar_gate=spec.gate == "scalar", residual_is_x="residual" not in t,
            eps=spec.eps, residual_scale=spec.residual_scale,
            dropout=int(spec.dropout * 2**32), drop_path=int(spec.drop_path * 2**32),
            dropout_scale=keep_scale(spec.dropout), drop_path_scale=keep_scale(spec.drop_path),
        )  # fmt: skip

    def _drawn_seed(self) -> int:
        """The seed that the oracle draws."""
        torch.manual_seed(self.case.seed)
        return torch.randint(-(2**63), 2**63 - 1, (1,)).item()

    # launches

    def refusal(self, gradients=True):
        text = self.library.refusal(byref(self.layer), self.settings.shared_limit, gradients)
        return text and text.decode()

    def _launch(self, name, out) -> Tile:
        """Plans, gives it a workspace, launches, and looks at all that must be as before."""
        tile, given = Tile(), self.settings
        device = Device(given.processors, given.shared_limit, *given.block, *given.parts)
        plan, launch = (getattr(self.library, n) for n in (f"plan_of_{name}", name))
        plan(byref(self.layer), byref(out), byref(device), byref(tile))
        assert 0 <= tile.shared_bytes <= given.shared_limit
        out.partial = address(self._empty(tile.partial_floats, dtype=torch.float32))
        arrived = self._empty(tile.counters, dtype=torch.int32).zero_()
        out.arrived = address(arrived)
        self.library.emulator_set(c_uint64(given.seed), given.resident)
        error = launch(byref(self.layer), byref(out), byref(tile))
        assert error is None, f"{name} of '{self.spec}', {self.dtype}: {error.decode()}"
        for whole, before in self.inputs:
            assert same_bytes(whole, before), f"{name} wrote into an input or beside it"
        assert not arrived.any(), f"{name} left {arrived.tolist()} in its counters"
        assert self.library.emulator_intact(), f"{name} wrote beside a buffer"
        return tile

    def forward(self):
        """y, z and stats, the latter None where nothing is kept."""
        self.y = self._empty(self.M, self.N)
        self.z = self._empty(self.M, self.N) if self.keep and self.spec.saves_z else None
        rows = self.keep and self.spec.norm in ("layer", "rms")
        self.stats = self._empty(2, self.M, dtype=torch.float32) if rows else None
        out = ForwardOut(matrix(self.z), matrix(self.y), address(self.stats), None, None)
        self.tile = self._launch("forward", out)
        return self.y, self.z, self.stats

    def backward(self) -> dict[str, torch.Tensor]:
        """The gradients asked for, as oracle.py names them."""
        got = {f"d{n}": self._empty(*self.t[n].shape, dtype=self.t[n].dtype) for n in self.asked}
        summed = set(self.asked) - {"x", "residual"}
        dy = self._input(self.case.dy.reshape(self.M, self.N))
        dz = self._empty(self.M, self.N) if summed or self.spec.prologue else None
        dt = self._empty(self.M, self.K) if self.spec.prologue else None
        means = self.library.wants_row_means(byref(self.layer))
        means = self._empty(2, self.M, dtype=torch.float32) if means else None
        first = BackwardOut(
            matrix(dy), matrix(self.z), address(self.stats), matrix(dz), matrix(dt),
            matrix(got.get("dx")), matrix(got.get("dresidual")), address(means), None, None,
        )  # fmt: skip
        self._launch("backward", first)
        if summed:
            vectors = [address(got.get(f"d{n}")) for n in VECTORS]
            self._launch("sums", SumsOut(first, matrix(got.get("dweight")), *vectors, None, None))
        return got


def address(t):
    return None if t is None else t.data_ptr()


def matrix(t):
    return Matrix(None, 0) if t is None else Matrix(t.data_ptr(), t.stride(0))


def stages(names) -> Stages:
    numbers = [STAGES.index(name) for name in names]
    return Stages((c_int * MOST_STAGES)(*numbers), len(numbers))


def index(name, names) -> int:
    return 0 if name is None else 1 + names.index(name)


def keep_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def same_bytes(a, b) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def emulated(case, settings=None, asked=None) -> dict[str, torch.Tensor]:
    """y and the gradients asked for, as oracle.fused gives them."""
    asked = case.asked if asked is None else asked
    with Call(case, settings, asked=asked) as call:
        y, _, _ = call.forward()
        results = {"y": y.view(case.dy.shape)}
        if asked:
            grads = call.backward()
            results |= {f"d{n}": grads[f"d{n}"].view(case.tensors[n].shape) for n in asked}
        return {name: t.clone() for name, t in results.items()}
