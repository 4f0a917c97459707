"""The operands of one call as one record: what travels from functional.py to the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Spec


class Operands(NamedTuple):
    """The first arguments of every op, in this order. C is the width where a stage acts: K before
    ``linear``, N after it.
    """

    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    bias: Tensor | None = None  # (N,)
    norm_weight: Tensor | None = None  # (C,)
    norm_bias: Tensor | None = None  # (C,)
    gate: Tensor | None = None  # (1,) or (C,)
    residual: Tensor | None = None  # (M, R), R <= C: missing features count as 0; None: x
    running_mean: Tensor | None = None  # (C,)
    running_var: Tensor | None = None  # (C,)
    seed: Tensor | None = None  # (1,) int64, for dropout and drop-path
    sample_rows: int = 1  # rows a sample, for drop-path

    def empty_outputs(self, spec: Spec, save: bool, rows: bool) -> Outputs:
        """What a forward op returns, unwritten. `save`: for backward; `rows`: whether the backend
        saves the statistics of norms over rows.
        """
        x, weight = self.x, self.weight
        (M, K), N = x.shape, weight.shape[0]
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape: tuple[int, ...] | None = (2 * M,) if rows and save and spec.norm else None
        if spec.norm == "batch":
            shape = (2, spec.width("norm", K, N)) if spec.batch_stats else None
        return Outputs(
            weight.new_empty((M, N), dtype=getattr(torch, spec.y_dtype) if spec.y_dtype else None),
            weight.new_empty((M, N)) if save and spec.saves_z else None,
            None if shape is None else weight.new_empty(shape, dtype=exact),
            weight.new_empty((M, K)) if save and spec.casts else None,
        )


class Outputs(NamedTuple):
    """What a forward op returns as a list, without what is None: y, then what backward gets."""

    y: Tensor  # (M, N)
    z: Tensor | None  # (M, N), if a stage after ``linear`` needs what it acted on
    stats: Tensor | None  # (2, C) of batch norm in training, (2 * M,) of a norm over rows
    operand: Tensor | None  # (M, K): x in weight's dtype, where that is all that is done to x

    def list(self) -> list[Tensor]:
        return [t for t in self if t is not None]


DIFFERENTIABLE = Operands._fields[:7]  # bit i of a backward op's `needs` stands for the i-th
