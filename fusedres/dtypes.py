"""The dtypes of a call: what type promotion and autocast make of the eager layer's tensors.

x, weight, residual and y each have their own. The product is taken in weight's, under autocast in
autocast's; a stage before ``linear`` leaves x's; ``add`` promotes. Kernels convert as they load and
store, so none of this is a pass over memory of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from . import checks
from .spec import Spec
from .tracing import constant_when_compiled

# What autocast runs in float32, by kind of device: aten/src/ATen/autocast_mode.h. On a CPU nothing
# that a layer has.
IN_FLOAT32 = {"cuda": ("layer", "softplus")}


@constant_when_compiled
@lru_cache(maxsize=4096)
def typed(
    recipe: str,
    x: torch.dtype,
    weight: torch.dtype,
    residual: torch.dtype | None,
    autocast: torch.dtype | None,
    device: str,
) -> tuple[str, torch.dtype]:
    """The recipe with these dtypes in it, and the product's dtype.

    `residual`: None for x's; `autocast`: its dtype if it is on, on `device`, "cpu" say. Raises
    TypeError where torch's product would refuse its operands.
    """

    def cast(dtype: torch.dtype) -> torch.dtype:
        return dtype if autocast is None or dtype == torch.float64 else autocast

    checks.check_dtype("x", x)
    spec, product, t = Spec.parse(recipe), cast(weight), x
    for stage in spec.stages:
        if stage == "linear":
            checks.check_product(cast(t), product)
            t = product
        elif stage == "add":
            t = torch.promote_types(t, x if residual is None else residual)
        elif autocast is not None and t.itemsize == 2:
            function = {"norm": spec.norm, "act": spec.activation}.get(stage)
            t = torch.float32 if function in IN_FLOAT32.get(device, ()) else t

    def name(dtype: torch.dtype | None) -> str | None:
        known = dtype is None or dtype == product
        return None if known else str(dtype).removeprefix("torch.")

    spec = replace(spec, x_dtype=name(x), residual_dtype=name(residual), y_dtype=name(t))
    return spec.text, product


@constant_when_compiled
@lru_cache(maxsize=4096)
def y_dtype(recipe: str, product: torch.dtype) -> torch.dtype:
    """That of the result."""
    name = Spec.parse(recipe).y_dtype
    return product if name is None else getattr(torch, name)
