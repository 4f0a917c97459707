"""What became of a model's residual adds, and of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True)
class Add:
    """One residual add: `where` is its module's path, `what` the fused calls or why it was left."""

    where: str
    fused: bool
    what: str
    convolutional: bool = False
    line: str = ""  # of the model's source; empty where the graph does not tell


@dataclass(frozen=True)
class Change:
    """What became of one module: `name` is its path in the model, `what` tells it or the reason."""

    name: str
    fused: bool
    what: str

    @property
    def where(self) -> str:
        return self.name


Entry = TypeVar("Entry", Add, Change)


class _Told(Generic[Entry]):
    """Entries, each of which was fused or left."""

    @property
    def _entries(self) -> tuple[Entry, ...]:
        raise NotImplementedError

    @property
    def fused(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if entry.fused)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if not entry.fused)

    def _lines(self, done: str) -> list[str]:
        width = max((len(entry.where) for entry in self._entries), default=0)
        verbs = (done if entry.fused else "left" for entry in self._entries)
        return [
            f"  {verb:{len(done)}}  {entry.where:{width}}  {entry.what}"
            for verb, entry in zip(verbs, self._entries, strict=True)
        ]


@dataclass(frozen=True)
class Report(_Told[Add]):
    """The residual adds of a model, in the order in which it runs them; ``print(report)``.

    `convolutional` ones, whose branch ends in a convolution, are counted apart: the grammar has
    matmuls only.
    """

    title: str
    adds: tuple[Add, ...]

    @staticmethod
    def of_graphs(title: str, graphs: Iterable[tuple[int, Iterable[Add]]]) -> Report:
        """Of several graphs, the newest last, each with the number of its first parameter: what two
        of the same parameter have, of training and evaluation say, counts once, as the newest has
        it.
        """
        adds: dict[tuple[int, str, str, int], Add] = {}
        for i, (first, graph) in enumerate(graphs):
            times: Counter[tuple[str, str]] = Counter()
            for add in graph:
                line = add.line or f"of graph {i}"
                adds[first, add.where, line, times[add.where, line]] = add
                times[add.where, line] += 1
        return Report(title, tuple(adds.values()))

    @property
    def _entries(self) -> tuple[Add, ...]:
        return self.adds

    @property
    def found(self) -> int:
        return sum(not add.convolutional for add in self.adds)

    def __str__(self) -> str:
        convolutional = len(self.adds) - self.found
        more = f"; {convolutional} of convolutions" if convolutional else ""
        lines = [f"{self.title}: {len(self.fused)} of {self.found} residual adds fused{more}"]
        lines += self._lines("fused")
        reasons = Counter(add.what for add in self.left)
        if len(self.adds) > 8 and reasons:
            lines.append("left, by reason:")
            lines += [f"  {n:4} x {reason}" for reason, n in reasons.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class ConversionReport(_Told[Change]):
    """What `convert` or `revert` did, module by module; ``print(report)`` is readable."""

    title: str
    changes: tuple[Change, ...]
    adds: tuple[Add, ...] = ()

    @property
    def _entries(self) -> tuple[Change, ...]:
        return self.changes

    @property
    def residual_adds(self) -> Report:
        """What became of the residual adds that example inputs showed."""
        return Report(self.title, self.adds)

    def __str__(self) -> str:
        head = f"{self.title}: {len(self.fused)} changed, {len(self.left)} left alone"
        lines = [head, *self._lines("changed")]
        if self.adds:
            lines = [str(self.residual_adds), *(lines if self.changes else [])]
        return "\n".join(lines)
