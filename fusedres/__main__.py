"""`python -m fusedres`."""

import os
import sys

INTERRUPTED, OK = 130, 0


def run() -> int:
    try:
        from .tools.cli import main  # takes its time, too

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # what reads us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


if __name__ == "__main__":
    sys.exit(run())
