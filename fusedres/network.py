"""Whole networks: an nn.Sequential whose runs of residual layers are one call each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from . import chain
from .chain import Link
from .layers import hooked
from .links import Part, Stream, joined, link_of, links_of, unchained
from .mlp import FusedResidualMLP
from .modules import FusedResidual

JOINED = (FusedResidual, FusedResidualMLP)


def _parts(module: nn.Module) -> list[Part] | None:
    """The layers that a module is, if calling it does no more than calling them."""
    if type(module) is FusedResidual:
        return [Part(module)]
    if type(module) is not FusedResidualMLP or "forward" in vars(module) or hooked(vars(module)):
        return None
    return module.parts()


class FusedSequential(nn.Sequential):
    """An nn.Sequential (same arguments, keys, order, indexing and results) in which runs of
    FusedResidual layers and FusedResidualMLP blocks are one call each, forward and backward: rows
    walk through all layers of a run while they lie in a CPU's cache or a GPU's registers, and all
    weight gradients are computed together.

    What cannot be joined, a layer with hooks, a shortcut of another kind than torch's own linear, a
    weight of more than 2^18 elements or a foreign module, is called as nn.Sequential calls it, and
    parts a run in two. Under torch.compile, torch.func and the like all are. On a GPU layers of one
    kind and width are joined, as FusedResidualStack has it; blocks are not. `chains` tells which
    layers a call joins, and why not.

    Source: the layers one by one; He et al., arxiv.org/abs/1512.03385.
    """

    def forward(self, x: Any) -> Any:
        """y of the last module from x (..., K) of the first."""
        modules: list[Any] = list(self._modules.values())
        at = 0
        while at < len(modules):
            count, links = self._run_from(modules, at, x)
            y = joined(x, links) if count > 1 else None
            if y is None:
                for module in modules[at : at + count]:
                    x = module(x)
            else:
                x = y
            at += count
        return x

    @staticmethod
    def _run_from(modules: list[Any], at: int, x: Any) -> tuple[int, list[tuple[Link, ...]]]:
        """How many modules from modules[at] on one call can run, at least one, and their layers'
        links.
        """
        if at + 1 == len(modules) or type(modules[at]) not in JOINED:
            return 1, []
        if not isinstance(x, Tensor) or unchained(x) is not None:
            return 1, []
        ends: list[int] = []  # how many links there are after each module

        def parts() -> Iterator[Part]:
            count = 0
            for index in range(at, len(modules)):
                for part in _parts(modules[index]) or ():
                    count += 1
                    yield part
                if count == (ends[-1] if ends else 0):
                    return
                ends.append(count)

        links = links_of(parts(), x)
        return max(1, len(ends)), links[: ends[-1]] if ends else []

    def chains(self, x: Tensor) -> list[str]:
        """What a call with x (..., K) does, a line for each run or module. Nothing runs: a module
        that stands alone is taken to give its `out_features`, or as many as it gets.
        """
        reason, at, lines = unchained(x), 0, []
        modules: list[Any] = list(self._modules.items())
        while at < len(modules):
            name, module = modules[at]
            count, links = self._run_from([m for _, m in modules], at, x)
            if count > 1:
                at += count
                width = links[-1][-1].operands[0].shape[0]
                way = chain.way_of_links([link for own in links for link in own], x)
                lines.append(f"{name} to {modules[at - 1][0]}: {way}")
            else:
                at += 1
                alone = reason or _why_alone(module, x)
                width = getattr(module, "out_features", x.shape[-1])
                lines.append(f"{name}: by itself: {alone}")
            x = x.new_empty(()).expand(*x.shape[:-1], width)
        return lines


def _why_alone(module: nn.Module, x: Tensor) -> str:
    streams = [Stream(x.shape[-1], x.dtype)]
    parts = _parts(module) if isinstance(module, JOINED) else [Part(module)]
    if parts is None and getattr(module, "glu", False):
        return "it has a gated linear unit between its matmuls"
    if parts is None:
        return "it has hooks, a shortcut of its own, or its forward was replaced"
    for layer, back in parts:
        stream = streams[-1]
        if back:
            stream = stream._replace(residual=streams[-1 - back].dtype)
        found = link_of(layer, x, stream, back)
        if isinstance(found, str):
            return found
        streams.append(found[1])
    return "no neighbour to be joined with"
