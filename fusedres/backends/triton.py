"""The Triton backend: every order, one launch forward, at most three backward.

Importing this module imports Triton; without Triton it still imports, and `why_not` says so.
"""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
import threading
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import activations
from ..checks import check_fits
from ..operands import DIFFERENTIABLE, Operands, Outputs
from ..spec import ACTIVATIONS, Spec
from . import plan as planner
from .launch import Call, call_of, key_of, places
from .plan import Plan, WholePlan, ceil_div
from .tape import Tape

try:
    import triton
    import triton.language as tl

    from ..kernels import backward, by_tanh, epilogue, forward, products, prologue
    from ..kernels.moments import GROUP
    from ..kernels.stages import StageOperands
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANDOM = {"dropout", "droppath"}


def why_not(spec: Spec, dtype: torch.dtype, device: torch.device, N: int, K: int) -> str | None:
    """None if these kernels can run a layer of N outputs and K inputs, else the reason."""
    if triton is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels do not take {dtype}"
    if max(N, K) > planner.MOST_COLUMNS:
        return f"{max(N, K)} features are too many for one launch (limit {planner.MOST_COLUMNS})"
    if spec.activation is not None and spec.activation not in ACTIVATIONS:
        reason = activations.why_not_triton(spec.activation)
        if reason is not None:
            return reason
    return _why_not_on(device)


def interpreting() -> bool:
    return triton.knobs.runtime.interpret


@cache
def without_compiler() -> str | None:
    """Why Triton cannot build its launchers in C, as its runtime/build.py would; else None."""
    if triton.knobs.build.impl is not None:
        return None
    own = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if own is None else (own,))):
        return f"Triton finds no C compiler ({'gcc or clang on PATH' if own is None else own})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else f"Triton needs Python's headers: there is no {header}"


def _why_not_on(device: torch.device) -> str | None:
    if interpreting():
        return None if device.type in ("cpu", "cuda") else f"device is {device}"
    if device.type != "cuda":
        return f"device is {device} and TRITON_INTERPRET is not set"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        told = ".".join(map(str, capability))
        return f"{device} has compute capability {told}, the kernels need 8.0"
    return without_compiler()


def _functions(spec: Spec, dtype: torch.dtype) -> tuple[Any, Any]:
    """By the tanh instruction only where nothing has more digits than it: all is bf16."""
    return activation_functions(spec.activation, torch.float32 if spec.dtypes else dtype)


def activation_functions(name: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Value and derivative of an activation as jitted functions, for tensors of `dtype`."""
    if dtype == torch.bfloat16 and name in by_tanh.ACTIVATIONS:
        return by_tanh.ACTIVATIONS[name]
    if name is None or name in ACTIVATIONS:
        return epilogue.ACTIVATIONS[name]
    return activations.triton_functions(name)


class Side(NamedTuple):
    """The stages on one side of `linear`, cut at the norm if it is here."""

    before: tuple[str, ...]  # without a norm here: none
    norm: bool
    after: tuple[str, ...]

    @classmethod
    def of(cls, stages: tuple[str, ...]) -> Side:
        if "norm" not in stages:
            return cls((), False, stages)
        at = stages.index("norm")
        return cls(stages[:at], True, stages[at + 1 :])


def alignment(N: int, *matrices: Tensor | None) -> int:
    """The largest power of two that divides N and their widths and row strides, for `aligned` of
    kernels/stages.py: 1 from 16 on, which Triton asks of each argument itself.
    """
    found = (t for t in matrices if t is not None)
    common = math.gcd(16, N, *(size for t in found for size in (t.shape[1], t.stride(0))))
    return common if common < 16 else 1


def between_rows(*matrices: Tensor | None) -> int:
    """The largest power of two up to 16 that divides what lies from row to row, for the planner;
    of matrices whose columns are adjacent.
    """
    found = (t for t in matrices if t is not None and t.stride(1) == 1)
    return math.gcd(16, *(t.stride(0) for t in found))


def stage_operands(
    spec: Spec, o: Operands, stats: Any, align: int = 1, ready: Call | None = None
) -> StageOperands:
    """What the stages read; `stats`, (2, C) or a pair: this batch's mean and biased variance."""
    shortcut = (o.x if o.residual is None else o.residual) if spec.adds else None
    mean, var = o.running_mean, o.running_var
    if spec.batch_stats and stats is not None:
        mean, var = stats.unbind() if isinstance(stats, Tensor) else stats
    numbers = (ready or Call()).once("numbers", _stage_numbers, spec, o, shortcut, align)
    return StageOperands(o.norm_weight, o.norm_bias, mean, var, o.gate, shortcut, o.seed, *numbers)


def _stage_numbers(spec: Spec, o: Operands, shortcut: Tensor | None, align: int) -> tuple[Any, ...]:
    """The fields of StageOperands from R on."""
    p, q = spec.dropout, spec.drop_path
    sizes = (0, 0, 0) if shortcut is None else (shortcut.shape[1], *shortcut.stride())
    return (
        sizes[0], int(spec.gate != "scalar"), *sizes[1:], o.sample_rows,
        int(p * 2**32), int(q * 2**32),
        1 / (1 - p) if p < 1 else 0.0, 1 / (1 - q) if q < 1 else 0.0,
        spec.residual_scale, spec.eps, tl.constexpr(align),
    )  # fmt: skip


def residual_forward(*call: Any) -> list[Tensor]:
    """y, z, stats and operand (`Operands.empty_outputs`) of (*operands, recipe, save).

    x (M, K) and residual (M, R) of any strides. The product is in weight's dtype. A row's
    statistics are its mean and 1 / sqrt(variance + eps).
    """
    *operands, recipe, save = call
    return forward_of(Operands(*operands), recipe, save).list()


def forward_of(o: Operands, recipe: str, save: bool, out: Outputs | None = None) -> Outputs:
    """The same of operands in their record; into `out`, where that is given."""
    spec, device = Spec.parse(recipe), planner.device_of(o.x.device)
    exact = o.weight.dtype != torch.float32 or _precision()
    where = None if out is None else places(out)
    ready = call_of((recipe, save, device, exact, o.sample_rows, where, *key_of(o[:-1])))
    ready.once("checked", check_fits, spec, o)
    out = ready.outputs(o, spec, save) if out is None else out
    if out.y.numel():
        _launch_forward(spec, ready.once("plan", _plan, spec, o, device), o, out, ready)
    return out


def _plan(spec: Spec, o: Operands, device: planner.Device) -> Plan:
    (M, K), N = o.x.shape, o.weight.shape[0]
    align = between_rows(o.x, o.weight, o.residual)
    return planner.plan(spec, o.weight.dtype, M, N, K, device, None, align)


def _forward_constants(spec: Spec, chosen: Plan, dtype: torch.dtype) -> dict[str, Any]:
    before = () if chosen.apart else spec.prologue
    side = Side.of(before if "norm" in before else spec.epilogue)
    after = chosen.family in ("rows", "wide", "columns", "batch")
    found = {
        "PROLOGUE": before, "BEFORE": () if chosen.over == "given" else side.before,
        "EPILOGUE": ("norm", *side.after) if after else spec.epilogue,
        "ACT": _functions(spec, dtype)[0], "PRECISION": _precision(),
        **chosen.tile.options(dtype.itemsize),
    }  # fmt: skip
    if chosen.family not in planner.COOPERATIVE:
        found["CENTRED"] = spec.norm != "rms"
        found |= {} if chosen.family == "wide" else {"OVER": chosen.over}
    return found


def _launch_forward(
    spec: Spec, chosen: Plan, o: Operands, out: Outputs, ready: Call | None = None
) -> None:
    ready = ready or Call()
    x, weight, (y, z, stats, operand) = o.x, o.weight, out
    (M, K), N = x.shape, weight.shape[0]
    tile, family = chosen.tile, chosen.family
    constants = ready.once("constants", _forward_constants, spec, chosen, weight.dtype)
    kernel = getattr(forward, chosen.kernel)
    align = ready.once("align", alignment, N, x, weight, o.residual)
    p = stage_operands(spec, o, stats, align, ready)
    meets = family in planner.COOPERATIVE
    if z is None and family in ("wide", "batch"):
        z = y  # until it is finished
    with torch.cuda.device_of(x):
        if chosen.apart:
            x = weight.new_empty((M, K))
            made = ready.once("prologue", prologue_constants, spec, weight.dtype, K)
            rows = stats if "norm" in spec.prologue else None
            launch_prologue(ready, o.x, p, x, rows, made)
        results: tuple[Any, ...] = (z, y, stats, operand)
        sizes = (M, N, K, *([chosen.walkers] if meets else []), *x.stride(), *weight.stride())
        if meets:
            width, step = (N, tile.BLOCK_N) if family == "batch" else (K, tile.BLOCK_K)
            partial = x.new_empty((3, chosen.walkers, width), dtype=torch.float32)
            results += (partial, _counters(x, 2 + ceil_div(width, step)))
        elif family == "wide":
            partial = x.new_empty((3, ceil_div(N, tile.BLOCK_N), M), dtype=torch.float32)
            results += (partial, _counters(x, ceil_div(M, tile.BLOCK_M)))
        args = (x, weight, o.bias, p, *results, *sizes)
        launch = _launch_cooperative if meets else Call.launch
        launch(ready, kernel, chosen.programs, args, constants)


def prologue_constants(spec: Spec, dtype: torch.dtype, K: int, known: bool = False) -> Any:
    """Of `launch_prologue` for x of K features; `known`: statistics of rows are there already."""
    rows = "norm" in spec.prologue and spec.norm != "batch"
    over = ("stats" if known else "rows of x") if rows else "given"
    height, width = planner.pass_tile(K)
    return {
        "BEFORE": Side.of(spec.prologue).before, "PROLOGUE": spec.prologue, "OVER": over,
        "CENTRED": spec.norm != "rms", "ACT": _functions(spec, dtype)[0],
        "BLOCK_M": height, "BLOCK_K": width, "num_warps": 8,
    }  # fmt: skip


def launch_prologue(
    ready: Call, x: Tensor, p: StageOperands, t: Tensor, stats: Tensor | None, constants: Any
) -> None:
    """t = what the stages before `linear` make of x: one launch."""
    programs = ceil_div(x.shape[0], constants["BLOCK_M"])
    args = (x, p, t, stats, *x.shape, *x.stride())
    ready.launch(prologue.residual_prologue_kernel, programs, args, constants, "prologue alone")


def residual_backward(dy: Tensor, saved: list[Tensor], *call: Any) -> list[Tensor]:
    """The gradients of those of DIFFERENTIABLE whose bit is set in `needs`, shaped and typed like
    them, of (dy, saved, *operands, recipe, needs).

    dy (M, N) of any strides, z and stats as `residual_forward` saved them. At most three launches:
    what is row by row after the product, both products, what is row by row before it. Five where
    the library's two products of what stages before `linear` make of x are faster.
    """
    *operands, recipe, needs = call
    return list(backward_of(dy, saved, Operands(*operands), recipe, needs).values())


def backward_of(
    dy: Tensor,
    saved: list[Tensor],
    o: Operands,
    recipe: str,
    needs: int,
    into: dict[str, Tensor] | None = None,
    dz: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same of operands in their record, by name. `into`: contiguous memory for some of them,
    else each gets its own. `dz` (M, N): where the product's gradient goes, in place of a product
    with what was multiplied; of recipes without a stage before ``linear``.
    """
    into = into or {}
    tensors = (dy, *saved, *o[:-1], *into.values(), dz)
    device = planner.device_of(dy.device)
    exact = o.weight.dtype != torch.float32 or _precision()
    key = (recipe, needs, device, exact, o.sample_rows, len(saved), *into)
    ready = call_of((*key, *key_of(tensors)))
    with torch.cuda.device_of(dy):
        if ready.tape is None:
            tape = Tape(tensors)
            found = _first_backward(tape, ready, device, len(saved), o, recipe, needs, [*into])
            tape.end(list(found.values()))
            ready.known["gradients"], ready.tape = list(found), tape
            return found
        again = ready.tape.repeat(tensors)
        return dict(zip(ready.known["gradients"], again, strict=True))


def _first_backward(
    tape: Tape, ready: Call, device: planner.Device, saved: int, like: Operands, *call: Any
) -> dict[str, Tensor]:
    """`backward_of` on the tape's inputs: dy, as many saved tensors, operands like these, memory
    for the gradients named last, dz.
    """
    recipe, needs, names = call
    inputs: list[Any] = tape.inputs
    dy, given, rest, dz = inputs[0], inputs[1 : 1 + saved], inputs[1 + saved : -1], inputs[-1]
    operands = rest[: len(like) - 1]
    into = dict(zip(names, rest[len(operands) :], strict=True))
    spec, o = Spec.parse(recipe), Operands._make((*operands, like.sample_rows))
    kept = Outputs(dy, *_kept(spec, given))
    check_fits(spec, o, dy, kept.z)
    grads = {
        name: into[name] if name in into else _like(tape, t)
        for i, (name, t) in enumerate(zip(DIFFERENTIABLE, operands, strict=False))
        if needs >> i & 1
    }
    if dy.numel() and (o.x.numel() or not spec.prologue):
        _Backward(spec, o, dy, kept, grads, device, ready, tape, dz).run()
    else:
        for grad in grads.values():
            tape.do(Tensor.zero_, grad)
    return grads


def _kept(spec: Spec, saved: list[Tensor]) -> list[Tensor | None]:
    """z, stats and operand among what forward saved."""
    has_stats = spec.norm is not None and (spec.norm != "batch" or spec.batch_stats)
    given = iter(saved)
    return [next(given) if has else None for has in (spec.saves_z, has_stats, spec.casts)]


def _like(tape: Tape, t: Tensor) -> Tensor:
    """Of t's shape and dtype, contiguous, unwritten."""
    if t.is_contiguous():
        return tape.do(torch.empty_like, t)  # the faster way
    return tape.do(Tensor.new_empty, t, t.shape)


def _floats(t: Tensor, size: Any, stride: Any) -> Tensor:
    """float32 on t's device, unwritten."""
    return t.new_empty_strided(size, stride, dtype=torch.float32)


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out=out)


def _turned_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a.t(), b, out=out)


def _product_beside(out: Tensor, a: Tensor, b: Tensor, late: bool) -> None:
    """a @ b, added to what `out` holds if `late`."""
    torch.addmm(out, a, b, beta=int(late), out=out)


def plan_whole(
    spec: Spec, dtype: torch.dtype, M: int, N: int, K: int, device: planner.Device, align: int = 16
) -> WholePlan | None:
    """How one launch makes dz and dx of a layer, if it does; `align` as in `moved_at_once`."""
    if spec.prologue or spec.batch_stats or (dtype == torch.float32 and _precision() == "tf32"):
        return None  # TF32 takes the weight through registers, which then spill
    if N > 256 and Side.of(spec.epilogue).before:
        return None  # what stands before a norm takes more registers than a wide row leaves
    random = bool(RANDOM & set(spec.epilogue))
    return planner.plan_whole(dtype, M, N, K, random, device, align)


def _apart_backward(spec: Spec, dtype: torch.dtype, M: int, K: int, N: int) -> bool:
    """Whether the library multiplies what stages before `linear` make of x, in a launch before."""
    library = dtype == torch.float32 and _precision() == "ieee" and M * N * K >= planner.LIBRARY
    return library or planner.is_apart(spec, M, N, K, backward=True)


def backward_launches(
    spec: Spec,
    bias: bool,
    own_residual: bool,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    device: planner.Device = planner.UNKNOWN,
) -> tuple[str, ...]:
    """What `residual_backward` launches with every gradient asked for; `own_residual`: a residual
    that is not x.
    """
    row_kernels = []
    for side in (spec.epilogue, spec.prologue):
        batch = "norm" in side and spec.batch_stats
        row_kernels.append(f"residual_backward_{'batch_' if batch else ''}kernel")
    after, before = row_kernels
    adds = "add" in spec.epilogue
    runs = any(stage != "add" for stage in spec.epilogue) or spec.y_dtype is not None
    runs = runs or bias or (adds and own_residual)
    direct = adds and spec.epilogue[-1] == "add" and bool(spec.prologue or spec.casts)
    if not spec.prologue and (runs or adds) and plan_whole(spec, dtype, M, N, K, device):
        return ("residual_backward_product_kernel", "mm")
    if not spec.prologue:
        dx = "residual_dx_kernel" if spec.casts else "addmm"
        return (*([after] if runs or (adds and not direct) else []), dx, "mm")
    products: tuple[str, ...] = ("residual_products_kernel",)
    if _apart_backward(spec, dtype, M, K, N):
        products = ("residual_prologue_kernel", "mm", "mm")
    return (*([after] if runs or (adds and not direct) else []), *products, before)


def spares_registers(spec: Spec, where: str, N: int, K: int, size: int, align: int = 16) -> bool:
    """Whether neither masks, a gate, casts nor narrow moves take registers in the backward of the
    stages `where`: `plain` of `plan_backward`. Of a weight (N, K) of elements of `size` bytes.
    """
    held = (RANDOM | {"gate"}) & set(getattr(spec, where))
    return not held and not spec.dtypes and planner.moved_at_once(N, K, size, align) >= 16


class RowsLaunch(NamedTuple):
    """How a row-major kernel is launched."""

    kernel: str
    programs: int
    walkers: int
    counters: int
    meet: bool  # programs meet whatever is asked for
    batch: bool  # a norm over this batch, or
    rows: bool  # over rows
    constants: dict[str, Any]


class _Backward:
    """One backward pass: which launches are needed, for the gradients in `grads`, and the launches;
    with `dz` that one, too.

    after: the row-major kernel after `linear`, which makes dz from dy and z; before: the one before
    it, which makes dx from the product's gradient dt and x.
    """

    def __init__(
        self,
        spec: Spec,
        o: Operands,
        dy: Tensor,
        kept: Outputs,
        grads: Any,
        device: planner.Device,
        ready: Call,
        tape: Tape,
        dz: Tensor | None,
    ) -> None:
        self.spec, self.inputs, self.grads, self.dz = spec, o, grads, dz
        self.dy, self.z, self.stats = dy, kept.z, kept.stats
        self.multiplied = o.x if kept.operand is None else kept.operand
        self.dtype = o.weight.dtype  # of the product and its gradients
        self.device, self.ready, self.tape = device, ready, tape
        self.align = alignment(o.weight.shape[0], o.x, o.weight, o.residual, dy, kept.z)
        self.between_rows = between_rows(o.x, o.weight, o.residual, dy)
        stats = None
        if spec.batch_stats:
            stats = tuple(tape.do(torch.select, kept.stats, 0, i) for i in (0, 1))
        self.operands = stage_operands(spec, o, stats, self.align)

    def asked(self, where: str) -> dict[str, Tensor]:
        """The gradients asked for of what the stages `where` read, but for x."""
        of_stage = {"norm": ("norm_weight", "norm_bias"), "gate": ("gate",)}
        if self.inputs.residual is not None:
            of_stage["add"] = ("residual",)
        found = (name for stage in getattr(self.spec, where) for name in of_stage.get(stage, ()))
        return {name: self.grads[name] for name in found if name in self.grads}

    def run(self) -> None:
        spec, inputs, grads, dy, do = self.spec, self.inputs, self.grads, self.dy, self.tape.do
        x, weight = inputs.x, inputs.weight
        before = spec.prologue != () and ("x" in grads or bool(self.asked("prologue")))
        needs_dt = before or "x" in grads
        needs_dz = needs_dt or "weight" in grads or self.dz is not None
        # dx = ... + skip: from dy itself where nothing follows the add, else through dx's memory
        adds_to_x = spec.adds and inputs.residual is None and "x" in grads
        late = adds_to_x and "add" in spec.epilogue
        direct = late and (before or spec.casts) and spec.epilogue[-1] == "add"
        skip = (dy, spec.residual_scale) if direct else (grads["x"], 1.0) if late else None
        dskip = grads["x"] if late and not direct else grads.get("residual")
        if "add" not in spec.epilogue:
            dskip = None
        own = self.asked("epilogue")
        if "bias" in grads:
            own["bias"] = grads["bias"]

        dz = dy
        changes = any(stage != "add" for stage in spec.epilogue) or dy.dtype != self.dtype
        whole = self.whole() if late or dskip is not None or own or changes else None
        if whole is not None:
            new = self.new_dz() if changes and ("weight" in grads or self.dz is not None) else None
            if late and spec.epilogue[-1] == "add":
                dskip, skip = None, (dy, spec.residual_scale)
            saved = self.z
            self.rows("epilogue", dy, saved, new, dskip, own, skip, whole=whole)
            self.dweight(dy if new is None else new)
            return
        if dskip is not None or own or (changes and needs_dz):
            new = self.new_dz() if changes and needs_dz else None
            self.rows("epilogue", dy, self.z, new, dskip, own)
            dz = dy if new is None else new
        if not spec.prologue:
            if spec.casts and "x" in grads:
                self.dx(dz, skip)
            elif "x" in grads:
                do(_product_beside, grads["x"], dz, weight, late)
            self.dweight(dz)
            return
        dt = do(Tensor.new_empty, weight, x.shape) if before else None
        if dt is not None and "weight" not in grads:
            do(_product, dt, dz, weight)
        elif "weight" in grads and self.apart():
            t = do(Tensor.new_empty, weight, x.shape)
            stats = self.stats if spec.norm != "batch" and "norm" in spec.prologue else None
            made = prologue_constants(spec, self.dtype, x.shape[1], known=True)
            do(launch_prologue, self.ready, x, self.operands, t, stats, made)
            if dt is not None:
                do(_product, dt, dz, weight)
            do(_turned_product, grads["weight"], dz, t)
        elif "weight" in grads:
            self.products(dz, dt)
        if dt is not None:
            early = grads.get("residual") if "add" in spec.prologue else None
            adds = adds_to_x and "add" in spec.prologue
            self.rows("prologue", dt, x, grads.get("x"), early, self.asked("prologue"), skip, adds)

    def new_dz(self) -> Tensor:
        """Memory for it, contiguous."""
        M, N = self.dy.shape
        if self.dz is not None:
            return self.dz
        return self.tape.do(Tensor.new_empty_strided, self.inputs.weight, (M, N), (N, 1))

    def dweight(self, dz: Tensor) -> None:
        """dz.T @ x, or dz itself for who multiplies later."""
        if "weight" in self.grads:
            self.tape.do(_turned_product, self.grads["weight"], dz, self.multiplied)
        if self.dz is not None and dz is not self.dz:
            self.tape.do(Tensor.copy_, self.dz, dz)

    def apart(self) -> bool:
        (M, K), N = self.inputs.x.shape, self.dy.shape[1]
        return _apart_backward(self.spec, self.dtype, M, K, N)

    def whole(self) -> WholePlan | None:
        """How one launch makes dz and dx, if it does."""
        spec, (M, K), N = self.spec, self.inputs.x.shape, self.dy.shape[1]
        if "x" not in self.grads:
            return None
        return plan_whole(spec, self.dtype, M, N, K, self.device, self.between_rows)

    def rows(
        self,
        where: str,
        dy: Tensor,
        z: Tensor | None,
        dz: Tensor | None,
        dshortcut: Tensor | None,
        sums: dict[str, Tensor],
        skip: tuple[Tensor, float] | None = None,
        add: bool = False,
        whole: WholePlan | None = None,
    ) -> None:
        """One launch of a row-major kernel: dz from dy and z, dshortcut, and sums over the rows;
        with `whole` also dx = dz @ weight, to which then `skip` is added.
        """
        (M, C), do = dy.shape, self.tape.do
        cut = self.cut_rows(where, M, C, add, whole)
        gate = sums.get("gate")
        total = None
        if gate is not None and self.spec.gate == "scalar":
            total, gate = gate, do(_floats, dy, (C,), (1,))
        outs = (gate, sums.get("bias"), sums.get("norm_weight"), sums.get("norm_bias"))
        partial = arrived = None
        if cut.meet or any(t is not None for t in outs):
            size, stride = (len(outs), cut.walkers, C), (cut.walkers * C, C, 1)
            partial = do(_floats, dy, size, stride)
            arrived = do(_counters, dy, cut.counters)
        other, scale = (None, 0.0) if skip is None else skip
        stats = self.stats if cut.rows else None
        if cut.batch:
            stats = do(_floats, dy, (2, C), (C, 1))  # totals of the two phases
        args: tuple[Any, ...] = (
            dy, z, self.operands, stats, other, dz, dshortcut, outs, total, partial, arrived,
            M, C, cut.walkers, scale, *dy.stride(), *_strides(z), *_strides(other),
        )  # fmt: skip
        if whole is not None:
            weight, dx = self.inputs.weight, self.grads["x"]
            args += (weight, dx, dx.shape[1], *weight.stride())
        kernel = getattr(backward, cut.kernel)
        launch = _launch_cooperative if cut.batch else Call.launch
        do(launch, self.ready, kernel, cut.programs, args, cut.constants, where)

    def cut_rows(
        self, where: str, M: int, C: int, add: bool, whole: WholePlan | None
    ) -> RowsLaunch:
        """How `rows` launches its kernel."""
        spec = self.spec
        side = Side.of(getattr(spec, where))
        batch = side.norm and spec.batch_stats
        rows = side.norm and spec.norm != "batch"
        over = "columns" if batch else "rows" if rows else None
        N, K = self.inputs.weight.shape
        plain = spares_registers(spec, where, N, K, self.dtype.itemsize, self.between_rows)
        chosen = planner.plan_backward(M, C, over, self.device, plain)
        options = chosen.options()
        if whole is not None:
            chosen = chosen._replace(tiles=1, walkers=whole.walkers, wide=False)
            options = whole.tile.options(self.dtype.itemsize)
        act, act_grad = _functions(spec, self.dtype)
        constants = {"BEFORE": side.before, "AFTER": side.after, "ACT": act, "ACT_GRAD": act_grad}
        constants |= {"PRECISION": _precision()} if whole else {"ADD": add}
        if not batch:
            constants["NORM"] = spec.norm if rows else "given" if side.norm else None
        if whole is None and not chosen.wide:
            constants["STAGES"] = chosen.stages
        kind = "batch_" if batch else "product_" if whole else "wide_" if chosen.wide else ""
        return RowsLaunch(
            f"residual_backward_{kind}kernel",
            chosen.walkers if chosen.wide else chosen.tiles * chosen.walkers,
            chosen.walkers,
            2 + chosen.tiles * (GROUP.value + 1) + 1,
            batch or chosen.wide,
            batch,
            rows,
            constants | options,
        )

    def products(self, dz: Tensor, dt: Tensor | None) -> None:
        """dt = dz @ weight, if asked for, and dweight = dz.T @ prologue(x): one launch."""
        spec, x, weight = self.spec, self.inputs.x, self.inputs.weight
        (M, K), N = x.shape, weight.shape[0]
        random, mixed = bool(RANDOM & set(spec.prologue)), bool(spec.dtypes)
        chosen = planner.plan_products(
            self.dtype, M, N, K, dt is not None, random, self.device, mixed, self.between_rows
        )
        partial = arrived = None
        if chosen.splits > 1:
            partial = self.tape.do(_floats, x, (chosen.splits, N, K), (N * K, K, 1))
            groups = ceil_div(chosen.splits, products.PARTS.value)
            tiles = ceil_div(N, chosen.BLOCK) * ceil_div(K, chosen.BLOCK)
            arrived = self.tape.do(_counters, x, tiles * (groups + 1))
        rows = "norm" in spec.prologue and spec.norm != "batch"
        args = (
            dz, x, weight, self.operands, self.stats if rows else None, dt, self.grads["weight"],
            partial, arrived, M, N, K, chosen.splits, chosen.rows,
            *dz.stride(), *x.stride(), *weight.stride(),
        )  # fmt: skip
        constants = {
            "PROLOGUE": spec.prologue, "ACT": _functions(spec, self.dtype)[0],
            "PRECISION": _precision(), "BLOCK": chosen.BLOCK, "BLOCK_R": chosen.BLOCK_R,
            **chosen.options,
        }  # fmt: skip
        kernel = products.residual_products_kernel
        self.launch(kernel, chosen.programs, args, constants, "products")

    def dx(self, dz: Tensor, skip: tuple[Tensor, float] | None) -> None:
        """dx = dz @ weight + skip: one launch."""
        weight, dx = self.inputs.weight, self.grads["x"]
        (M, K), N = dx.shape, weight.shape[0]
        chosen = planner.plan_products(
            self.dtype, M, N, K, True, False, self.device, align=self.between_rows
        )
        other, scale = (None, 0.0) if skip is None else skip
        programs = ceil_div(M, chosen.BLOCK) * ceil_div(K, chosen.BLOCK)
        args = (
            dz, weight, dx, other, M, N, K, scale,
            *dz.stride(), *weight.stride(), *_strides(other),
        )  # fmt: skip
        constants = {
            "ALIGN": self.align, "PRECISION": _precision(), "BLOCK": chosen.BLOCK,
            "BLOCK_R": chosen.BLOCK_R, **chosen.options,
        }  # fmt: skip
        self.launch(products.residual_dx_kernel, programs, args, constants, "dx")

    def launch(self, *launch: Any) -> None:
        self.tape.do(self.ready.launch, *launch)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()


def _launch_cooperative(
    ready: Call, kernel: Any, programs: int, args: tuple[Any, ...], constants: Any, name: str = ""
) -> None:
    """One launch whose programs are all resident and may wait for each other.

    The interpreter runs one program after another, so there the phases are launches of their own.
    """
    if interpreting():
        for phase in (1, 2):
            kernel[(programs,)](*args, PHASE=phase, **constants)
    else:
        constants = {**constants, "PHASE": 0, "launch_cooperative_grid": True}
        ready.launch(kernel, programs, args, constants, name)


SLOT = 1 << 16  # counters for one stream
SLOTS = 16
_arenas: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def prepare(device: torch.device) -> None:
    """Allocates the arrival counters of a device, of which each stream gets a slot.

    Called when the backend is chosen, outside of any CUDA graph's memory pool: what is made within
    one dies with it. For real even where a tracer is at work, which sees nothing of it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if device not in _arenas:
            with torch.inference_mode(False), _disable_current_modes():
                _arenas[device] = torch.empty(SLOTS * SLOT, dtype=torch.int32, device=device)


def _counters(t: Tensor, count: int) -> Tensor:
    """At least `count` arrival counters, all 0, as a launch leaves them.

    Each stream has its own, which it clears itself when it asks first: another stream's clearing
    it would not wait for. A CUDA graph being captured gets fresh ones, cleared within the graph,
    and so does whoever needs more than there are. Streams go by their handles, since Python
    cannot reach cudaStreamGetId: a stream that got the handle of a destroyed one gets its
    counters too, in use only if launches of the old one are still pending.
    """
    capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
    if count <= SLOT and not capturing:
        stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
        slot = _slots.get((t.device, stream))
        if slot is None:
            prepare(t.device)
            slot = _new_slot(t.device, stream)
        if slot.numel():
            return slot
    return torch.zeros(count, dtype=torch.int32, device=t.device)


def _new_slot(device: torch.device, stream: int) -> Tensor:
    """Cleared counters for the current stream, empty if all slots are taken."""
    with _lock:
        if (device, stream) not in _slots:
            taken = sum(device == other for other, _ in _slots)
            _slots[device, stream] = _arenas[device][taken * SLOT :][:SLOT].zero_()
        return _slots[device, stream]


def _precision() -> str:
    """What fp32 products may use; torch's older switches (allow_tf32, ...) show here too."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
