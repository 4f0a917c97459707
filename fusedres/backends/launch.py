"""Launches of a Triton kernel: by Triton the first time, then by what it compiled.

Triton asks at every launch which of its compiled kernels the arguments ask for, in some 40 us. They
ask for the same one wherever `key_of` is the same: it has more than Triton looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..operands import Operands, Outputs
from ..spec import Spec
from .tape import Tape

try:
    from triton import knobs
    from triton.runtime import driver
except ImportError:
    knobs = driver = None

MOST_CALLS = 4096
_calls: dict[Hashable, Call] = {}
T = TypeVar("T")


def key_of(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Of each its dtype, sizes, strides, device and place beside multiples of 16 bytes, or None."""
    return [
        None if t is None else (t.dtype, t.shape, t.stride(), t.device, t.data_ptr() & 15)
        for t in tensors
    ]


def places(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Of each its place beside multiples of 16 bytes: of memory that is not new, which has none."""
    return tuple(0 if t is None else t.data_ptr() & 15 for t in tensors)


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
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Call:
    """What does not change between calls of one key."""

    __slots__ = ("compiled", "known", "tape")

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.known: dict[str, Any] = {}
        self.compiled: dict[str, tuple[Any, ...]] = {}

    def once(self, name: str, compute: Callable[..., T], *args: Any) -> T:
        """compute(*args), as it was the first time."""
        if name not in self.known:
            self.known[name] = compute(*args)
        return self.known[name]

    def outputs(self, o: Operands, spec: Spec, save: bool) -> Outputs:
        """`o.empty_outputs`, of the sizes and types that it gave the first time."""
        made = self.known.get("outputs")
        if made is None:
            found = o.empty_outputs(spec, save, True)
            kinds = [t if t is None else (t.shape, t.stride(), t.dtype) for t in found]
            self.known["outputs"] = kinds
            return found
        device, new = o.weight.device, torch.empty_strided
        again = (k if k is None else new(k[0], k[1], dtype=k[2], device=device) for k in made)
        return Outputs(*again)  # type: ignore[arg-type]

    def launch(
        self, kernel: Any, programs: int, args: tuple[Any, ...], constants: Any, name: str = ""
    ) -> None:
        """As kernel[(programs,)](*args, **constants); `name` tells it from this call's others."""
        known = self.compiled.get(name)
        if known is None or known[0] is not kernel or hooked():
            compiled = kernel[(programs,)](*args, **constants)
            if compiled is not None:  # None from the interpreter
                rest = tuple(constants[n] for n in kernel.arg_names[len(args) :])
                run, function = compiled.run, compiled.function
                self.compiled[name] = kernel, run, function, compiled.packed_metadata, rest
            return
        _, run, function, metadata, rest = known
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *rest)
