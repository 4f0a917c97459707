"""From a graph to the same graph with fused calls, and the report of it."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import GraphModule, Node

from .block import Block
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


def _said(block: Block) -> str:
    recipes = ", ".join(spec_of(layer).text for layer in block.layers)
    calls = "one fused call" if len(block.layers) == 1 else f"{len(block.layers)} fused calls"
    return f"{recipes} in {calls}"


def _why_not(block: Block, when: str) -> str | None:
    pair = Pair(block)
    reason = disproof(pair)
    return loss(pair) if reason is None and when == "faster" else reason


def fuse(module: GraphModule, when: str) -> list[Add]:
    """Fuses what it can of a graph module, in place; its nodes carry example values.

    `when`: "faster" leaves what is measured to be slower here, "always" does not ask.
    """
    adds, chosen = [], []
    for add in Matcher(module.graph).find():
        block, reason = add.block, add.why_not
        if block is not None:
            reason = _why_not(block, when)
        if block is not None and reason is None:
            chosen.append(block)
        what = _said(chosen[-1]) if reason is None else reason
        where, line = module_path(add.node), _line(add.node)
        adds.append(Add(where, reason is None, what, add.convolutional, line))
    moved: dict[Node, Node] = {}
    for block in chosen:
        replace(module, block, moved)
    if chosen:
        module.graph.lint()
        module.recompile()
    return adds


def check_when(op: str, when: Any) -> None:
    if when not in WHEN:
        raise ValueError(f"{op}: unknown when={when!r}; known: {', '.join(WHEN)}")
