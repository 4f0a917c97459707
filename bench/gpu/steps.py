"""The steps of `python -m bench.gpu`: each is a process, or some, with a limit of time.

A step that fails, hangs or runs out of time does not stop the next. What an early step leaves over
goes to the later ones. Logs and junit XML go to a working folder, of which an archive is kept; only
the benchmark writes where the results go, row by row.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ..measure.results_file import ROOT

GPU_TESTS, OWN_TESTS = "tests/gpu/test_gpu.py", "tests/bench/test_gpu_check.py"
ALONE = "2_to_the_31"  # these tests take 20 GiB each
GROUPS = {
    "families": "small_shapes or every_family",
    "orders": "in_bf16",
    "types": "in_other_types or relu",
    "determinism": "thousand_calls or two_streams or graph",
    "compiled": "compiled",
}
GROUPS["rest"] = f"not ({' or '.join(GROUPS.values())}) and not {ALONE}"
# Processes side by side. Triton's tests compile kernels for most of their time, on one core, and
# must not keep those of CUDA C++ waiting. Hopper's kernels may hang, each kind for its own reason.
SHARDS = {
    "hopper-plain": "hopper and none",
    "hopper-before": "hopper and prenorm",
    "hopper-after": "hopper and not none and not prenorm",
    **{f"{name}-cuda": f"({which}) and cuda and not hopper" for name, which in GROUPS.items()},
    **{name: f"({which}) and not cuda and not hopper" for name, which in GROUPS.items()},
}
WORKERS, OTHER_WORKERS = 2, 4  # of a process whose tests compile or may hang
NO_TESTS = 5  # pytest's exit code
SANITIZED = "small_shapes or views"
SANITIZER_ERROR = 99
SANITIZER_TOOLS = {"memcheck": 0.55, "initcheck": 0.25, "racecheck": 0.0}  # time left to the rest
# A line of its report that is about our kernels; others are about itself, or the process it ended.
FINDING = re.compile(
    r"={9} ((?:Invalid|Uninitialized|Out-of-range|Barrier error|Malloc/Free error"
    r"|Host API memory access error|Race|Warning: Race|.*Potential \w+ hazard"
    r"|Error: (?!process|Target|Device|No )).*)"
)
GRACE = 10.0  # seconds between asking a process to end and killing it

SECONDS = {
    "build": 110,
    "gpu-tests": 200,
    "other-tests": 20,
    "sanitizer": 60,
    "stacks": 40,
    "benchmark": 90,
}
RESULTS_FILE, STACKS_FILE = "benchmark.json", "stacks.json"
VERDICTS = {True: "ok", False: "FAILED", None: "incomplete"}
ASK_BUILD = "import json; from fusedres import _C; print(json.dumps(_C.build_info()))"

Found = list[dict[str, Any]]
After = Callable[[Found], object]
Runs = dict[str, list[str]]  # pytest's arguments by name


class Outcome(NamedTuple):
    code: int | None  # None: it ran out of time
    seconds: float
    log: str


def execute(command: list[str], log: Path, limit: float, **environment: str) -> Outcome:
    """Runs a process and all that it starts; past `limit` seconds they are ended."""
    began = perf_counter()
    if limit < 2 * GRACE:
        log.write_text("no time was left for this\n")
        return Outcome(None, 0.0, log.read_text())
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n\n")
        file.flush()
        environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
        where: Any = {"cwd": ROOT, "env": environment, "start_new_session": True}
        where |= {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # under nohup, too
        process = subprocess.Popen(command, preexec_fn=heeds, **where)
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit - GRACE)
        for ending in (signal.SIGINT, signal.SIGKILL):  # at the first one pytest writes its report
            if code is None and process.poll() is None:
                os.killpg(process.pid, ending)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE / 2)
    return Outcome(code, perf_counter() - began, log.read_text(errors="replace"))


def ended(outcome: Outcome) -> str:
    return "out of time" if outcome.code is None else f"exit code {outcome.code}"


class Check:
    """One run of the command: its steps, and what they found; `after` hears of it each time."""

    def __init__(self, out: Path, work: Path, steps: list[str], total: float, after: After) -> None:
        self.results, self.work, self.after = out / RESULTS_FILE, work, after
        began, ends = perf_counter(), list(accumulate(SECONDS[step] for step in steps))
        times = [began + end * total / ends[-1] for end in ends]
        self.ends = dict(zip(steps, times, strict=True))
        self.found: Found = []

    def left(self, step: str) -> float:
        """Step i ends by the sum of the first i shares of `total`, however long each took."""
        return self.ends[step] - perf_counter()

    def run(self) -> Found:
        for step in self.ends:
            print(f"gpu-check: {step}, {self.left(step):.0f} s", flush=True)
            try:
                getattr(self, step.replace("-", "_"))()
            except Exception as error:  # the others go on
                self.note(step, False, f"{type(error).__name__}: {error}".splitlines()[0], 0.0)
        return self.found

    def note(self, step: str, ok: bool | None, told: str, seconds: float, **more: Any) -> None:
        """ok: None where nothing could be said and nothing is wrong."""
        step_found = {"step": step, "ok": ok, "told": told, "seconds": round(seconds, 1)}
        self.found.append(step_found | more)
        print(f"  {VERDICTS[ok]}: {told}", flush=True)
        try:
            self.after(self.found)
        except Exception as error:  # the next report may be better
            print(f"  no report: {type(error).__name__}: {error}", flush=True)

    def build(self) -> None:
        """The extension for this GPU alone: all architectures would take three times as long."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        log, gpu = self.work / "build.log", {"TORCH_CUDA_ARCH_LIST": architecture()}
        outcome = execute(command, log, self.left("build"), FORCE_CUDA="1", **gpu)
        told = [ended(outcome), f"setuptools {version('setuptools')}"]
        ok, found = self.what_was_built() if outcome.code == 0 else (False, "")
        self.note("build", ok, ", ".join(filter(None, [*told, found])), outcome.seconds)

    def what_was_built(self) -> tuple[bool | None, str]:
        """Incomplete: kernels that are for this GPU alone were left out."""
        asked = execute([sys.executable, "-c", ASK_BUILD], self.work / "built.log", 60.0)
        last = asked.log.strip().splitlines()[-1]
        if asked.code != 0:
            return False, f"but it does not load: {last}"
        info = json.loads(last)
        told = f"CUDA {info['cuda']}, Hopper's kernels {info['hopper']}"
        if architecture() == "9.0a" and info["hopper"] != "built":
            return None, f"{told}: no CUTLASS headers, see build.log"
        return True, told

    def pytest(self, step: str, runs: Runs, limit: float, owed: bool = True) -> None:
        """Side by side. `owed`: being out of time, which may be a hang, or having no test fails."""
        options = ["-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]

        def run(name: str) -> Outcome:
            command = [sys.executable, *options, f"--junitxml={self.work / name}.xml", *runs[name]]
            # Each process would start as many to compile in as there are cores.
            log, alone = self.work / f"{name}.log", {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            return execute(command, log, limit, **alone)

        with ThreadPoolExecutor(len(runs)) as pool:
            for name, outcome in zip(runs, pool.map(run, runs), strict=True):
                counts, failed, running = outcomes(outcome.log)
                found = ", ".join(f"{n} {word.lower()}" for word, n in sorted(counts.items()))
                told = [found or "no test"]
                if outcome.code != 0:
                    told.append(ended(outcome))
                    told += [f"still running: {', '.join(running)}"] if running else []
                excused = not (owed or failed) and outcome.code in (None, NO_TESTS)
                skipped = outcome.code == 0 and not counts["PASSED"]
                ok = None if excused or skipped else outcome.code == 0
                more = {"counts": dict(counts), "failed": failed}
                self.note(f"{step}: {name}", ok, ", ".join(told), outcome.seconds, **more)

    def gpu_tests(self) -> None:
        shards = {
            name: [GPU_TESTS, "-k", which, *([] if name.endswith("-cuda") else workers(WORKERS))]
            for name, which in SHARDS.items()
        }
        self.pytest("gpu-tests", shards, self.left("gpu-tests") - 40)
        alone = {"many-elements": [GPU_TESTS, "-k", ALONE]}
        self.pytest("gpu-tests", alone, self.left("gpu-tests"), owed=False)

    def other_tests(self) -> None:
        more = ["-m", "gpu", *workers(OTHER_WORKERS)]
        files = {file.stem: [str(file), *more] for file in files_with_gpu_tests()}
        self.pytest("other-tests", files, self.left("other-tests"), owed=False)

    def sanitizer(self) -> None:
        program = find_sanitizer()
        if program is None:
            where = "compute-sanitizer is neither on PATH nor under CUDA_HOME: not run"
            return self.note("sanitizer", None, where, 0.0)
        known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20)
        whole = self.left("sanitizer")
        for tool, share_after in SANITIZER_TOOLS.items():
            limit = self.left("sanitizer") - share_after * whole
            command = [program, *sanitizer_options(tool, known.stdout), sys.executable, "-m"]
            command += ["pytest", GPU_TESTS, "-k", SANITIZED, "-v", "-p", "no:cacheprovider"]
            extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FUSEDRES_SANITIZER": "1"}
            outcome = execute(command, self.work / f"{tool}.log", limit, **extra)
            self.note(f"sanitizer: {tool}", *sanitizer_verdict(outcome), outcome.seconds)

    def stacks(self) -> None:
        """Whole networks, and their goals; a goal that is missed is no failure."""
        path, left = self.results.with_name(STACKS_FILE), self.left("stacks")
        command = [sys.executable, "-m", "bench", "stacks", "--device=cuda", "--quick"]
        command.append(f"--output={path}")
        outcome = execute(command, self.work / "stacks.log", left)
        goals = json.loads(path.read_text())["goals"] if path.exists() else []
        found = [f"{g['goal']}: {g['value']:.3g} ({g['bound']})" for g in goals if g["value"]]
        told = ", ".join([*(found or ["no row"]), *([ended(outcome)] if outcome.code != 0 else [])])
        self.note("stacks", outcome.code == 0, told, outcome.seconds)

    def benchmark(self) -> None:
        path, left = self.results, self.left("benchmark")
        command = [sys.executable, "-m", "bench", "--device=cuda", "--threads=1"]
        command += [f"--limit={left - 2 * GRACE:.0f}", f"--output={path}"]
        outcome = execute(command, self.work / "benchmark.log", left)
        results = json.loads(path.read_text()) if path.exists() else {}
        rows, left_out = (len(results.get(key, ())) for key in ("rows", "not_measured"))
        told = f"{rows} rows, {left_out} not measured"
        told += f", {ended(outcome)}" * (outcome.code != 0)
        self.note("benchmark", outcome.code == 0 and rows > 0, told, outcome.seconds)


def architecture() -> str:
    """As in TORCH_CUDA_ARCH_LIST; Hopper's own instructions need the a."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + "a" * (major == 9)


def workers(count: int) -> list[str]:
    """pytest's arguments for so many, if it can; the others take the tests of one that hangs."""
    return ["-n", str(count), "--dist", "worksteal"] if find_spec("xdist") else []


def files_with_gpu_tests() -> list[Path]:
    """But GPU_TESTS. MARKS: triton_run.py's."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    mark = re.compile(r"\bmark\.gpu\b|^pytestmark = .*\bMARKS\b", re.M)
    marked = [file for file in files if mark.search(file.read_text())]
    return [file for file in marked if file not in (ROOT / GPU_TESTS, ROOT / OWN_TESTS)]


def outcomes(log: str) -> tuple[Counter[str], list[str], list[str]]:
    """Counts by outcome, failed tests, and those that began but did not end, from pytest -v."""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    results = re.findall(rf"^(\S+::.*?) ({words})\b", log, re.M)
    by_workers = re.findall(rf"^\[gw\d+\] (?:\[ *\d+%\] )?({words}) (\S+::.*?) *$", log, re.M)
    results += [(name, word) for word, name in by_workers]
    failed = [name for name, word in results if word in ("FAILED", "ERROR")]
    failed += re.findall(r"^ERROR (\S+\.py)\b(?!::)", log, re.M)  # of collection
    began = re.findall(rf"^(\S+\.py::.*?) *(?: (?:{words})\b.*)?$", log, re.M)
    running = dict.fromkeys(began).keys() - {name for name, _ in results}
    counts = Counter(word for _, word in results)
    return counts, list(dict.fromkeys(failed)), [name for name in began if name in running]


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))


def sanitizer_options(tool: str, known: str) -> list[str]:
    """`known`: what --help says, as the filter was renamed. initcheck must see all writes."""
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    # Without API errors: torch asks for functions that some drivers do not have.
    for option in ("--target-processes=application-only", "--report-api-errors=no"):
        options += option.split("=") if option.split("=")[0] in known else []
    names = [name for name in ("--kernel-name", "--kernel-regex") if name in known]
    if names and tool != "initcheck":
        options += [names[0], "kns=residual_"]
    return options


def sanitizer_verdict(outcome: Outcome) -> tuple[bool | None, str]:
    """What was found counts, also where time ran out after it."""
    summaries = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.*)", outcome.log)
    found = [line for line in summaries if not line.startswith("0 ")]
    found += FINDING.findall(outcome.log)
    told = (found or summaries)[:1]
    if outcome.code not in (0, SANITIZER_ERROR) or not told:
        told.append(ended(outcome))
    ok = None if outcome.code is None else outcome.code == 0
    return (False if found else ok), ", ".join(told)
