"""``torch.compile(model, backend="fusedres")``: dynamo's graph with fused calls, run as it is or
handed on to Inductor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from ..backends import environment_flag
from .fuse import check_when, fuse
from .report import Add, Report

_log = logging.getLogger("fusedres")
_THEN = ("eager", "inductor")


# What was done to graphs, by the parameters that they read: dynamo does not tell whose they are.
_graphs: Any = WeakIdKeyDictionary()


def _keep(module: GraphModule, adds: list[Add]) -> None:
    for node in module.graph.nodes:
        tensor = getattr(node.meta.get("grapharg"), "example", None)
        if isinstance(tensor, nn.Parameter):
            _graphs.setdefault(tensor, []).append(adds)


def report(model: nn.Module) -> Report:
    """What backend "fusedres" of torch.compile did with the residual adds of a model, in all the
    graphs that were made of it so far; ``print(report(model))`` is readable.

    `model`: what torch.compile returned, or the model that it got. It is recognised by its
    parameters. Raises TypeError for anything but a torch.nn.Module, ValueError if nothing with a
    parameter of it has been compiled by this backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusedres.report: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    graphs: dict[int, tuple[int, list[Add]]] = {}
    for i, parameter in enumerate(model.parameters()):
        for adds in _graphs.get(parameter, ()):
            graphs.setdefault(id(adds), (i, adds))
    if not graphs:
        raise ValueError(
            "fusedres.report: no graph of this model was compiled with backend='fusedres' so far; "
            "torch.compile compiles when the model is called"
        )
    return Report.of_graphs('torch.compile(backend="fusedres")', graphs.values())


def backend(
    module: GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What torch.compile calls with each graph. Options: ``then``, "eager" (default: the graph runs
    as it is, op by op) or "inductor"; ``when``, "faster" (default) or "always". torch.compile's
    modes are refused, since they are Inductor's.
    """
    if mode is not None:
        raise ValueError(
            f"backend fusedres: mode={mode!r} is Inductor's, which runs the graphs with "
            f"options={{'then': 'inductor'}}; its settings are those of torch._inductor.config"
        )
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
    _keep(module, adds)
    if environment_flag("FUSEDRES_LOG"):
        _log.warning("%s", Report("torch.compile, one graph", tuple(adds)))
    if settings["then"] == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(module, example_inputs)
        return compiled
    return module.forward


def _fuse_all(module: GraphModule, when: str) -> list[Add]:
    """Also inside activation checkpointing, whose body is a graph of its own."""
    adds = fuse(module, when)
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") == "tag_activation_checkpoint":
            body = getattr(module, node.args[0].target)
            adds += _fuse_all(body, when)
    return adds
