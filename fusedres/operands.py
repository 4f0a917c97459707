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

    def empty_outputs(self, spec: Spec, save: bool, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y (M, N), z and stats of a forward op, unwritten.

        z is (M, N) if backward needs it (`save`), else (0,). stats, in fp32 (fp64 for fp64): (2, C)
        for batch norm in training; (2 * M,) for norms over rows where the backend saves them
        (`rows`) and backward needs them; else (0,).
        """
        x, N = self.x, self.weight.shape[0]
        M, K = x.shape
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape: tuple[int, ...] = (2 * M if rows and save and spec.norm in ("layer", "rms") else 0,)
        if spec.batch_stats:
            shape = 2, spec.width("norm", K, N)
        z = x.new_empty((M, N) if save and spec.saves_z else (0,))
        return x.new_empty((M, N)), z, x.new_empty(shape, dtype=exact)


DIFFERENTIABLE = Operands._fields[:7]  # bit i of a backward op's `needs` stands for the i-th
