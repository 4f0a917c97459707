"""`python -m fusedres`."""

import os
import signal
import sys

from .tools import interrupted

OK = 0


def run() -> int:
    try:
        from .tools.cli import main  # takes its time, too

        interrupted.from_now_on()
        return main()
    except KeyboardInterrupt:
        return interrupted.said()
    except BrokenPipeError:  # what reads us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


if __name__ == "__main__":
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    sys.exit(code)
