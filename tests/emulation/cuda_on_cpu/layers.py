"""A case of cases.py by the launchers of csrc/cuda, on the emulated GPU.

Every tensor lies in guarded memory, inputs between columns of NaN where they are strided, and
outputs and workspaces start as NaN, so what is read or written in the wrong place shows.
"""

from ctypes import byref, c_uint64
from dataclasses import dataclass

import torch

from cuda_on_cpu import Memory
from cuda_on_cpu.structs import (
    DTYPES,
    BackwardOut,
    Device,
    ForwardOut,
    Layer,
    Matrix,
    SumsOut,
    Tile,
    Vector,
    address,
    index,
    keep_scale,
    kernels,
    matrix,
    stages,
)
from fusedres.reference import rows_per_sample
from fusedres.spec import ACTIVATIONS, NORMS

SPARSE = 1 << 26  # elements: from here on the columns between rows take no memory
VECTORS = ("bias", "norm_weight", "norm_bias", "gate")


@dataclass(frozen=True)
class Settings:
    """How a case runs: what must not change its result, and the device."""

    seed: int = 0  # of the order in which threads and blocks run
    resident: int = 3  # blocks at a time
    processors: int = 4
    shared_limit: int = 99 << 10  # the smallest of the GPUs from sm_80 on
    block: tuple[int, int] = (0, 0)  # rows and columns of a tile; 0: as planned
    groups: int = 0  # of programs that share a row block; 0: one for each tile
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
        self.dtype, self.y_dtype = case.tensors["weight"].dtype, case.dy.dtype
        t = {name: t.reshape(-1, t.shape[-1]) for name, t in case.tensors.items() if t.dim() > 1}
        self.t = {**case.tensors, **t}
        self.M, self.K = self.t["x"].shape
        self.N = len(self.t["weight"])
        self.casts = not self.spec.prologue and self.t["x"].dtype != self.dtype
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
            dtype=DTYPES.index(self.dtype),
            x_dtype=DTYPES.index(x.dtype),
            residual_dtype=DTYPES.index(residual.dtype),
            y_dtype=DTYPES.index(self.y_dtype),
            M=self.M,
            N=self.N,
            K=self.K,
            R=residual.shape[1],
            x=matrix(x),
            weight=matrix(self._input(t["weight"])),
            residual=matrix(residual),
            bias=self._vector("bias"),
            norm_weight=self._vector("norm_weight"),
            norm_bias=self._vector("norm_bias"),
            running_mean=self._vector("running_mean"),
            running_var=self._vector("running_var"),
            gate=self._vector("gate"),
            seed=address(self.seed),
            sample_rows=rows_per_sample(self.case.x),
            prologue=stages(spec.prologue),
            epilogue=stages(spec.epilogue),
            norm=index(spec.norm, NORMS),
            act=index(spec.activation, ACTIVATIONS),
            scalar_gate=spec.gate == "scalar",
            residual_is_x="residual" not in t,
            eps=spec.eps,
            residual_scale=spec.residual_scale,
            dropout=int(spec.dropout * 2**32),
            drop_path=int(spec.drop_path * 2**32),
            dropout_scale=keep_scale(spec.dropout),
            drop_path_scale=keep_scale(spec.drop_path),
        )

    def _drawn_seed(self) -> int:
        """The seed that the oracle draws."""
        torch.manual_seed(self.case.seed)
        return torch.randint(-(2**63), 2**63 - 1, (1,)).item()

    # launches

    def refusal(self, gradients=True):
        text = self.library.refusal(byref(self.layer), self.settings.shared_limit, gradients)
        return text and text.decode()

    def plan(self, name, out) -> Tile:
        tile, given = Tile(), self.settings
        device = Device(
            given.processors, given.shared_limit, *given.block, given.groups, *given.parts
        )
        plan = getattr(self.library, f"plan_of_{name}")
        plan(byref(self.layer), byref(out), byref(device), byref(tile))
        assert 0 <= tile.shared_bytes <= given.shared_limit
        return tile

    def _launch(self, name, out) -> Tile:
        """Plans, gives it a workspace, launches, and looks at all that must be as before."""
        tile, given = self.plan(name, out), self.settings
        launch = getattr(self.library, name)
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
        self.y = self._empty(self.M, self.N, dtype=self.y_dtype)
        self.z = self._empty(self.M, self.N) if self.keep and self.spec.saves_z else None
        rows = self.keep and self.spec.norm in ("layer", "rms")
        self.stats = self._empty(2, self.M, dtype=torch.float32) if rows else None
        self.operand = self._empty(self.M, self.K) if self.keep and self.casts else None
        kept = matrix(self.z), matrix(self.y), matrix(self.operand), address(self.stats)
        out = ForwardOut(*kept, None, None)
        self.tile = self._launch("forward", out)
        return self.y, self.z, self.stats

    def _without_what_backward_ignores(self) -> None:
        """x and residual as autograd.py keeps them: where backward must not look there is no more
        than a NaN, and behind it guarded memory.
        """
        spec, own = self.spec, "residual" not in self.t
        reads_x = spec.prologue or ("weight" in self.asked and not self.casts)
        if not reads_x and not (own and spec.saves_residual):
            self.layer.x = self._stand_in(self.t["x"].dtype)
        if own:
            self.layer.residual = self.layer.x
        elif not spec.saves_residual:
            self.layer.residual = self._stand_in(self.t["residual"].dtype)
        if "weight" not in self.asked:
            self.operand = None

    def _stand_in(self, dtype):
        return Matrix(address(self.memory.empty(1, dtype=dtype)), 0)

    def backward(self) -> dict[str, torch.Tensor]:
        """The gradients asked for, as oracle.py names them."""
        got = {f"d{n}": self._empty(*self.t[n].shape, dtype=self.t[n].dtype) for n in self.asked}
        summed = set(self.asked) - {"x", "residual"}
        dy = self._input(self.case.dy.reshape(self.M, self.N))
        users = {"norm_weight": "norm", "norm_bias": "norm", "gate": "gate", "residual": "add"}
        before = {n for n, stage in users.items() if stage in self.spec.prologue}
        self._without_what_backward_ignores()
        reads_dz = (self.spec.epilogue or self.y_dtype != self.dtype) and summed & {
            "weight",
            "bias",
        }
        reads_dt = self.spec.prologue and ("x" in self.asked or before & set(self.asked))
        dz = self._empty(self.M, self.N) if reads_dz else None
        dt = self._empty(self.M, self.K) if reads_dt else None
        means = self.library.wants_row_means(byref(self.layer))
        means = self._empty(2, self.M, dtype=torch.float32) if means else None
        first = BackwardOut(
            matrix(dy),
            matrix(self.z),
            address(self.stats),
            matrix(dz),
            matrix(dt),
            matrix(got.get("dx")),
            matrix(got.get("dresidual")),
            address(means),
            None,
            None,
        )
        self._launch("backward", first)
        if summed:
            vectors = [address(got.get(f"d{n}")) for n in VECTORS]
            matrices = matrix(self.operand), matrix(got.get("dweight"))
            self._launch("sums", SumsOut(first, *matrices, *vectors, None, None))
        return got


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
