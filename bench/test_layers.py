"""A row of the results for each layer, dtype and mode: `pytest bench/test_layers.py`, with the
options of pytest-benchmark; `python -m bench` runs it.

Contenders take turns within a round, which pytest-benchmark cannot do. So measure/row.py times
them, and pytest-benchmark gets fused's rounds through a clock that replays them, and in
`extra_info` the whole row.
"""

from __future__ import annotations

from typing import Any

import pytest

from .measure.cases import Task
from .measure.run import Run

now = [0.0]  # of a clock that stands still but for the seconds it is given


@pytest.mark.benchmark(timer=lambda: now[0])
def test_layer(task: Task, layers: Run, request: pytest.FixtureRequest) -> None:
    if why := layers.why_not(task):
        layers.leave_out(task, why)
        pytest.skip(why)
    try:
        row, rounds = layers.measure(task)
    except Exception as error:
        layers.leave_out(task, f"{type(error).__name__}: {error}")
        raise
    request.node.row = row
    seconds = iter([each["fused"] for each in rounds])

    def advance() -> None:
        now[0] += next(seconds)

    if not request.config.pluginmanager.hasplugin("pytest-benchmark"):
        return  # a machine for gpu-check may lack it; our own file has all that is measured
    benchmark: Any = request.getfixturevalue("benchmark")
    benchmark.group, benchmark.extra_info = str(task), row
    benchmark.pedantic(advance, rounds=len(rounds), iterations=1)
