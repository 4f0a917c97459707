"""What tools that read graphs see: an op with a gradient for exported programs, and FLOPs.

`torch.jit.trace` and ONNX get plain torch ops (`wants_plain_ops`). `torch.export` gets
``fusedres::residual_layer``, whose autograd is FusedResidualFunction's, so that the program trains;
the ops below it have none.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import FusedResidualFunction
from .operands import Operands
from .spec import Spec

# torch.jit.trace need not know that our own questions about shapes are no part of the graph.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="fusedres")


_tracing_state = torch._C._get_tracing_state


def wants_plain_ops(exporting: bool) -> bool:
    """Whether a tool is tracing that knows no ops but torch's."""
    return _tracing_state() is not None or (exporting and torch.onnx.is_in_onnx_export())


LAYER_SCHEMA = f"({ops.OPERANDS}, str recipe, str backend) -> Tensor[]"


def _run(*call: Any) -> list[Tensor]:
    """y, and (2, C) statistics where batch norm used this batch's."""
    *operands, recipe, backend = call
    y, *rest = ops.FORWARD[backend](*operands, recipe, False)
    return [y, *rest]


def _run_recording(*call: Any) -> list[Tensor]:
    register_flops()
    out = FusedResidualFunction.apply(*call)
    y, stats = out[:2] if isinstance(out, tuple) else (out, None)
    return [y] if stats is None else [y, stats]


def _fake(*call: Any) -> list[Tensor]:
    *operands, recipe, _backend = call
    return Operands(*operands).empty_outputs(Spec.parse(recipe), False, False).list()


torch.library.define("fusedres::residual_layer", LAYER_SCHEMA)
torch.library.impl("fusedres::residual_layer", "CompositeExplicitAutograd", _run)
torch.library.impl("fusedres::residual_layer", "Autograd", _run_recording)
torch.library.register_fake("fusedres::residual_layer", _fake)
residual_layer = torch.ops.fusedres.residual_layer.default


def _product(x: Any, weight: Any) -> int:
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def _forward_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _product(x, weight)


def _backward_flops(_dy: Any, _saved: Any, x: Any, weight: Any, *call: Any, **__: Any) -> int:
    """dx or what stands before ``linear`` takes one product, dweight another."""
    recipe, needs = call[-2:]
    spec = Spec.parse(recipe)
    early = {"norm": 0b11000, "gate": 0b100000, "add": 0b1000000}
    asked = 1 | sum(bits for stage, bits in early.items() if stage in spec.prologue)
    return _product(x, weight) * (bool(needs & asked) + bool(needs & 2))


def register_flops() -> None:
    """Tells torch's FlopCounterMode what the ops multiply: the ones at work, which hold a copy of
    the registry, and those to come. Not at import, since that counter imports Triton.
    """
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    found = (getattr(getattr(mode, "counter", None), "flop_registry", None) for mode in modes)
    for registry in (counter.flop_registry, *(r for r in found if r is not None)):
        for table, flops in ((ops.FORWARD, _forward_flops), (ops.BACKWARD, _backward_flops)):
            packets = {getattr(op, "overloadpacket", None) for op in table.values()}
            for packet in packets - {None}:
                registry.setdefault(packet, counter.shape_wrapper(flops))
