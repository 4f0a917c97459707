"""Whether transforms or torch.compile are at work; settings that are constants of a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

# Inside torch.func.grad, vmap and the like. Private to torch, hence the getattr; tests check both.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)
# A cotangent under torch.autograd.grad(is_grads_batched=True).
is_batched: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda t: False
)

Function = TypeVar("Function", bound=Callable[..., Any])


def by_value(settings: tuple[Any, ...]) -> list[Any]:
    """The settings without the symbols that tracers make of numbers (dynamic=True, or another value
    than last time). The graph is guarded by their values.
    """
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    numbers = (int, float, torch.SymInt, torch.SymFloat)
    return [guard_scalar(s) if isinstance(s, numbers) else s for s in settings]


def constant_when_compiled(cached: Function) -> Function:
    """`cached`, an lru_cache of a function of settings with a plain result, called once while
    dynamo traces. Left alone, dynamo warns of the cache and traces the function inside it.
    """

    def constant(*settings: Any) -> Any:
        return cached(*settings)

    # as torch.compiler.assume_constant_result does, which takes seconds to import torch._dynamo
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(cached)
    def call(*settings: Any) -> Any:
        if is_dynamo_compiling():
            return constant(*by_value(settings))
        try:
            return cached(*settings)
        except TypeError:  # a symbol has no hash: make_fx, or export without dynamo
            return cached(*by_value(settings))

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return cast(Function, call)
