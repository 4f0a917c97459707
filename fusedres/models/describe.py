"""What a branch ends in, in the words of its model."""

from __future__ import annotations

from torch.fx import Node

_MOVING = {
    "transpose": "a transpose, so that its rows are not those of the sum",
    "permute": "a transpose, so that its rows are not those of the sum",
    "roll": "windows that are put back in their places",
    "getitem": "a part of a larger value",
}
_ENDS = {
    "multi_head_attention_forward": "the attention output projection inside nn.MultiheadAttention",
    "add": "a sum",
    "iadd": "a sum",
    "mul": "a product of two activations",
    "glu": "a gated linear unit, with no product after it",
    "batch_norm": "batch norm over another dimension than the last",
}


def describe(node: Node) -> str:
    """What a branch ends in, in the words of its model."""
    name, source = _name(node), node
    while _name(source) in (*_MOVING, "view", "reshape") and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if _name(source) == "multi_head_attention_forward":
        name = _name(source)
    if node.op == "placeholder":
        return "a value from outside the graph"
    return _ENDS.get(name) or _MOVING.get(name) or f"'{name}'"


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).strip("_")
