"""``torch.compile(model, backend="fusedres")``: dynamo's graph with fused calls, run as it is or
handed on to Inductor.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..backends import environment_flag
from .fuse import check_when, fuse
from .report import Add, Report

_log = logging.getLogger("fusedres")
_THEN = ("eager", "inductor")


class _Reports:
    """What was done to the graphs of every model, by the parameters that they read."""

    def __init__(self) -> None:
        self.by_tensor: Any = weakref.WeakKeyDictionary()

    def keep(self, module: GraphModule, adds: list[Add]) -> None:
        for node in module.graph.nodes:
            tensor = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(tensor, nn.Parameter):
                self.by_tensor.setdefault(tensor, []).append(adds)


_reports = _Reports()


def backend(
    module: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What torch.compile calls with each graph. Options: ``then``, "eager" (default: the graph runs
    as it is, op by op) or "inductor"; ``when``, "faster" (default) or "always".
    """
    settings = {"then": "eager", "when": "faster"} | (options or {})
    unknown = settings.keys() - {"then", "when"}
    if unknown:
        raise ValueError(f"backend fusedres: unknown option {min(unknown)!r}; known: then, when")
    check_when("backend fusedres", settings["when"])
    if settings["then"] not in _THEN:
        raise ValueError(
            f"backend fusedres: unknown then={settings['then']!r}; known: {', '.join(_THEN)}"
        )
    adds = _fuse_all(module, settings["when"])
    _reports.keep(module, adds)
    if environment_flag("FUSEDRES_LOG"):
        _log.warning("%s", Report("torch.compile, one graph", tuple(adds)))
    if settings["then"] == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, example_inputs)
    return module.forward


def _fuse_all(module: GraphModule, when: str) -> list[Add]:
    """Also inside activation checkpointing, whose body is a graph of its own."""
    adds = fuse(module, when)
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") == "tag_activation_checkpoint":
            body = getattr(module, node.args[0].target)
            adds += _fuse_all(body, when)
    return adds
