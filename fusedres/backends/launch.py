"""Launches of a Triton kernel: by Triton the first time, then by what it compiled.

Triton asks at every launch which of its compiled kernels the arguments ask for, in some 40 us. They
ask for the same one wherever `key_of` is the same: it has more than Triton looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

try:
    from triton import knobs
    from triton.runtime import driver
except ImportError:
    knobs = driver = None

MOST_CALLS = 4096
_calls: dict[Hashable, Call] = {}
T = TypeVar("T")


def key_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Of each its dtype, sizes, strides, device and whether it begins at a multiple of 16 bytes."""
    return tuple(
        None if t is None else (t.dtype, t.shape, t.stride(), t.device, t.data_ptr() & 15 == 0)
        for t in tensors
    )


def call_of(key: Hashable) -> Call:
    """The one of `key`, empty at first."""
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= MOST_CALLS:  # as when no two batches have the same number of rows
            _calls.clear()
        call = _calls[key] = Call()
    return call


def hooked() -> bool:
    """Whether a profiler waits for Triton to launch; a hook is None, a function or a chain."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


class Call:
    """What does not change between calls of one key."""

    __slots__ = ("compiled", "known")

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.compiled: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {}

    def once(self, name: str, compute: Callable[..., T], *args: Any) -> T:
        """compute(*args), as it was the first time."""
        if name not in self.known:
            self.known[name] = compute(*args)
        return self.known[name]

    def launch(
        self, kernel: Any, programs: int, args: tuple[Any, ...], constants: Any, name: str = ""
    ) -> None:
        """As kernel[(programs,)](*args, **constants); `name` tells it from this call's others."""
        known, compiled, rest = self.compiled.get(name, (None, None, ()))
        if known is not kernel or hooked():
            compiled = kernel[(programs,)](*args, **constants)
            if compiled is not None:  # None from the interpreter
                rest = tuple(constants[n] for n in kernel.arg_names[len(args) :])
                self.compiled[name] = kernel, compiled, rest
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *args, *rest,
        )  # fmt: skip
