"""From a traced pointwise torch function to the source of its value and derivative in Triton.

A graph holds aten ops on h, on constants and on what these gave. Each op that acts on a tile
becomes a line; ops on constants alone are computed here, in float64.
"""

from __future__ import annotations

import linecache
import math
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

FLOATS = {
    "abs": "tl.abs({0})", "neg": "-{0}", "add": "{0} + {1}", "sub": "{0} - {1}",
    "mul": "{0} * {1}", "div": "{0} / {1}", "reciprocal": "1.0 / {0}",
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "expm1": "pointwise.expm1({0})",
    "log": "pointwise.log({0})", "log2": "1.4426950408889634 * pointwise.log({0})",
    "log10": "0.4342944819032518 * pointwise.log({0})", "log1p": "pointwise.log1p({0})",
    "sqrt": "tl.sqrt_rn({0})", "rsqrt": "1.0 / tl.sqrt_rn({0})",
    "sin": "tl.sin({0})", "cos": "tl.cos({0})", "tan": "tl.sin({0}) / tl.cos({0})",
    "sinh": "pointwise.sinh({0})", "cosh": "pointwise.cosh({0})", "tanh": "epilogue.tanh({0})",
    "asinh": "pointwise.asinh({0})", "sigmoid": "tl.sigmoid({0})",
    "erf": "pointwise.erf({0})", "erfc": "pointwise.erfc({0})",
    "relu": "epilogue.relu({0})", "maximum": "pointwise.maximum({0}, {1})",
    "minimum": "pointwise.minimum({0}, {1})", "sign": "pointwise.sign({0})",
    "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "softshrink_backward": "tl.where(tl.abs({1}) <= {2}, 0.0, {0})",
    "hardshrink_backward": "tl.where(tl.abs({1}) <= {2}, 0.0, {0})",
}  # fmt: skip
COMPARISONS = {
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "eq": "{0} == {1}", "ne": "{0} != {1}",
    "isnan": "{0} != {0}", "isinf": 'tl.abs({0}) == float("inf")',
}  # fmt: skip
LOGIC = {
    "logical_and": "{0} & {1}", "bitwise_and": "{0} & {1}",
    "logical_or": "{0} | {1}", "bitwise_or": "{0} | {1}",
    "logical_xor": "{0} ^ {1}", "bitwise_xor": "{0} ^ {1}",
    "logical_not": "~{0}", "bitwise_not": "~{0}",
}  # fmt: skip
FILLS = {
    "zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1,
    "scalar_tensor": None, "full": None, "full_like": None, "new_full": None,
}  # fmt: skip  # None: the last argument
COPIES = ("alias", "clone", "detach", "lift", "lift_fresh", "lift_fresh_copy", "_to_copy")

# Torch's decompositions for exporters keep these whole.
ALSO_DECOMPOSED = (
    "gelu",
    "gelu_backward",
    "elu",
    "elu_backward",
    "hardtanh",
    "hardtanh_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "relu",
    "threshold_backward",
)

SMALLEST, LARGEST = 2.0**-126, torch.finfo(torch.float32).max
HIGHEST_POWER = 8  # a product of more factors is less accurate than torch's pow


class Tile(NamedTuple):
    """A value of h's shape: the name of a variable."""

    text: str
    boolean: bool = False


Number = bool | int | float


def op_name(target: Any) -> str:
    """An aten op's name, "add" of aten.add.Tensor; of anything else, its text."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return str(target)


def simplify(graph: GraphModule, h: torch.Tensor) -> GraphModule:
    """The graph without writes in place, of fewer kinds of ops."""
    from torch._decomp import core_aten_decompositions, get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    also = [getattr(torch.ops.aten, name) for name in ALSO_DECOMPOSED]
    table = {**core_aten_decompositions(), **get_decompositions(also)}
    return make_fx(torch.func.functionalize(graph), decomposition_table=table)(h)


def source(name: str, graph: GraphModule) -> str:
    """The text of the jitted functions NAME_value(h) and NAME_grad(h), for tiles of any shape.

    `graph` maps h to (value, derivative). NotImplementedError names what cannot be lowered.
    """
    results: Any = graph.graph.output_node().args[0]
    parts = [
        _Function(graph).text(f"{name}_{kind}", result)
        for kind, result in zip(("value", "grad"), results, strict=True)
    ]
    return "\n\n".join(parts)


def compile_source(name: str, text: str) -> tuple[Any, Any]:
    """The jitted functions of `source`. Triton reads their text through `inspect`."""
    import triton
    import triton.language as tl

    from ..kernels import epilogue, pointwise

    filename = f"<fusedres activation {name}>"
    linecache.cache[filename] = len(text), None, text.splitlines(True), filename
    space: dict[str, Any] = {
        "__name__": f"fusedres.activations.{name}",
        "triton": triton,
        "tl": tl,
        "epilogue": epilogue,
        "pointwise": pointwise,
    }
    exec(compile(text, filename, "exec"), space)
    return space[f"{name}_value"], space[f"{name}_grad"]


class _Function:
    """The lines of one function, made from its result backwards."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.lines: list[str] = []
        self.values: dict[Node, Tile | Number] = {}

    def text(self, name: str, result: Node) -> str:
        value = self.value(result)
        if isinstance(value, Tile):
            last = _float(value)
        else:
            last = f"tl.full(h.shape, {_float(value)}, tl.float32)"
        body = "".join(f"    {line}\n" for line in (*self.lines, f"return {last}"))
        return f"@triton.jit\ndef {name}(h):\n{body}"

    def value(self, arg: Any) -> Any:
        """What an argument of an op stands for: a tile, a number, None."""
        if not isinstance(arg, Node):
            return arg
        if arg not in self.values:
            self.values[arg] = self.lower(arg)
        return self.values[arg]

    def lower(self, node: Node) -> Tile | Number:
        if node.op == "placeholder":
            return Tile("h")
        if node.op == "get_attr":
            return getattr(self.graph, str(node.target)).item()
        op, dtype = op_name(node.target), getattr(node.meta["val"], "dtype", None)
        if op in FILLS:
            number: Any = self.value(node.args[-1]) if FILLS[op] is None else FILLS[op]
            return float(number) if dtype == torch.float32 else number
        args = [self.value(arg) for arg in node.args]
        if not any(isinstance(arg, Tile) for arg in args):
            return _compute(node, args)
        if op == "pow" and args[1] == 0:
            return 1.0
        boolean = dtype == torch.bool
        if not (boolean or dtype == torch.float32 or op == "where"):
            raise NotImplementedError(f"aten.{op} to {dtype} has no Triton form here")
        if op in COPIES:
            copied: Tile = args[0]
            return copied if copied.boolean == boolean else self.line(_float(copied))
        result = self.expression(node, op, args)
        if boolean and op not in COMPARISONS and op not in LOGIC:  # bool * bool, say
            result = f"{self.line(result).text} != 0.0"
        return self.line(result, boolean)

    def line(self, expression: str, boolean: bool = False) -> Tile:
        if expression.isidentifier():
            return Tile(expression, boolean)
        self.lines.append(f"v{len(self.lines)} = {expression}")
        return Tile(f"v{len(self.lines) - 1}", boolean)

    def expression(self, node: Node, op: str, args: list[Any]) -> str:
        kwargs = dict(node.kwargs)
        alpha = kwargs.pop("alpha", 1)
        unknown = NotImplementedError(f"{node.target} has no Triton form here")
        if kwargs or (alpha != 1 and op not in ("add", "sub")):
            raise unknown
        if op == "where" and len(args) == 3:
            return f"tl.where({_bool(args[0])}, {_float(args[1])}, {_float(args[2])})"
        if op == "masked_fill":
            return f"tl.where({_bool(args[1])}, {_float(args[2])}, {_float(args[0])})"
        if op == "clamp":
            return _clamp(*args)
        if op == "pow":
            return _power(*args)
        if op == "mul" and 1.0 in args:
            return _float(args[1 - args.index(1.0)])
        for table, operand in ((FLOATS, _float), (COMPARISONS, _float), (LOGIC, _bool)):
            if op in table and len(args) == _arity(table[op]):
                operands = [operand(arg) for arg in args]
                if alpha != 1:
                    operands[1] = f"{_float(alpha)} * {operands[1]}"
                return table[op].format(*operands)
        raise unknown


def _arity(template: str) -> int:
    return sum(f"{{{i}}}" in template for i in range(3))


def _compute(node: Node, args: list[Any]) -> Number:
    """An op on numbers alone, floats in float64."""
    target: Any = node.target
    tensors = [
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if isinstance(arg, Node)
        else value
        for arg, value in zip(node.args, args, strict=True)
    ]
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("alpha", "rounding_mode")}
    dtype: Any = node.kwargs.get("dtype")
    if dtype is not None:
        kwargs["dtype"] = torch.float64 if dtype.is_floating_point else dtype
    return target(*tensors, **kwargs).item()


def _float(value: Any) -> str:
    """An operand as an expression for fp32."""
    if isinstance(value, Tile):
        return f"tl.where({value.text}, 1.0, 0.0)" if value.boolean else value.text
    number = float(value)
    if not math.isfinite(number):
        return f'float("{number}")'
    if number and not SMALLEST <= abs(number) <= LARGEST:  # Triton would compute in float64
        raise NotImplementedError(f"the constant {number} is not a normal fp32 number")
    return repr(number)


def _bool(value: Any) -> str:
    if isinstance(value, Tile):
        return value.text if value.boolean else f"({value.text} != 0.0)"
    return str(bool(value))


def _clamp(h: Any, least: Any = None, most: Any = None) -> str:
    text = _float(h)
    if least is not None:
        text = f"pointwise.maximum({text}, {_float(least)})"
    return text if most is None else f"pointwise.minimum({text}, {_float(most)})"


def _power(base: Any, exponent: Any) -> str:
    """Whole and half exponents as products, and powers of 2."""
    if base == 2:
        return f"tl.exp2({_float(exponent)})"
    if isinstance(exponent, Tile) or not isinstance(base, Tile):
        raise NotImplementedError("aten.pow is lowered for h ** number and 2 ** h only")
    whole, half = divmod(abs(exponent), 1)
    if half not in (0, 0.5) or whole > HIGHEST_POWER:
        raise NotImplementedError(
            f"aten.pow with exponent {exponent} has no Triton form here: "
            f"multiples of 0.5 up to {HIGHEST_POWER} have"
        )
    factors = [_float(base)] * int(whole) + [f"tl.sqrt_rn({_float(base)})"] * (half == 0.5)
    product = " * ".join(factors) or "1.0"
    return f"1.0 / ({product})" if exponent < 0 else product
