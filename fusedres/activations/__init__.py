"""A user's own activation: checked, traced with its derivative, and written as Triton source."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES
from ..reference import ACTIVATION_FUNCTIONS
from ..spec import ACTIVATIONS, REGISTERED
from . import lowering

# Pointwise, but not tagged so in torch.
POINTWISE = {
    "leaky_relu",
    "leaky_relu_backward",
    "hardswish",
    "hardswish_backward",
    "hardtanh_backward",
    "hardsigmoid_backward",
    "elu_backward",
    "mish_backward",
    "softplus_backward",
    "log_sigmoid_forward",
    "log_sigmoid_backward",
    "softshrink_backward",
    "hardshrink_backward",
    "rsub",
    "where",
    "masked_fill",
    "masked_fill_",
    *lowering.FILLS,
    *lowering.COPIES,
}


# What torch says of a function that is none, and what it comes from.
CAUSES = {
    "numpy()": "it calls numpy, which has no derivative; use torch's functions",
    "_local_scalar_dense": "it reads a number out of h (by if, float() or .item()) and computes "
    "by it; use torch.where, and tensors",
    "in-place operation": "it writes into h",
    "must match the size": "a tensor of one shape meets h, which comes in any shape",
}


class Registered(NamedTuple):
    """What ``spec.REGISTERED`` holds."""

    source: str  # of the Triton functions, see lowering.py
    why_not_triton: str | None  # why there is no source


def register_activation(name: str, torch_function: Callable[[Tensor], Tensor]) -> None:
    """From now on `name` is an activation wherever one can be named, with its derivative derived.

    Plain torch ops call the function itself; the Triton kernels run it, and the derivative that
    autograd gives it, lowered into the kernel in fp32. The C++ kernels know the built-in
    activations only, so on a CPU ``backend="auto"`` runs plain torch ops. ``fusedres.explain`` says
    so, and names an op that has no Triton form.

    Args:
        name: an ASCII identifier that no activation has. The same function may come again.
        torch_function: h -> act(h), a tensor of h's shape and dtype, each element of it computed
            from the same element of h by differentiable torch ops. Numbers and 0-dim tensors may be
            captured: their values of now count, so the function must not change later.

    Raises:
        TypeError: `name` is no string, or `torch_function` cannot be called.
        ValueError: the name is taken or no identifier; or the function is not pointwise, random,
            not differentiable, captures a tensor or parameter, writes into h, or returns something
            else than h's shape and dtype. The message says which.

    A process that loads a model with this activation has to register it first.

    Example::

        >>> import torch, fusedres
        >>> fusedres.register_activation("snake", lambda h: h + torch.sin(h).square())
        >>> layer = fusedres.FusedResidual(64, activation="snake")
        >>> layer(torch.zeros(2, 64)).shape
        torch.Size([2, 64])
    """
    if not isinstance(name, str):
        raise TypeError(f"fusedres: an activation's name must be a string, got {name!r}")
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
        raise ValueError(f"fusedres: an activation's name must be an identifier, got {name!r}")
    kind = type(torch_function).__name__
    if isinstance(torch_function, type):
        what = torch_function.__name__
        raise TypeError(f"fusedres: activation {name!r} must be a function, got the class {what}")
    if kind == "ufunc":
        raise TypeError(f"fusedres: activation {name!r} must be of torch ops, got a numpy function")
    if not callable(torch_function):
        raise TypeError(f"fusedres: activation {name!r} must be a function of a tensor, got {kind}")
    if name in REGISTERED and ACTIVATION_FUNCTIONS[name] is torch_function:
        return
    if name in ACTIVATIONS or name in REGISTERED:
        what = "built in" if name in ACTIVATIONS else "registered with another function"
        raise ValueError(f"fusedres: activation {name!r} is {what} already; choose another name")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            graph = _trace(torch_function)
            _check_graph(graph)
            _check_elements(torch_function)
            lowered = _lower(name, graph)
    except Exception as error:  # whatever the function itself raises, too
        told = next((why for words, why in CAUSES.items() if words in str(error)), error)
        raise ValueError(f"fusedres: activation {name!r} is refused: {told}") from error
    ACTIVATION_FUNCTIONS[name] = torch_function
    REGISTERED[name] = lowered


def why_not_triton(name: str) -> str | None:
    """None if the registered activation can run in a Triton kernel, else the reason."""
    reason = REGISTERED[name].why_not_triton
    return None if reason is None else f"activation {name!r}: {reason}"


@cache
def triton_functions(name: str) -> tuple[Any, Any]:
    """The jitted functions value(h) and grad(h) of a registered activation.

    Both map an fp32 tile of any shape to one of the same shape. Raises NotImplementedError with the
    reason of `why_not_triton`.
    """
    reason = why_not_triton(name)
    if reason is not None:
        raise NotImplementedError(f"fusedres: {reason}")
    return lowering.compile_source(name, REGISTERED[name].source)


def _lower(name: str, graph: Any) -> Registered:
    try:
        return Registered(lowering.source(name, lowering.simplify(graph, _example())), None)
    except (NotImplementedError, RuntimeError) as error:  # ours, or one of torch's decompositions
        return Registered("", str(error))


def _example() -> Tensor:
    """What a function is traced on; no size stands twice."""
    return torch.linspace(-4, 4, 15, dtype=torch.float32, device="cpu").view(3, 5)


def _value_and_derivative(function: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach().requires_grad_()
    value = function(h)
    if not isinstance(value, Tensor):
        raise ValueError(f"it returns {type(value).__name__}, expected a tensor")
    if value.shape != h.shape:
        raise ValueError(f"it returns shape {tuple(value.shape)} for shape {tuple(h.shape)}")
    if value.dtype != h.dtype:
        raise ValueError(f"it returns {value.dtype} for {h.dtype}")
    if not value.requires_grad:
        raise ValueError("it is not differentiable")
    (derivative,) = torch.autograd.grad(value, h, torch.ones_like(value))
    return value, derivative


def _trace(function: Callable[[Tensor], Tensor]) -> Any:
    """h -> (value, derivative) as a graph of aten ops."""
    from torch.fx.experimental.proxy_tensor import make_fx

    h = _example()
    _value_and_derivative(function, h)  # its own errors, before those of tracing
    return make_fx(lambda h: _value_and_derivative(function, h))(h)


def _check_graph(graph: Any) -> None:
    """Only pointwise ops of h and of numbers."""
    nodes = [node for node in graph.graph.nodes if node.target is not operator.getitem]
    tags = {node: getattr(node.target, "tags", ()) for node in nodes if node.op == "call_function"}
    for node in tags:
        if torch.Tag.nondeterministic_seeded in tags[node]:
            raise ValueError(f"it is random: {node.target}")
    for node in nodes:
        if node.op == "get_attr":
            _check_captured(getattr(graph, node.target))
        elif node in tags and not (
            torch.Tag.pointwise in tags[node] or lowering.op_name(node.target) in POINTWISE
        ):
            raise ValueError(f"{node.target} is not pointwise")


def _check_captured(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() or value.requires_grad:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ValueError(
            f"it captures a {type(value).__name__}{shape}; only numbers and 0-dim tensors without "
            f"gradient can be captured"
        )


def _check_elements(function: Callable[[Tensor], Tensor]) -> None:
    """Each element by itself gives the same, in any shape, order and number; in every dtype."""
    h = torch.linspace(-4, 4, 60, dtype=torch.float64, device="cpu")
    whole = _value_and_derivative(function, h)
    for again, t in zip(_value_and_derivative(function, h), whole, strict=True):
        if not torch.equal(again.nan_to_num(), t.nan_to_num()):
            raise ValueError("it is random: two calls differ")
    order = torch.arange(60, device="cpu") * 7 % 60
    layouts: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.view(6, 10),
        lambda t: t.view(3, 4, 5),
        lambda t: t.view(6, 10).t(),
        lambda t: t[order],
        lambda t: t[:7],
        lambda t: t[:0],
    )
    for layout in layouts:
        for ours, t in zip(_value_and_derivative(function, layout(h)), whole, strict=True):
            if not torch.allclose(ours, layout(t), 1e-5, 1e-6, equal_nan=True):
                raise ValueError("an element depends on other elements or on the shape")
    for dtype in DTYPES:
        _value_and_derivative(function, h.to(dtype))
