"""Instructions a call by valgrind's callgrind: on a busy machine the same as on a calm one.

One process under valgrind imports torch uninstrumented, warms every call up, then counts each
apart, by client requests through ctypes. Measured on 2 cores of an AMD EPYC with valgrind 3.19: 13
s beside one busy process, 340 s beside twelve. From run to run the extension's counts are equal;
those of fused differ by less than 0.3 % in most rows and by REPEATABILITY in the tiny ones, where
Python's share is largest.

Valgrind shows every program the same CPU, an Intel Haswell with AVX2, whatever runs it. So counts
do not depend on the machine, MKL and glibc take their AVX2 code, and what is chosen on CPUs that
are not Intel's, or have AVX-512, is not counted: the times of guard.py are there for that.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fusedres.backends import native

from .cases import INFERENCE, RECORD, STEP, TINY, Case, Job, Task
from .results_file import ROOT

REPEATABILITY = 0.012  # of fused's counts: the most that was seen from run to run
WARM_UP_CALLS, CALLS, REPEATS = 20, 10, 3
# Nothing else, so that the stack lies at the same addresses whatever the caller's environment.
ENVIRONMENT = {"PATH": os.defpath, "PYTHONHASHSEED": "0"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KEPT = ("LD_LIBRARY_PATH", "PYTHONPATH")  # where libraries are found
EXTENSION = re.compile(r"/fusedres/_C\.[^/]*$")

COMPILERS = ("cc", "gcc", "g++")
MARKS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
# The host's path where there is nothing to compute, then rows for the C++ kernels: LayerNorm, batch
# norm and its second pass, 16-bit storage, a norm before and after `linear`, a residual of its own.
LAYERS = (
    (Case("rows", 64, 64), "fp32"),
    (Case("rows", 64, 64), "bf16"),
    (Case("rows-batch", 64, 64, "prenorm", "batch", "relu"), "fp32"),
    (Case("rows-postnorm", 64, 64, "postnorm", activation="silu"), "fp32"),
    (Case("rows-bert", 64, 64, "bert-output", activation=None, residual=True), "bf16"),
)
COUNTED = [Task(TINY, "fp32", mode) for mode in (INFERENCE, RECORD, STEP)]
COUNTED += [Task(*layer, mode) for layer in LAYERS for mode in (INFERENCE, STEP)]


def missing() -> str | None:
    if native.missing is not None:
        return native.missing
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)"
    if not any(map(shutil.which, COMPILERS)):
        return f"no C compiler for the client requests ({', '.join(COMPILERS)})"
    try:
        with TemporaryDirectory() as folder:
            build_marks(Path(folder))
    except subprocess.CalledProcessError as error:
        return f"the client requests do not compile: {error.stderr.strip()}"
    return None


def key() -> dict[str, str]:
    """What a count depends on; counts of two keys are not comparable, their ratios roughly are."""
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True)
    return {
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": native.extension.build_info()["compiler"] if native.extension else "none",
        "valgrind": valgrind.stdout.strip(),
    }


def count() -> dict[str, dict[str, int]]:
    """By row, instructions a call: of eager, of fused, and of fused within the extension."""
    with TemporaryDirectory() as folder:
        marks = build_marks(Path(folder))
        dumps = run([sys.executable, "-m", "bench.measure.callgrind", str(marks)], Path(folder))
    rows: dict[str, dict[str, int]] = {}
    for label, objects in dumps.items():
        row, contender, _ = label.split("|")
        counts = {contender: objects.total()}
        if contender == "fused":
            counts["kernels"] = sum(n for name, n in objects.items() if EXTENSION.search(name))
        found = rows.setdefault(row, {})
        for name, n in counts.items():  # the least: what disturbs a call adds to it
            found[name] = min(found.get(name, sys.maxsize), round(n / CALLS))
    return rows


def build_marks(folder: Path) -> Path:
    source, library = folder / "marks.c", folder / "marks.so"
    source.write_text(MARKS)
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def run(command: list[str], folder: Path) -> dict[str, Counter[str]]:
    """Runs `command` under callgrind; the instructions of each dump, by object file."""
    valgrind = [str(shutil.which("valgrind")), "-q", "--tool=callgrind", "--instr-atstart=no"]
    command = [*valgrind, f"--callgrind-out-file={folder}/out", *command]
    env = ENVIRONMENT | {name: os.environ[name] for name in KEPT if name in os.environ}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    dumps = {}
    for path in folder.glob("out.*"):
        text = path.read_text(errors="replace")
        if label := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE):
            dumps[label.group(1)] = by_object(text)
    return dumps


def by_object(text: str) -> Counter[str]:
    """Instructions spent in each object file itself, from the text of one dump.

    Lines: `ob=(id) path` names the object of the cost lines below, `path` only the first time; a
    cost line is `position count`; the one after `calls=` is a callee's, counted there.
    """
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    place, lines = "", iter(text.splitlines())
    for line in lines:
        head, _, value = line.partition("=")
        if head in ("ob", "cob"):
            number, _, name = value.partition(" ")
            names.setdefault(number, name)
            place = names[number] if head == "ob" else place
        elif head == "calls":
            next(lines)
        elif line[:1] in tuple("0123456789+-*"):
            found[place] += int(line.split()[1])
    return found


def worker(marks: Any) -> None:
    """Under valgrind: every counted call, each dump labelled `row|contender|repeat`."""
    torch.set_num_threads(1)
    jobs = [(task, Job(task.case, task.dtype, torch.device("cpu"))) for task in COUNTED]
    gc.collect()
    gc.disable()
    marks.start()
    for (task, job), name in product(jobs, ("eager", "fused")):
        call = job.call(getattr(job, name), task.mode)
        for _ in range(WARM_UP_CALLS):
            call()
        for repeat in range(REPEATS):
            marks.zero()
            for _ in range(CALLS):
                call()
            marks.dump(f"{task}|{name}|{repeat}".encode())


if __name__ == "__main__":
    worker(ctypes.CDLL(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # taking torch down under valgrind takes seconds
