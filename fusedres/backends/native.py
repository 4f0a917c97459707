"""The C++ extension, `fusedres._C`: loading it registers its ops for CPU and CUDA tensors."""

from __future__ import annotations

import importlib
from typing import Any

try:
    extension: Any = importlib.import_module("fusedres._C")
    missing: str | None = None
except ImportError as error:  # `python -m fusedres info` says so, "auto" falls back
    extension, missing = None, f"the C++ extension is not built ({error})"
has_cuda = extension is not None and extension.build_info()["cuda"] != "none"
