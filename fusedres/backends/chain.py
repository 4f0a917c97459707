"""Chains of links that are alike in Triton: one launch forward.

What is asked of a chain is narrower than of a layer: N = K, a power of two up to 256, one recipe
without dropout, gate and batch norm. Everything else runs layer by layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import Spec
from . import plan as planner
from . import triton as layers
from .plan import ceil_div

try:
    from ..kernels.chain import residual_chain_forward_kernel
except ImportError:  # without Triton, which `why_not` says
    residual_chain_forward_kernel = None

WIDTHS = (16, 32, 64, 128, 256)
WAVE = 64  # rows a multiprocessor; more make wide links better off as launches of their own
MANY = 4096  # rows, from which on programs take more of them


class Pattern(NamedTuple):
    """What the links of a chain have in common."""

    spec: Spec  # of a block's last link; the others have no add
    block: int  # links
    there: tuple[bool, ...]  # which of bias, norm_weight, norm_bias there are


class ChainTile(NamedTuple):
    BLOCK_M: int
    num_warps: int
    STAGES: int  # of the loop over links: 3 are the least with a weight on its way

    def options(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {**self._asdict(), "maxnreg": planner.registers(self.num_warps)}


@lru_cache(maxsize=1024)
def pattern_of(links: str) -> Pattern | str:
    """Of the links' lines (csrc/links.h), or why there is none."""
    lines = links.split("\n")
    heads = [line.partition(" ")[::2] for line in lines]
    specs = [Spec.parse(recipe) for _, recipe in heads]
    block = next((i + 1 for i, spec in enumerate(specs) if spec.adds), 1)
    if len(lines) % block or lines != lines[:block] * (len(lines) // block):
        return "its links are not alike"
    *before, last = specs[:block]
    there, _, back = heads[block - 1][0].partition("<")
    inner = tuple(stage for stage in last.stages if stage != "add")
    for head, spec in zip(heads, before, strict=False):
        alike = (spec.stages, spec.norm, spec.activation) == (inner, last.norm, last.activation)
        if not alike or head[0] != there or (last.norm and spec.eps != last.eps):
            return "its links are not alike"
    if last.adds and int(back or 0) != block - 1:
        return "it adds another input than its block's"
    if last.random:
        return "it drops at random"
    if last.norm == "batch":
        return "it has a batch norm"
    if last.gate is not None:
        return "it has a gate"
    if "add" in last.prologue:
        return "it adds before linear"
    if last.dtypes:
        return "it has several dtypes"
    return Pattern(last, block, tuple(bool(int(there) >> i & 1) for i in range(3)))


def why_not(
    links: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int
) -> str | None:
    """None if these kernels can run a chain of x (M, N) and should; else the reason."""
    found = pattern_of(links)
    if isinstance(found, str):
        return found
    if N != K or N not in WIDTHS:
        return f"one launch takes {', '.join(map(str, WIDTHS))} features in and out, not {(K, N)}"
    if dtype == torch.float32 and N > 128:
        return "weights of 256 x 256 in float32 do not fit in shared memory"
    most = WAVE * planner.device_of(device).processors
    if N > 128 and most < M:
        return f"for more than {most} rows of {N} features a launch a layer is faster"
    return layers.why_not(found.spec, dtype, device, N, K)


def tile_of(dtype: torch.dtype, M: int, N: int, device: planner.Device) -> ChainTile:
    """Not measured: tiles that compile without spills."""
    if N == 256:
        return ChainTile(16, 8, 1)
    if dtype == torch.float32:
        return ChainTile(16, 4, 3 if N <= 64 else 2)
    if M < MANY:
        return ChainTile(16, 4 if N <= 64 else 8, 3)
    return ChainTile(64, 4 if N <= 64 else 8, 3)


class Parameters(NamedTuple):
    """Of all links, (L, ...) each."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @classmethod
    def of(cls, operands: list[Tensor], links: str, depth: int, pattern: Pattern) -> Parameters:
        """From a chain's operands: `depth` not 0 says that they are stacked already."""
        kinds = 1 + sum(pattern.there)
        if not depth:
            operands = [torch.stack(operands[kind::kinds]) for kind in range(kinds)]
        rest = (t.contiguous() for t in operands)
        return cls(*(next(rest) if has else None for has in (True, *pattern.there)))


def chain_forward(
    x: Tensor, operands: list[Tensor], links: str, depth: int, keep: int
) -> list[Tensor]:
    """y (M, N); then for `keep` 1 and 2 all links' inputs (L, M, N), for 1 and where backward asks
    for it all z (L, M, N). x (M, N) of any strides.
    """
    pattern = _pattern(links)
    spec, p = pattern.spec, Parameters.of(operands, links, depth, pattern)
    (M, N), L = x.shape, p.weight.shape[0]
    _check(x, p)
    y = x.new_empty((M, N))
    inputs = x.new_empty((L, M, N)) if keep else None
    z = x.new_empty((L, M, N)) if keep == 1 and spec.saves_z else None
    if M:
        tile = tile_of(x.dtype, M, N, planner.device_of(x.device))
        with torch.cuda.device_of(x):
            residual_chain_forward_kernel[(ceil_div(M, tile.BLOCK_M),)](
                x, *p, inputs, z, y, M, L, spec.eps, spec.residual_scale, *x.stride(),
                PROLOGUE=spec.prologue, EPILOGUE=spec.epilogue, NORM_BEFORE="norm" in spec.prologue,
                CENTRED=spec.norm != "rms", B=pattern.block,
                ACT=layers.activation_functions(spec.activation, x.dtype)[0],
                PRECISION=layers._precision(), N=N, **tile.options(),
            )  # fmt: skip
    return [t for t in (y, inputs, z) if t is not None]


def _pattern(links: str) -> Pattern:
    found = pattern_of(links)
    if isinstance(found, str):
        raise RuntimeError(f"fusedres: a chain in Triton: {found}")
    return found


def _check(x: Tensor, p: Parameters) -> None:
    """What kernels, which only see pointers, would get wrong in silence."""
    L, N = p.weight.shape[0], x.shape[1]
    for name, t in p._asdict().items():
        expected = (L, N, N) if name == "weight" else (L, N)
        if t is not None and (tuple(t.shape) != expected or t.device != x.device):
            raise RuntimeError(
                f"fusedres: a chain's {name} is {tuple(t.shape)} on {t.device}, "
                f"expected {expected} on {x.device}"
            )
    for name, t in (("weight", p.weight), ("bias", p.bias)):
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(f"fusedres: a chain's {name} is {t.dtype}, x is {x.dtype}")
