"""From a graph to the same graph with fused calls, and the report of it."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import GraphModule, Node

from .block import Block
from .chains import Run, runs_of
from .gain import loss
from .match import Matcher
from .proof import Pair, disproof
from .report import Add
from .rewrite import replace, spec_of

WHEN = ("faster", "always")


def module_path(node: Node) -> str:
    """The path of the module whose forward has this node, "blocks.0.mlp" say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "(the model)"
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"^L\['\w+'\](\[\d+\])?\.?", "", path).replace("_orig_mod.", "")
    return path or "(the model)"


def _line(node: Node) -> str:
    """File and line of the model's source that made the node, if it is known whose forward did."""
    if not node.meta.get("nn_module_stack"):  # as where torch splits a graph for DDP
        return ""
    trace = (node.meta.get("stack_trace") or node.stack_trace or "").strip().splitlines()
    return trace[-2].strip() if len(trace) > 1 else ""


def _said(block: Block, adds: int, is_chain: bool) -> str:
    said = []
    for layer in block.layers:
        if layer.gating is not None:
            said.append(f"{layer.gating.unit.activation}(a) * b")
        said.append(spec_of(layer).text)
    several = len(said) > 1 and not is_chain
    calls = f"{len(said)} fused calls" if several else "one fused call"
    shared = f" for {adds} residual adds" if adds > 1 else ""
    return f"{', '.join(said)} in {calls}{shared}"


def _judged(run: Run, when: str) -> list[tuple[Run, str | None]]:
    """The run, if all of it is better fused, else its blocks; each with why not."""
    reason = loss(Pair(run)) if when == "faster" else None
    if reason is None or len(run.blocks) == 1:
        return [(run, reason)]
    return [alone for block in run.blocks for alone in _judged(Run([block]), when)]


def fuse(module: GraphModule, when: str) -> list[Add]:
    """Fuses what it can of a graph module, in place; its nodes carry example values.

    `when`: "faster" leaves what is measured to be slower here, "always" does not ask.
    """
    matcher = Matcher(module.graph)
    found = matcher.find()
    said: dict[Node, tuple[bool, str]] = {}
    proved: list[Block] = []
    for add in found:
        reason = add.why_not if add.block is None else disproof(Pair(Run([add.block])))
        if add.block is not None and reason is None:
            proved.append(add.block)
        said[add.node] = False, reason or ""
    chosen = []
    for together in runs_of(proved, matcher.flow):
        for run, reason in _judged(together, when):
            if reason is None:
                chosen.append(run)
            what = len(run.blocks), run.is_chain
            for block in run.blocks:
                said[block.add] = reason is None, reason or _said(block, *what)
    moved: dict[Node, Node] = {}
    for run in chosen:
        replace(module, run, moved)
    if chosen:
        module.graph.lint()
        module.recompile()
    return [
        Add(module_path(add.node), *said[add.node], add.convolutional, _line(add.node))
        for add in found
    ]


def check_when(op: str, when: Any) -> None:
    if when not in WHEN:
        raise ValueError(f"{op}: unknown when={when!r}; known: {', '.join(WHEN)}")
