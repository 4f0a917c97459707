"""How a chain's links hang together, as text: one line a link, which csrc/chain/wiring.h reads too.

A line: which of `KINDS` the link has, as a number of bits; "^" and how many values before the
latest one its input is, if it is not that; "<" and how many before it what its `add` takes is, if
that is not its input; a space, the recipe. Value 0 is x, value l + 1 what link l gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .spec import Spec

KINDS = ("bias", "norm_weight", "norm_bias", "gate", "running_mean", "running_var")


def line_of(there: int, back: int, recipe: str, input_back: int = 0) -> str:
    """A link's line."""
    reads = f"^{input_back}" if input_back else ""
    adds = f"<{back}" if back != input_back else ""
    return f"{there}{reads}{adds} {recipe}"


class Line(NamedTuple):
    """What a line says."""

    there: tuple[bool, ...]  # of KINDS
    input_back: int
    back: int
    recipe: str


@lru_cache(maxsize=4096)
def read(links: str) -> tuple[Line, ...]:
    """All lines of a text."""
    return tuple(map(_read, links.split("\n")))


def _read(line: str) -> Line:
    head, recipe = line.split(" ", 1)
    head, _, back = head.partition("<")
    bits, _, input_back = head.partition("^")
    there = tuple(bool(int(bits) >> i & 1) for i in range(len(KINDS)))
    return Line(there, int(input_back or 0), int(back or input_back or 0), recipe)


def split(
    links: str, depth: int, operands: Sequence[Any]
) -> Iterator[tuple[Spec, int, int, list[Any]]]:
    """For each link its recipe, how many values back its input and what it adds lie, and of the
    operands its own: weight and as many as `KINDS` says, None where absent.

    `depth` not 0: operands are stacked, (depth, ...) each but the gate, which has an entry for each
    block of as many links as there are lines; they are those of the last line. An operand that is
    None is so in all links.
    """
    lines, rest = read(links), iter(operands)
    block, all_there = len(lines), (True, *lines[-1].there)
    stacks: list[Any] = []
    if depth:
        given = [next(rest) if has else None for has in all_there]
        stacks = [None if t is None else t.unbind() for t in given]
    for link in range(depth or block):
        line = lines[link % block]
        own: list[Any] = []
        for i, has in enumerate((True, *line.there)):
            if not depth:
                own.append(next(rest) if has else None)
            elif not has or stacks[i] is None:
                own.append(None)
            else:
                own.append(stacks[i][link // block if KINDS[i - 1] == "gate" and i else link])
        yield Spec.parse(line.recipe), line.input_back, line.back, own
