"""Whether backward may write over what forward saved for it: dz where z lies.

As AOTAutograd's donated buffers: eager frees an activation before it needs memory for the next
gradient, an op that makes all gradients at once can only write over it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 14  # elements: to ask costs a microsecond

# Private to torch, hence the getattr; a test sees what is saved by them.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
_users: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def donated(ctx: Any, saved: Sequence[Tensor], count: int, references: int) -> bool:
    """Whether the first `count` of what `ctx` saved, which its caller holds by so many references,
    are nobody else's: backward runs once (no retain_graph), no hook and no user holds them, no mode
    records ops.

    Where backward runs once, the graph forgets what it saved at once, as it would do after it: so a
    second one is an error even if this one fails.
    """
    if not count or saved[0].numel() < LEAST or _keeps_graph() or _modes():
        return False
    ctx.maybe_clear_saved_tensors()
    return all(
        type(t) is Tensor
        and sys.getrefcount(t) == references + 2  # and t's and the question's
        and _users(t.untyped_storage()._cdata) == 2  # t's and the question's
        for t in islice(saved, count)
    )
