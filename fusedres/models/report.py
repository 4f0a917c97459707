"""What became of a model's residual adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Add:
    """One residual add: `where` is its module's path, `what` the fused calls or why it was left."""

    where: str
    fused: bool
    what: str
    convolutional: bool = False
    line: str = ""  # of the model's source; empty where the graph does not tell


@dataclass(frozen=True)
class Report:
    """The residual adds of a model, in the order in which it runs them; ``print(report)``.

    `convolutional` ones, whose branch ends in a convolution, are counted apart: the grammar has
    matmuls only.
    """

    title: str
    adds: tuple[Add, ...]

    @staticmethod
    def of_graphs(title: str, graphs: Iterable[Iterable[Add]]) -> Report:
        """Of several graphs, the newest last: what two have, of training and evaluation say, counts
        once, as the newest has it.
        """
        adds: dict[tuple[str, str, int], Add] = {}
        for i, graph in enumerate(graphs):
            times: Counter[tuple[str, str]] = Counter()
            for add in graph:
                line = add.line or f"of graph {i}"
                adds[add.where, line, times[add.where, line]] = add
                times[add.where, line] += 1
        return Report(title, tuple(adds.values()))

    @property
    def found(self) -> int:
        return sum(not add.convolutional for add in self.adds)

    @property
    def fused(self) -> tuple[Add, ...]:
        return tuple(add for add in self.adds if add.fused)

    @property
    def left(self) -> tuple[Add, ...]:
        return tuple(add for add in self.adds if not add.fused)

    def __str__(self) -> str:
        convolutional = len(self.adds) - self.found
        more = f"; {convolutional} of convolutions" if convolutional else ""
        lines = [f"{self.title}: {len(self.fused)} of {self.found} residual adds fused{more}"]
        width = max((len(add.where) for add in self.adds), default=0)
        for add in self.adds:
            verb = "fused" if add.fused else "left"
            lines.append(f"  {verb:5}  {add.where:{width}}  {add.what}")
        reasons = Counter(add.what for add in self.left)
        if len(self.adds) > 8 and reasons:
            lines.append("left, by reason:")
            lines += [f"  {n:4} x {reason}" for reason, n in reasons.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Change:
    """What became of one module: `name` is its path in the model, `what` tells it or the reason."""

    name: str
    fused: bool
    what: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `revert` did, module by module; ``print(report)`` is readable."""

    title: str
    changes: tuple[Change, ...]
    adds: tuple[Add, ...] = ()

    @property
    def residual_adds(self) -> Report:
        """What became of the residual adds that example inputs showed."""
        return Report(self.title, self.adds)

    @property
    def fused(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.fused)

    @property
    def left(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if not change.fused)

    def __str__(self) -> str:
        width = max((len(change.name) for change in self.changes), default=0)
        lines = [f"{self.title}: {len(self.fused)} changed, {len(self.left)} left alone"]
        for change in self.changes:
            verb = "changed" if change.fused else "left"
            lines.append(f"  {verb:7}  {change.name:{width}}  {change.what}")
        if self.adds:
            lines = [str(self.residual_adds), *(lines if self.changes else [])]
        return "\n".join(lines)
