"""`python -m fusedres`."""

import os
import sys

from .tools.cli import main
from .tools.commands import INTERRUPTED, OK
from .tools.console import error


def run() -> int:
    try:
        return main()
    except KeyboardInterrupt:
        error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # what reads us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


if __name__ == "__main__":
    sys.exit(run())
