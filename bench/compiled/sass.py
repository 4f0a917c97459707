"""What a compiled kernel does, from its SASS: instructions of loops and others, copies ahead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .aot import properties, tool

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_x_\w+):", re.M)


@dataclass(frozen=True)
class Loop:
    """One turn of an innermost loop: instructions of a warp, bytes that its threads copy ahead."""

    instructions: int
    copied: int
    multiplies: bool
    stores: bool


def look(binary: Any) -> dict[str, Any]:
    """`properties` and, in "straight", the instructions of a warp outside innermost "loops"."""
    found = properties(binary)
    code = tool("nvdisasm", binary.asm["cubin"], "-c")
    loops, outside = loops_of(code)
    return {**found, "loops": loops, "straight": outside}


def loops_of(code: str) -> tuple[list[Loop], int]:
    """From nvdisasm's listing. A loop goes from a label to a branch back to it."""
    labels, lines = {}, []
    for text in code.splitlines():
        if label := LABEL.match(text):
            labels[label[1]] = len(lines)
        elif line := LINE.search(text):
            lines.append((line[2], line[3]))
    ranges = []
    for end, (name, rest) in enumerate(lines):
        target = re.search(r"`\((\.L_x_\w+)\)", rest)
        if name == "BRA" and target and labels.get(target[1], end + 1) < end:
            ranges.append((labels[target[1]], end + 1))
    long = [(a, b) for a, b in ranges if b - a > 8]  # the others wait for a counter
    inner = [r for r in long if not any(r[0] <= a and b <= r[1] and (a, b) != r for a, b in long)]
    within = {i for a, b in inner for i in range(a, b)}
    return [_loop(lines[a:b]) for a, b in inner], len(lines) - len(within)


def _loop(lines: list[tuple[str, str]]) -> Loop:
    copied = sum(
        32 * int(bits[1]) // 8 if (bits := re.search(r"\.(64|128)$", rest.split()[0])) else 128
        for name, rest in lines
        if name == "LDGSTS"
    )
    names = {name for name, _ in lines}
    multiplies = bool(names & {"HGMMA", "HMMA", "IMMA"}) or sum(n == "FFMA" for n, _ in lines) > 512
    return Loop(len(lines), copied, multiplies, "STG" in names)
