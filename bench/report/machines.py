"""What layers gain on one machine and on another: README's table, from the newest file of each."""

from __future__ import annotations

from collections.abc import Iterable

from ..measure.cases import INFERENCE, STEP
from ..measure.results_file import Results, machine_of
from .tables import UNMEASURED, Table, select, spread_of

DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32")}
NOTE = (
    "times faster than eager torch, median and range of undisturbed layers, a step is forward + "
    "backward; slower: by more than noise, of how many"
)


def machine_table(files: Iterable[Results]) -> Table:
    """A line a dtype."""
    body = []
    for results in files:
        found, device = results["machine"], results["device"]
        for dtype in DTYPES[device]:
            cells = []
            for mode in (INFERENCE, STEP):
                rows = select(results["rows"], group="model", dtype=dtype, mode=mode, calm=True)
                middle, ends, slower = spread_of(rows, ("eager",))
                cells += [UNMEASURED if not rows else f"{middle} ({ends})", slower]
            vectors = found.get("simd") or UNMEASURED
            body.append([machine_of(results), vectors, dtype, *cells, results["date"]])
    head = ["machine", "vectors", "dtype", "forward", "slower", "step", "slower", "measured"]
    return Table("Layers of models", head, body, 3, NOTE)
