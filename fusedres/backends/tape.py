"""A call written down while it runs, so that a later one of the same key need not plan again.

Between the arguments of a call and its launches stands Python that decides what to allocate and
which kernels get what. The first call of a key does each thing that touches tensors through a Tape,
which notes it and where its arguments came from. A later call repeats these steps, and nothing
else, on tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor


class Tape:
    """`inputs` stand for the call's tensors in what is written down. Each is an object of its own:
    a tensor that came twice may be two tensors the next time.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.inputs = [t if t is None else t.detach() for t in tensors]
        self._values: list[Any] = list(self.inputs)  # and constants and results, each in its place
        self._places = {id(t): i for i, t in enumerate(self.inputs) if t is not None}
        self._steps: list[tuple[Callable[..., Any], Callable[[list[Any]], Any], int]] = []
        self._results: list[int] = []

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), now and in every `repeat`, then with the tensors that stand in the place
        of those in `args` and in tuples there.
        """
        take = _taker([self._place(value) for value in args])
        result = function(*args)
        self._steps.append((function, take, self._add(result)))
        return result

    def end(self, results: list[Tensor]) -> None:
        """`results` are what `repeat` returns; nothing is added any more, and no tensor is kept."""
        self._results = [self._places[id(t)] for t in results]
        self._values = [None if _has_tensor(value) else value for value in self._values]
        self.inputs, self._places = [], {}

    def repeat(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """All steps again, on these tensors for the first ones; the results."""
        values = self._values.copy()
        values[: len(tensors)] = tensors
        for function, take, place in self._steps:
            values[place] = function(*take(values))
        return [values[place] for place in self._results]

    def _add(self, value: Any) -> int:
        self._values.append(value)
        if isinstance(value, Tensor):
            self._places[id(value)] = len(self._values) - 1
        return len(self._values) - 1

    def _place(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return self._places[id(value)]
        if not _has_tensor(value):
            return self._add(value)
        take = _taker([self._place(part) for part in value])
        make = getattr(value, "_make", tuple)  # of a NamedTuple
        self._steps.append((lambda *parts: make(parts), take, self._add(value)))
        return len(self._values) - 1


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _taker(places: list[int]) -> Callable[[list[Any]], Any]:
    """The values at `places`, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
