"""The ops of chains: schemas, and what they return in shapes, as ops.py has it for layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import wiring
from .backends import native
from .dtypes import y_dtype
from .ops import late

PIECE = 1024  # columns of what a call keeps, at most in a piece of memory: csrc/chain/values.h

_Width = tuple[int, torch.dtype]  # a matrix's columns, 0 if there is none, and what they are


def _pieces(widths: list[_Width]) -> list[_Width]:
    """The pieces of memory in which such matrices lie."""
    pieces: list[_Width] = []
    last: dict[torch.dtype, int] = {}
    for columns, dtype in widths:
        if not columns:
            continue
        at = last.get(dtype)
        if at is None or pieces[at][0] + columns > PIECE:
            at = last[dtype] = len(pieces)
            pieces.append((0, dtype))
        pieces[at] = pieces[at][0] + columns, dtype
    return pieces


def _triton_forward_fake(
    x: Tensor, operands: list[Tensor], links: str, depth: int, keep: int
) -> list[Tensor]:
    """All links have one shape: what is kept is one tensor of inputs, and one of z."""
    specs, weight = [spec for spec, *_ in wiring.split(links, depth, operands)], operands[0]
    size = len(specs), *x.shape
    kept = [(x if specs[-1].prologue else weight).new_empty(size)] if keep else []
    if keep == 1 and specs[-1].saves_z:
        kept.append(weight.new_empty(size))
    return [x.new_empty(x.shape), *kept]


def forward_fake(
    x: Tensor,
    operands: list[Tensor],
    links: str,
    depth: int,
    _seeds: Tensor | None,
    _sample_rows: int,
    keep: int,
) -> list[Tensor]:
    M = x.shape[0]
    values: list[_Width] = [(x.shape[1], x.dtype)]
    casts: list[_Width] = []
    z: list[_Width] = []
    read = [False]  # whether backward looks at a value
    statistics = 0
    for spec, input_back, back, (weight, *_) in wiring.split(links, depth, tuple(operands)):
        product, (N, K) = weight.dtype, weight.shape
        if spec.batch_stats:
            statistics += 2 * spec.width("norm", K, N)
        casts.append((K * spec.casts, product))
        if spec.prologue or not spec.casts:
            read[-1 - input_back] = True
        if spec.saves_residual:
            read[-1 - back] = True
        z.append((N * spec.saves_z, product))
        values.append((N, y_dtype(spec.text, product)))
        read.append(False)
    inner = [(N * r, dt) for (N, dt), r in zip(values, read, strict=True)][1:-1]
    kept = (_pieces(inner) + _pieces(casts[1:]) if keep else []) + (_pieces(z) if keep == 1 else [])
    N, dtype = values[-1]
    pieces = [x.new_empty(M * columns, dtype=dt) for columns, dt in kept]
    if statistics:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        pieces.append(x.new_empty(statistics, dtype=exact))
    return [x.new_empty((M, N), dtype=dtype), *pieces]


def _backward_fake(
    dy: Tensor,
    saved: list[Tensor],
    x: Tensor,
    operands: list[Tensor],
    _links: str,
    _depth: int,
    _seeds: Tensor | None,
    _sample_rows: int,
    wanted: str,
    _over_z: bool,
) -> list[Tensor]:
    found = zip((x, *operands), wanted, strict=True)
    return [t.new_empty(t.shape) for t, need in found if need == "1"]


def _triton_backward_fake(
    dy: Tensor, saved: list[Tensor], x: Tensor, operands: list[Tensor], *call: Any
) -> list[Tensor]:
    """`call` ends with `wanted`."""
    return _backward_fake(dy, saved, x, operands, "", 0, None, 1, call[-1], False)


def _loop_backward_fake(
    dy: Tensor, saved: list[Tensor], x: Tensor, operands: list[Tensor], *call: Any
) -> list[Tensor]:
    return _triton_backward_fake(dy, saved, x, operands, *call[:-1])


# On a GPU, in Python: as the single layers' ops in ops.py.
CHAIN = "Tensor x, Tensor[] operands, str links, int depth"
RANDOM = "Tensor? seeds, SymInt sample_rows"
_PYTHON: tuple[tuple[str, str, str, str, Any], ...] = (
    ("triton_chain_forward", "chain", "chain_forward", f"{CHAIN}, int keep", _triton_forward_fake),
    (
        "triton_chain_backward",
        "chain",
        "chain_backward",
        f"Tensor dy, Tensor[] saved, {CHAIN}, str wanted",
        _triton_backward_fake,
    ),
    (
        "loop_forward",
        "loop",
        "loop_forward",
        f"{CHAIN}, {RANDOM}, int keep, str backend",
        late("loop", "forward_fake"),
    ),
    (
        "loop_backward",
        "loop",
        "loop_backward",
        f"Tensor dy, Tensor[] saved, {CHAIN}, {RANDOM}, int keep, str wanted, str backend",
        _loop_backward_fake,
    ),
)
for _op, _backend, _name, _schema, _fake in _PYTHON:
    torch.library.define(f"fusedres::{_op}", f"({_schema}) -> Tensor[]")
    torch.library.impl(f"fusedres::{_op}", ("CPU", "CUDA"), late(_backend, _name))
    torch.library.register_fake(f"fusedres::{_op}", _fake)

if native.missing is None:
    torch.library.register_fake("fusedres::chain_forward", forward_fake)
    torch.library.register_fake("fusedres::chain_backward", _backward_fake)
