"""Ctrl-C, at any moment from the first import on: one line, exit code 130, no traceback.

Nothing is imported here that takes time: fusedres/__init__.py asks for it first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CODE = 130


def said() -> int:
    """The exit code, once the line is printed."""
    print("interrupted", file=sys.stderr, flush=True)
    # CPython takes a KeyboardInterrupt that left an exec of text for unhandled, even if it is
    # caught later, and ends by the signal instead of a code; the next exec makes it forget.
    exec("")
    return CODE


def while_importing() -> None:
    """For `python -m fusedres`, until `from_now_on`: an import may swallow a KeyboardInterrupt and
    go on half-made, so none is raised.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so under nohup
        signal.signal(signal.SIGINT, _leave)


def from_now_on() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    os._exit(said())


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C waits for the end of this block; processes that are started in it never see it."""
    mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
    if mask:
        mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_UNBLOCK, {signal.SIGINT})
