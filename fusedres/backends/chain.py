"""Chains of links that are alike in Triton: one launch forward, three backward.

What is asked of a chain is narrower than of a layer: N = K, a power of two up to 256, one recipe
without dropout and batch norm, one dtype but for x and y in fp32. loop.py takes the others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import wiring
from ..spec import Spec
from . import CHAIN_WIDTHS
from . import plan as planner
from . import triton as layers
from .plan import ceil_div

try:
    from ..kernels import chain as kernels
except ImportError:  # without Triton, which `why_not` says
    kernels: Any = None  # type: ignore[no-redef]

MOST_ROWS = 1 << 30  # where there is no limit
HOPPER = 200 << 10  # bytes of shared memory that a block may have
BESIDE = 35 << 10  # bytes of it that tiles take beside the weights
SUMS = {"ROWS": 128, "COLUMNS": 16}
MANY = 4096  # rows, from which on programs take more of them


class Pattern(NamedTuple):
    """What the links of a chain have in common."""

    spec: Spec  # of a block's last link; the others have no add and no gate
    block: int  # links
    there: tuple[bool, ...]  # which of bias, norm_weight, norm_bias there are
    mixed: bool  # x and y are fp32, products 16-bit

    def crowded(self, backward: bool) -> bool:
        """Whether more than usual takes the registers of rows: fp32 tiles before `linear`, too, or
        a gate's gradient.
        """
        gates = backward and self.spec.gate is not None
        return gates or (self.mixed and bool(self.spec.prologue))


class ChainTile(NamedTuple):
    BLOCK_M: int
    num_warps: int
    STAGES: int  # of the loop over links: 3 are the least with a weight on its way

    def options(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {**self._asdict(), "maxnreg": planner.registers(self.num_warps)}


@lru_cache(maxsize=1024)
def pattern_of(links: str) -> Pattern | str:
    """Of the links' lines (wiring.py), or why there is none."""
    lines = wiring.read(links)
    if any(line.input_back for line in lines):
        return "a link reads another value than the latest"
    specs = [Spec.parse(line.recipe) for line in lines]
    for spec in specs:
        if spec.random:
            return "it drops at random"
        if spec.norm == "batch":
            return "it has a batch norm"
        if "gate" in spec.prologue:
            return "it has a gate before linear"
        if "add" in spec.prologue:
            return "it adds before linear"
        if not {*spec.dtypes} <= {"float32"}:
            return "it has several dtypes, of which not all are float32"
    block = next((i + 1 for i, spec in enumerate(specs) if spec.adds), 1)
    if len(lines) % block or lines != lines[:block] * (len(lines) // block):
        return "its links are not alike"
    *before, last = specs[:block]
    there = lines[0].there
    inner = tuple(stage for stage in last.stages if stage not in ("add", "gate"))
    for spec in before:
        alike = (spec.stages, spec.norm, spec.activation) == (inner, last.norm, last.activation)
        if not alike or (last.norm and spec.eps != last.eps):
            return "its links are not alike"
    gates = [line.there[3] for line in lines[:block]]
    odd = gates != [False] * len(before) + [last.gate is not None]
    if len({line.there[:3] for line in lines}) > 1 or odd or any(there[4:]):
        return "its links are not alike, or have more than weight, bias and a norm's two"
    if last.adds and lines[block - 1].back != block - 1:
        return "it adds another input than its block's"
    mixed = specs[0].x_dtype is not None
    if mixed is (last.y_dtype is None) or (last.residual_dtype and not mixed):
        return "x and y have different dtypes"
    if mixed and last.saves_residual:
        return "it has several dtypes, and a stage after add"
    return Pattern(last, block, there[:3], mixed)


def limit(links: str, dtype: torch.dtype, device: torch.device, N: int, K: int) -> int | str:
    """For up to how many rows these kernels should run a chain, or why they cannot run it."""
    found = most_rows(links, dtype, N, K, planner.device_of(device))
    if isinstance(found, str):
        return found
    return layers.why_not(_pattern(links).spec, dtype, device, N, K) or found


def most_rows(links: str, dtype: torch.dtype, N: int, K: int, here: planner.Device) -> int | str:
    """The same, if these kernels can run on this device at all."""
    found = pattern_of(links)
    if isinstance(found, str):
        return found
    if dtype not in layers.DTYPES:
        return f"the Triton kernels do not take {dtype}"
    if N != K or N not in CHAIN_WIDTHS:
        return (
            f"{(K, N)} features: one launch takes {', '.join(map(str, CHAIN_WIDTHS))}, in and out"
        )
    if dtype == torch.float32 and N > 64:
        return f"in float32 {N} features are too many for one launch, 64 are not"
    if N < 256:
        return MOST_ROWS
    if found.mixed and found.spec.gate and found.spec.prologue:
        return f"{N} features, a gate and several dtypes are too many for one launch"
    if here.shared < HOPPER:
        return f"before Hopper {N} features are too many for one launch"
    return here.processors * 16  # one wave; a program waits for all weights, so two are too slow


def tile_of(
    dtype: torch.dtype,
    M: int,
    N: int,
    device: planner.Device,
    backward: bool = False,
    crowded: bool = False,
) -> ChainTile:
    """Not measured: tiles that compile without spills. Backward has at most 32 rows, whose products
    take their left operand from registers without harm.
    """
    if N == 256:
        return ChainTile(16, 8, 1)
    if dtype == torch.float32:
        return ChainTile(16, 8, 2) if backward else ChainTile(16, 4, 3)
    most = (32 if backward else 64) // (2 if crowded else 1)
    return _fitting(ChainTile(most if M >= MANY else 16, 4 if N <= 64 else 8, 3), N, device)


def _fitting(tile: ChainTile, N: int, device: planner.Device) -> ChainTile:
    """With as many stages as its 16-bit weights have room for."""
    room = max(1, (device.shared - BESIDE) // (2 * N * N))
    return tile._replace(STAGES=min(tile.STAGES, room))


class Parameters(NamedTuple):
    """Of all links, (L, ...) each."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate: Tensor | None  # (L / B, N) or (L / B, 1)

    @classmethod
    def of(cls, operands: list[Tensor], links: str, depth: int, pattern: Pattern) -> Parameters:
        """From a chain's operands: `depth` not 0 says that they are stacked already."""
        there = (True, *pattern.there, pattern.spec.gate is not None)
        if not depth:
            links_own = (own for *_, own in wiring.split(links, 0, operands))
            kinds = ([t for t in kind if t is not None] for kind in zip(*links_own, strict=True))
            operands = [torch.stack(kind) for kind in kinds if kind]
        rest = (t.contiguous() for t in operands)
        return cls(*(next(rest) if has else None for has in there))  # type: ignore[arg-type]


def chain_forward(
    x: Tensor, operands: list[Tensor], links: str, depth: int, keep: int
) -> list[Tensor]:
    """y (M, N); then, unless `keep` is 0, all links' inputs (L, M, N), and with 1, where backward
    asks for it, all z (L, M, N). x (M, N) of any strides.
    """
    pattern = _pattern(links)
    spec, p = pattern.spec, Parameters.of(operands, links, depth, pattern)
    (M, N), L = x.shape, p.weight.shape[0]
    _check(x, p, pattern)
    y = x.new_empty((M, N))
    read = x if spec.prologue else p.weight  # by its stages, or by the product alone
    inputs = read.new_empty((L, M, N)) if keep else None
    z = p.weight.new_empty((L, M, N)) if keep == 1 and spec.saves_z else None
    if M:
        device = planner.device_of(x.device)
        tile = tile_of(p.weight.dtype, M, N, device, False, pattern.crowded(False))
        with torch.cuda.device_of(x):
            kernels.residual_chain_forward_kernel[(ceil_div(M, tile.BLOCK_M),)](
                x, *p, inputs, z, y, M, L, spec.eps, spec.residual_scale, *x.stride(),
                PROLOGUE=spec.prologue, EPILOGUE=spec.epilogue, NORM_BEFORE="norm" in spec.prologue,
                CHANNEL=spec.gate == "channel", CENTRED=spec.norm != "rms", B=pattern.block,
                ACT=layers.activation_functions(spec.activation, x.dtype)[0],
                PRECISION=layers._precision(), N=N, **tile.options(),
            )  # fmt: skip
    return [t for t in (y, inputs, z) if t is not None]


def chain_backward(
    dy: Tensor,
    saved: list[Tensor],
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    wanted: str,
) -> list[Tensor]:
    """The gradients of x and the operands, those that `wanted` has a "1" for, in their types.

    dy (M, N) of any strides ; `saved` as `chain_forward` gave it. Three launches: dz of all links
    and dx, all weights' gradients, sums over the programs' rows.
    """
    pattern = _pattern(links)
    spec, p = pattern.spec, Parameters.of(operands, links, depth, pattern)
    _check(x, p, pattern)
    (M, N), L = x.shape, p.weight.shape[0]
    if tuple(dy.shape) != (M, N):
        raise RuntimeError(f"fusedres: dy is {tuple(dy.shape)}, expected {(M, N)}")
    inputs, z = (*saved, None)[:2]
    device = planner.device_of(x.device)
    tile = tile_of(p.weight.dtype, M, N, device, True, pattern.crowded(True))
    programs = ceil_div(M, tile.BLOCK_M)

    asked = _asked(links, depth, p, wanted)
    grads = {n: torch.empty_like(getattr(p, n)) for n in Parameters._fields if (n, "1") in asked}
    dx = x.new_empty((M, N)) if wanted[0] == "1" else None
    if not M:
        for grad in grads.values():
            grad.zero_()
        return _in_order(dx, grads, asked, depth)
    dz = p.weight.new_empty((L, M, N)) if "weight" in grads else None
    operand = p.weight.new_empty((L, M, N)) if "weight" in grads and spec.prologue else None
    outs = [grads.get(name) for name in ("bias", "norm_weight", "norm_bias", "gate")]
    of_links = pattern.block == 1 and spec.gate == "channel"
    if outs[-1] is not None and not of_links:
        outs[-1] = x.new_empty((L, N), dtype=torch.float32)
    partial = [
        None if t is None else x.new_empty((L, programs, N), dtype=torch.float32) for t in outs
    ]
    act, act_grad = layers.activation_functions(spec.activation, x.dtype)
    with torch.cuda.device_of(x):
        kernels.residual_chain_backward_kernel[(programs,)](
            dy, inputs, z, *p, dx, dz, operand, *partial, M, L, spec.eps, spec.residual_scale,
            *dy.stride(), PROLOGUE=spec.prologue, EPILOGUE=spec.epilogue,
            AGAIN=z is None and spec.saves_z, SHORTCUT=spec.saves_residual,
            CHANNEL=spec.gate == "channel", CENTRED=spec.norm != "rms", ACT=act, ACT_GRAD=act_grad,
            PRECISION=layers._precision(), B=pattern.block, N=N, **tile.options(),
        )  # fmt: skip
        if dz is not None:
            multiplied: Any = inputs if operand is None else operand
            torch.bmm(dz.transpose(1, 2), multiplied, out=grads["weight"])
        sums = [(a, b) for a, b in zip(partial, outs, strict=True) if b is not None]
        if sums:
            kernels.residual_chain_sums_kernel[(L * (N // SUMS["COLUMNS"]),)](
                *zip(*sums, strict=True), programs, N=N, **SUMS
            )
        if outs[-1] is not None and not of_links:
            last = outs[-1][pattern.block - 1 :: pattern.block]
            grads["gate"].copy_(last if spec.gate == "channel" else last.sum(1, keepdim=True))
    return _in_order(dx, grads, asked, depth)


def _asked(links: str, depth: int, p: Parameters, wanted: str) -> list[tuple[str, str]]:
    """For each operand, in the op's order, its name and whether its gradient is wanted, "1"."""
    names, flags = Parameters._fields, wanted[1:]
    if depth:
        there = [name for name, t in zip(names, p, strict=True) if t is not None]
        return list(zip(there, flags, strict=True))
    links_own = (own for *_, own in wiring.split(links, 0, flags))
    found = (zip(names, own, strict=False) for own in links_own)
    return [(name, flag) for own in found for name, flag in own if flag is not None]


def _in_order(
    dx: Tensor | None, grads: dict[str, Tensor], asked: list[tuple[str, str]], depth: int
) -> list[Tensor]:
    """The gradients as the op returns them: of x, of each stack or of each link's operands."""
    found = [] if dx is None else [dx]
    if depth:
        return [*found, *(grads[name] for name, flag in asked if flag == "1")]
    each = {name: iter(t.unbind()) for name, t in grads.items()}
    for name, flag in asked:
        t = next(each[name]) if name in each else None
        if t is not None and flag == "1":
            found.append(t)
    return found


def _pattern(links: str) -> Pattern:
    found = pattern_of(links)
    if isinstance(found, str):
        raise RuntimeError(f"fusedres: a chain in Triton: {found}")
    return found


def _check(x: Tensor, p: Parameters, pattern: Pattern) -> None:
    """What kernels, which only see pointers, would get wrong in silence."""
    L, N = p.weight.shape[0], x.shape[1]
    if N not in CHAIN_WIDTHS:
        raise RuntimeError(f"fusedres: x has {N} features, a chain in Triton has {CHAIN_WIDTHS}")
    sizes = {"weight": (L, N, N), "gate": (L // pattern.block, 1)}
    if pattern.spec.gate == "channel":
        sizes["gate"] = L // pattern.block, N
    for name, t in p._asdict().items():
        expected = sizes.get(name, (L, N))
        if t is not None and (tuple(t.shape) != expected or t.device != x.device):
            raise RuntimeError(
                f"fusedres: a chain's {name} is {tuple(t.shape)} on {t.device}, "
                f"expected {expected} on {x.device}"
            )
    product = p.weight.dtype if pattern.mixed and x.dtype == torch.float32 else x.dtype
    for name, t in (("weight", p.weight), ("bias", p.bias)):
        if t is not None and t.dtype != product:
            raise RuntimeError(f"fusedres: a chain's {name} is {t.dtype}, x is {x.dtype}")
