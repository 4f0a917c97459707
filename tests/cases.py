"""Random operands of one call."""

import zlib
from dataclasses import dataclass, replace

import torch

from fusedres import ORDERS
from fusedres.spec import make_spec

ALIASES = tuple(ORDERS)
DIFFERENTIABLE = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate", "residual")
STATISTICS = ("running_mean", "running_var")

# activation -> where its derivative jumps, and where _aside puts pre-activations in half precision
KINKS = {
    "relu": (0,),
    "leaky_relu": (0,),
    "selu": (0,),
    "relu6": (0, 6),
    "hardswish": (-3, 3),
    "hardsigmoid": (-3, 3),
}
ASIDE = {
    "relu": (-8, 8),
    "leaky_relu": (-8, 8),
    "selu": (-8, 8),
    "relu6": (-8, 14),
    "hardswish": (-11, 0, 11),
    "hardsigmoid": (-11, 0, 11),
}


@dataclass(frozen=True)
class Case:
    """One call: settings of make_spec, operands by name, the cotangent dy, the masks' seed."""

    settings: dict
    tensors: dict
    dy: torch.Tensor
    pad: bool = False
    momentum: float = 0.1
    seed: int = 7

    @property
    def spec(self):
        return make_spec(**self.settings)

    @property
    def x(self):
        return self.tensors["x"]

    @property
    def asked(self):
        """Everything that can have a gradient."""
        return tuple(name for name in DIFFERENTIABLE if name in self.tensors)

    def with_tensors(self, dy=None, **tensors):
        return replace(self, tensors={**self.tensors, **tensors}, dy=self.dy if dy is None else dy)


def make_case(
    M=64,
    K=339,
    N=None,
    *,
    lead=None,
    order="note",
    norm="layer",
    activation="relu",
    gate=None,
    dropout=0.0,
    drop_path=0.0,
    residual_scale=1.0,
    eps=1e-5,
    training=True,
    dtype=torch.float32,
    bias=True,
    affine=True,
    norm_bias=None,
    residual=None,
    pad=False,
    scale=1.0,
    mean=0.0,
    draw=0,
):
    """Random operands. `residual`: None for x itself (where widths allow), else its width.

    `scale`: sigma of x, bias and residual. `mean`: of what the norm sees. `draw`: which case.
    """
    N = K if N is None else N
    settings = {
        "order": order,
        "norm": norm,
        "activation": activation,
        "gate": gate,
        "eps": eps,
        "dropout": dropout,
        "drop_path": drop_path,
        "residual_scale": residual_scale,
        "training": training,
    }
    spec = make_spec(**settings)
    lead = (M,) if lead is None else lead
    random = torch.Generator().manual_seed(
        zlib.crc32(repr((settings, lead, K, N, dtype, scale, draw)).encode())
    )

    def normal(*shape, mean=0.0, sigma=1.0):
        return (mean + sigma * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

    early = "norm" in spec.prologue
    tensors = {"x": normal(*lead, K, mean=mean if early else 0.0, sigma=scale)}
    tensors["weight"] = normal(N, K, sigma=K**-0.5)
    if bias:
        tensors["bias"] = normal(N, mean=0.0 if early else mean, sigma=0.3 * scale)
    if spec.norm is not None:
        C = spec.width("norm", K, N)
        if affine:
            tensors["norm_weight"] = normal(C, mean=1.0, sigma=0.3)
            if (spec.norm != "rms") if norm_bias is None else norm_bias:
                tensors["norm_bias"] = normal(C, sigma=0.3)
        if spec.norm == "batch":
            tensors["running_mean"] = normal(C, sigma=0.1)
            tensors["running_var"] = normal(C, mean=1.0, sigma=0.1).abs()
    if spec.gate is not None:
        tensors["gate"] = normal(
            1 if gate == "scalar" else spec.width("gate", K, N), mean=0.7, sigma=0.3
        )
    width = spec.width("add", K, N)
    if residual is None and spec.adds and width != K and not (pad and width > K):
        residual = width
    if residual is not None:
        tensors["residual"] = normal(*lead, residual, sigma=scale)
    if spec.activation in KINKS and dtype in (torch.bfloat16, torch.float16):
        _aside(spec, tensors, K, N, max(scale, 1.0))
    return Case(settings, tensors, normal(*lead, N), pad)


def _aside(spec, tensors, K, N, scale):
    """Shifts whole columns of the pre-activation away from the kinks.

    In half precision one element in a hundred lies within its rounding error of a kink, for eager
    as for us, and the few that fall on another side than the exact one decide about the RMS error:
    luck, not accuracy.
    """
    before = [
        stage for stage in spec.stages[: spec.stages.index("act")] if stage in ("norm", "linear")
    ]
    if not before:
        return  # the activation sees x itself
    name, width = ("norm_bias", spec.width("norm", K, N)) if before[-1] == "norm" else ("bias", N)
    to = torch.tensor(ASIDE[spec.activation]).repeat(width)[:width] * (
        1.0 if name == "norm_bias" else scale
    )
    old = tensors.get(name, torch.zeros(()))
    tensors[name] = (old + to).to(tensors["x"].dtype)
