"""The C++ extension, `fusedres._C`: loading it registers its ops for CPU and CUDA tensors."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
NOTE = PACKAGE / "without_extension.txt"  # setup.py's: why it built none


def _why_not_built(error: ModuleNotFoundError) -> str:
    if NOTE.exists():
        return NOTE.read_text()
    for found in distributions(name="fusedres"):  # of a checkout that Python was started in
        installed = Path(str(found.locate_file("fusedres")))
        if (installed / "__init__.py").exists() and not installed.samefile(PACKAGE):
            return f"{PACKAGE} hides the installed {installed}"
    return str(error)


extension: Any = None
missing: str | None = None
try:
    extension = importlib.import_module("fusedres._C")
except ModuleNotFoundError as error:  # `python -m fusedres info` says so, "auto" falls back
    missing = f"the C++ extension is not built ({_why_not_built(error)})"
except ImportError as error:
    missing = f"the C++ extension does not load ({error})"
skipped = "FUSEDRES_SKIP_EXT=1" in str(missing)  # so nobody is surprised

info = extension.build_info() if extension else {"cuda": "none"}
has_cuda = info["cuda"] != "none"
hopper_missing: str | None = None
if " 9.0" in info["cuda"] and info["hopper"] == "left out":
    hopper_missing = "the C++ extension lacks Hopper's kernels (it was built without CUTLASS)"


@cache  # once a process
def warn(lack: str) -> None:
    cure = "`python -m fusedres info` says how to get it"
    told = f"fusedres: {lack}, and this call would have used it; {cure}"
    warnings.warn(told, RuntimeWarning, stacklevel=2)
