"""`python -m bench`: measures; `report`, `scaling`, `check`: what is made of the measurements."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

COMMANDS = {
    "stacks": "stacks",
    "models": "models",
    "memory": "memory",
    "report": "report.command",
    "scaling": "scaling.command",
    "check": "report.guard",
    "gpu-model": "compiled.command",
}
LAYERS = Path(__file__).with_name("test_layers.py")
QUIET = ("-q", "--no-header", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider")
DESCRIPTION = "Times fused layers against eager torch, torch.compile and the bare product."
EPILOG = """other commands: `stacks` times whole networks, `memory` counts what they hold, `models`
times public models, `report` makes tables and pictures of a results file, `scaling` predicts from
its ceilings, `check` compares ratios with bench/baseline.json, `gpu-model` predicts from compiled
kernels; each has a --help. Other options go to pytest, those of pytest-benchmark among them:
--benchmark-json FILE."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"bench.{COMMANDS[arguments[0]]}")
        return module.main(arguments[1:]) or 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler misses the GPU aloud
    import pytest

    from .measure.run import OPTIONS

    texts = {"prog": "python -m bench", "description": DESCRIPTION, "epilog": EPILOG}
    parser = argparse.ArgumentParser(allow_abbrev=False, **texts)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.parse_known_args(arguments)
    loads = find_spec("pytest_benchmark") and not os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    quiet = [*QUIET, *(["--benchmark-quiet"] if loads else [])]  # its table has a row for each row
    return int(pytest.main([str(LAYERS), *quiet, *arguments]))


if __name__ == "__main__":
    sys.exit(main())
