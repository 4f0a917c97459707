"""The steps of gpu_check.py: each is a process, or some, with a limit of time.

A step that fails, hangs or runs out of time does not stop the next. What an early step leaves over
goes to the later ones.
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
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .results_file import ROOT

GPU_TESTS, OWN_TESTS = "tests/test_gpu.py", "test_gpu_check.py"
ALONE = "2_to_the_31"  # these tests take 20 GiB each
# Processes side by side: most of a test's time is compiling its kernels, on one core.
SHARDS = {
    "families": "small_shapes or every_family",
    "orders": "in_bf16",
    "types": "in_other_types or relu",
    "determinism": "thousand_calls or two_streams or graph",
}
SHARDS["rest"] = f"not ({' or '.join(SHARDS.values())}) and not {ALONE}"
SANITIZED = "test_small_shapes"
SANITIZER_ERROR = 99
SANITIZER_TOOLS = {"memcheck": 0.55, "initcheck": 0.25, "racecheck": 0.0}  # time left to the rest
GRACE = 10.0  # seconds between asking a process to end and killing it

SECONDS = {"build": 110, "gpu-tests": 200, "other-tests": 20, "sanitizer": 60, "benchmark": 130}
RESULTS_FILE = "benchmark.json"
VERDICTS = {True: "ok", False: "FAILED", None: "incomplete"}


class Outcome(NamedTuple):
    """What became of one process."""

    code: int | None  # None: it ran out of time
    seconds: float
    log: str


class Budget:
    """Step i ends by the sum of the first i shares of `total` seconds, however long each took."""

    def __init__(
        self, steps: list[str], total: float, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.clock, self.began = clock, clock()
        scale, self.ends, end = total / sum(SECONDS[step] for step in steps), {}, 0.0
        for step in steps:
            end += SECONDS[step] * scale
            self.ends[step] = end

    def left(self, step: str) -> float:
        return self.ends[step] - (self.clock() - self.began)


def execute(
    command: list[str], log: Path, limit: float, extra: dict[str, str] | None = None
) -> Outcome:
    """Runs a process and all that it starts; past `limit` seconds they are ended."""
    began = perf_counter()
    if limit < 2 * GRACE:
        log.write_text("no time was left for this\n")
        return Outcome(None, 0.0, log.read_text())
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, "TRITON_INTERPRET": "0", **(extra or {})}, start_new_session=True,
        )  # fmt: skip
        code = _wait(process, limit - GRACE)
        for ending in (signal.SIGINT, signal.SIGKILL):  # at the first one pytest writes its report
            if code is None and process.poll() is None:
                os.killpg(process.pid, ending)
                _wait(process, GRACE / 2)
    return Outcome(code, perf_counter() - began, log.read_text(errors="replace"))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def ended(outcome: Outcome) -> str:
    return "out of time" if outcome.code is None else f"exit code {outcome.code}"


class Check:
    """One run of the command: its steps, and what they found."""

    def __init__(self, out: Path, steps: list[str], total: float) -> None:
        self.out, self.steps = out, steps
        self.budget = Budget(steps, total)
        self.found: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        actions = {
            "build": self.build, "gpu-tests": self.gpu_tests, "other-tests": self.other_tests,
            "sanitizer": self.sanitizer, "benchmark": self.benchmark,
        }  # fmt: skip
        for step in self.steps:
            print(f"gpu-check: {step}, {self.budget.left(step):.0f} s", flush=True)
            try:
                actions[step]()
            except Exception as error:  # the others go on
                self.note(step, False, f"{type(error).__name__}: {error}", 0.0)
        return self.found

    def note(self, step: str, ok: bool | None, told: str, seconds: float, **more: Any) -> None:
        """ok: None where nothing could be said and nothing is wrong."""
        self.found.append({"step": step, "ok": ok, "told": told, "seconds": round(seconds, 1)})
        self.found[-1].update(more)
        print(f"  {VERDICTS[ok]}: {told}", flush=True)

    def build(self) -> None:
        """The extension for this GPU alone: all architectures would take three times as long."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        extra = {"TORCH_CUDA_ARCH_LIST": architecture(), "FORCE_CUDA": "1"}
        outcome = execute(command, self.out / "build.log", self.budget.left("build"), extra)
        self.note("build", outcome.code == 0, ended(outcome), outcome.seconds)

    def pytest(
        self, step: str, runs: dict[str, list[str]], limit: float, must_end: bool = True
    ) -> None:
        """Runs side by side, by name; `must_end`: being out of time is a failure, it may be a
        hang.
        """

        def run(name: str) -> Outcome:
            command = [
                sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short",
                "-p", "no:cacheprovider", f"--junitxml={self.out / name}.xml", *runs[name],
            ]  # fmt: skip
            return execute(command, self.out / f"{name}.log", limit)

        with ThreadPoolExecutor(len(runs)) as pool:
            for name, outcome in zip(runs, pool.map(run, runs), strict=True):
                counts, failed, last = outcomes(outcome.log)
                found = ", ".join(f"{n} {word.lower()}" for word, n in sorted(counts.items()))
                told = [found or "no test", *([ended(outcome)] if outcome.code else [])]
                ok: bool | None = outcome.code == 0 and counts["PASSED"] > 0
                if outcome.code is None:
                    ok = None if not (must_end or failed) else False
                    told += ["out of time", f"the last one it began: {last}"]
                more = {"counts": dict(counts), "failed": failed}
                self.note(f"{step}: {name}", ok, ", ".join(told), outcome.seconds, **more)

    def gpu_tests(self) -> None:
        shards = {name: [GPU_TESTS, "-k", which] for name, which in SHARDS.items()}
        self.pytest("gpu-tests", shards, self.budget.left("gpu-tests") - 40)
        alone = {"many-elements": [GPU_TESTS, "-k", ALONE]}
        self.pytest("gpu-tests", alone, self.budget.left("gpu-tests"))

    def other_tests(self) -> None:
        files = {file.stem: [str(file), "-m", "gpu"] for file in files_with_gpu_tests()}
        self.pytest("other-tests", files, self.budget.left("other-tests"), must_end=False)

    def sanitizer(self) -> None:
        program = find_sanitizer()
        if program is None:
            told = "compute-sanitizer is neither on PATH nor under CUDA_HOME: not run"
            self.note("sanitizer", None, told, 0.0)
            return
        known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20)
        whole = self.budget.left("sanitizer")
        for tool, share_after in SANITIZER_TOOLS.items():
            limit = self.budget.left("sanitizer") - share_after * whole
            command = [program, *sanitizer_options(tool, known.stdout), sys.executable, "-m"]
            command += ["pytest", GPU_TESTS, "-k", SANITIZED, "-q", "-p", "no:cacheprovider"]
            extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FUSEDRES_SANITIZER": "1"}
            outcome = execute(command, self.out / f"{tool}.log", limit, extra)
            errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", outcome.log)
            told = errors[-1] if errors else ended(outcome)
            ok = None if outcome.code is None else outcome.code == 0
            self.note(f"sanitizer: {tool}", ok, told, outcome.seconds)

    def benchmark(self) -> None:
        path, left = self.out / RESULTS_FILE, self.budget.left("benchmark")
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench", "--device=cuda", "--threads=1"]
        command += [f"--limit={left - 2 * GRACE:.0f}", f"--output={path}"]
        outcome = execute(command, self.out / "benchmark.log", left)
        results = json.loads(path.read_text()) if path.exists() else {"rows": []}
        rows = results["rows"]
        told = f"{len(rows)} rows, {len(results.get('not_measured', ()))} not measured"
        if outcome.code != 0:
            told += f", {ended(outcome)}"
        ok = outcome.code == 0 and len(rows) > 0
        self.note("benchmark", ok, told, outcome.seconds)


def architecture() -> str:
    """As in TORCH_CUDA_ARCH_LIST; Hopper's own instructions need the a."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + "a" * (major == 9)


def files_with_gpu_tests() -> list[Path]:
    """But GPU_TESTS."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [file for file in files if re.search(r"mark\.gpu|\bMARKS\b", file.read_text())]
    return [file for file in marked if file not in (ROOT / GPU_TESTS, ROOT / "tests" / OWN_TESTS)]


def outcomes(log: str) -> tuple[Counter[str], list[str], str]:
    """Counts by outcome, failed tests, and the last test that began, from pytest -v."""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    results = re.findall(rf"^(\S+::.*?) ({words})\b", log, re.M)
    failed = [name for name, word in results if word in ("FAILED", "ERROR")]
    failed += re.findall(r"^ERROR (\S+\.py)\b(?!::)", log, re.M)  # of collection
    began = re.findall(rf"^(\S+\.py::.*?)(?: (?:{words})\b.*)?$", log, re.M)
    return Counter(word for _, word in results), list(dict.fromkeys(failed)), (began or [""])[-1]


def find_sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [Path(home) / part for home in homes if home for part in ("bin", "compute-sanitizer")]
    for path in (os.environ.get("PATH", ""), *map(str, folders)):
        found = shutil.which("compute-sanitizer", path=path)
        if found:
            return found
    return None


def sanitizer_options(tool: str, known: str) -> list[str]:
    """`known`: what --help says, as the filter was renamed. initcheck must see all writes."""
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    if "--target-processes" in known:
        options += ["--target-processes", "application-only"]
    names = (name for name in ("--kernel-name", "--kernel-regex") if name in known)
    found = next(names, None)
    return [*options, found, "kns=residual_"] if found and tool != "initcheck" else options
