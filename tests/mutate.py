"""`make mutate`: breaks the kernels on purpose, one bug at a time, and counts how many breaks the tests catch, without
a GPU (the goal: 90 %). A bug is caught if a test fails; a break that does not compile, crashes or hangs is an error of
this table, not a catch. The broken kernels live in temporary copies of the tree, which are compiled without SIMD clones.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench/results/mutations.json"
GOAL, LIMIT = 0.9, 300  # seconds a test run may take
FLAGS = "-O1 -g0 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# Which tests see which kind of bug: arguments of pytest.
ACCURACY, TRITON = "tests/test_accuracy.py", "tests/test_triton.py"
SUITES = {
    "step": [ACCURACY, "-k", "trains_a_step and (note or preact) and (relu or gelu or silu)"],
    "ways": [ACCURACY, "-k", "ways_to_call and (fp32 or bf16)"],
    "half": [ACCURACY, "tests/test_determinism.py", "-k", "(ways and (bf16 or fp16)) or of_nan_inf"],
    "activations": [ACCURACY, "tests/test_determinism.py", "-k", "(step and note and layer) or of_nan_inf"],
    "norms": [ACCURACY, "-k", "(test_eps or mean_1e3) and fp32"],
    "batch": [ACCURACY, "-k", "(trains_a_step and batch and gelu) or (batch_norm_in and fp32)"],
    "masks": [ACCURACY, "tests/test_reference.py", "-k", "masks or philox or drop"],
    "gate": [ACCURACY, "-k", "scalar_gate and fp32"],
    "layouts": ["tests/test_shapes.py", "-k", "leading or strided or unwritten"],
    "random": ["tests/test_properties.py"],
    "needs": ["tests/test_ops.py", "tests/test_autograd.py", "-k", "gradients_in or only_gradients or opcheck_of"],
    "train": ["tests/test_training.py", "tests/test_autograd.py", "-k", "train or double"],
    "triton": [TRITON, "-k", "accurate_as_eager or shortcuts or scales or rows_past or many_programs or shapes"],
    "triton activations": [TRITON, "-k", "activation or scales or cdf"],
    "triton layouts": [TRITON, "-k", "layouts or nothing_outside or shortcuts"],
    "triton sums": [TRITON, "-k", "rows_past or many_programs or each_gradient or same_call or nothing_outside"],
}  # fmt: skip


class Mutant(NamedTuple):
    file: str
    suite: str
    why: str
    old: str  # stands in the file exactly once
    new: str


# fmt: off
TABLE = {
    "csrc/tensors.h": [
        ("layouts", "the stride of a vector is ignored", "to_float(data[i * stride])", "to_float(data[i])"),
        ("layouts", "columns of any stride pass for adjacent", "t.stride(1) == 1 ||", "t.stride(1) >= 1 ||"),
    ],
    "csrc/cpu/storage.h": [
        ("half", "bf16 is cut off, not rounded", "(u + 0x7FFF + ((u >> 16) & 1)) >> 16", "u >> 16"),
        ("half", "fp16 has no subnormals", "m < 0x38800000u ? subnormal : normal", "normal"),
        ("half", "fp16 overflow does not become infinity", "m >= 0x477FF000u ? 0x7C00u : h", "h"),
    ],
    "csrc/cpu/stages.h": [
        ("layouts", "a row's width for its stride", "m * rows.stride", "m * rows.features"),
        ("ways", "reads a skip's features past its end",
         "features = std::min(rows.features, n)", "features = n"),
        ("norms", "rms norm without eps", "dot(t, t, n) * per_n + eps", "dot(t, t, n) * per_n"),
        ("norms", "layer norm with eps outside the root",
         "1 / std::sqrt(squares * per_n - shift * shift + eps)", "1 / (std::sqrt(squares * per_n - shift * shift) + eps)"),
        ("norms", "layer norm by the unbiased variance", "squares * per_n - shift", "squares / (n - 1) - shift"),
        ("norms", "layer norm by E[t^2] - E[t]^2", "mean = sum(t, n) * per_n;", "mean = 0;"),
        ("norms", "layer norm forgets what rounding left of the mean", "shift = rest * per_n", "shift = 0"),
        ("norms", "rms norm's rstd in bf16", "return {0, 1 / std::sqrt(dot(t, t, n) * per_n + eps)}",
         "return {0, A(to_float(to_bfloat16(float(1 / std::sqrt(dot(t, t, n) * per_n + eps)))))}"),
        ("step", "layer norm's gradient without mean(d)", "(d[i] - mean_d - c[i]", "(d[i] - c[i]"),
        ("step", "the norm's gradient with mean(d c) but not c", "- c[i] * mean_dc", "- mean_dc"),
        ("step", "no c on the tape", "if constexpr (kKeep) t[i] = c;", ""),
        ("batch", "evaluation scales before it subtracts",
         "t[i] = (t[i] - p.mean[i]) * p.rstd[i]", "t[i] = t[i] * p.rstd[i] - p.mean[i]"),
        ("ways", "one bias for all columns", "+ p.bias[i]", "+ p.bias[0]"),
        ("masks", "every row drops the same elements",
         "drop_elements(t, n, p.seed, static_cast<uint64_t>(m) * n,", "drop_elements(t, n, p.seed, 0,"),
        ("masks", "drop-path drops rows, not samples",
         "drop_sample(t, n, p.seed, m / p.sample_rows", "drop_sample(t, n, p.seed, m"),
        ("masks", "half the probability", "p * 0x1p32", "p * 0x1p31"),
        ("ways", "kept elements are not scaled up", "p < 1 ? 1 / (1 - p) : 0", "1"),
        ("ways", "no residual_scale in forward", "static_cast<A>(r.residual_scale), t, n", "A(1), t, n"),
    ],
    "csrc/cpu/forward.cpp": [
        ("batch", "squares not about the shift", "sink.squares[i] += d * d", "sink.squares[i] += d * t[i]"),
    ],
    "csrc/cpu/backward.cpp": [
        ("batch", "batch norm's gradient divides by M - 1", "static_cast<A>(p.M)", "static_cast<A>(p.M - 1)"),
        ("step", "no gamma in backward", "if (p.gamma) scale_shift<A>(d, p.gamma, nullptr, d, n);", ""),
        ("gate", "no gate in backward", "d[i] *= p.gate[0]", "d[i] *= 1"),
        ("ways", "backward drops other elements",
         "drop_elements(d, n, p.seed, static_cast<uint64_t>(m) * n", "drop_elements(d, n, p.seed, (m + 1) * n"),
        ("ways", "no residual_scale in backward", "scale = static_cast<A>(r.residual_scale)", "scale = 1"),
        ("ways", "a scaled skip of x goes back unscaled", "static_cast<A>(b.skip_scale)", "A(1)"),
        ("step", "the last block of rows is not added", "    store_row(d, b.dinput, p.dtype, m, p.width);\n  }\n  sums.flush();",
         "    store_row(d, b.dinput, p.dtype, m, p.width);\n  }"),
        ("step", "a block's sums are added twice", "std::fill(memory.begin(), memory.end(), A(0));", ""),
        ("step", "dbeta for dgamma", "b.dgamma = sums.block[0], b.dbeta = sums.block[1]",
         "b.dgamma = sums.block[1], b.dbeta = sums.block[0]"),
        ("random", "no shortcut to x before the product",
         "if (p.residual_is_input) accumulate(d, buffers.dx_add, p.width);", ""),
    ],
    "csrc/ops.cpp": [
        ("ways", "chunks end a row early", "(chunk + 1) * size)", "(chunk + 1) * size - 1)"),
        ("ways", "the second chunk's sums are lost", "chunk = 1; chunk < chunks.count", "chunk = 2; chunk < chunks.count"),
        ("ways", "saves y for z", "save && r.saves_z() ? z", "save && r.saves_z() ? y"),
        ("needs", "two bits of `needs` swapped", "kNormWeight, kNormBias, kGate,", "kNormBias, kNormWeight, kGate,"),
        ("batch", "backward gets rstd for the variance", "side.var.begin(), side.var.end()", "side.rstd.begin(), side.rstd.end()"),
        ("batch", "the mean's square is not taken off", "/ rows - d * d;", "/ rows;"),
        ("batch", "batch norm without eps", "var[n] + static_cast<A>(program.recipe->eps)", "var[n]"),
        ("ways", "a wrong stride of the skip", "skip->stride(0)", "c.K()"),
        ("random", "every sum passes for the last stage", "= adds_after && r.epilogue.back() == Stage::add;", "= adds_after;"),
        ("gate", "a scalar gate's gradient of one column", "total += next[n]", "total = next[0]"),
    ],
    "csrc/epilogue.h": [
        ("half", "max for where: relu hides NaN", "{ return h < 0 ? A(0) : h; }", "{ return h > 0 ? h : A(0); }"),
        ("activations", "exp is not clamped", "x = x < -88.0f ? -88.0f : x;", ""),
        ("activations", "one digit of the normal distribution", "3.233437176e-01f", "3.233537176e-01f"),
        ("activations", "the wrong tail of the normal distribution", "far = h < 0.0f", "far = h > 0.0f"),
        ("activations", "gelu's derivative without the density", "return n.cdf + h * n.pdf", "return n.cdf"),
        ("activations", "one coefficient of log1p", "2.0f / 7", "2.0f / 8"),
        ("activations", "tanh's polynomial too far", "a < 0.625f", "a < 1.25f"),
        ("masks", "one digit of Philox", "0x9E3779B9u", "0x9E3779B1u"),
    ],
    "fusedres/kernels/forward.py": [
        ("triton", "no mask over columns", "(column < columns)[None, :]", "(column >= 0)[None, :]"),
        ("triton layouts", "the width for the stride", "row[:, None] * stride_row", "row[:, None] * columns"),
        ("triton", "the last part of K is dropped", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)"),
        ("triton", "z is saved without bias", "tl.store(z_ptr + out, z,", "tl.store(z_ptr + out, z - load_vector(bias_ptr, n, N, 0.0),"),
        ("triton layouts", "residual read past its R columns", "m, n, M, R, stride_rm", "m, n, M, N, stride_rm"),
    ],
    "fusedres/kernels/epilogue.py": [
        ("triton", "the mean over BLOCK_N, not N", "tl.sum(tl.where(live, z, 0.0), 1) / N", "tl.sum(tl.where(live, z, 0.0), 1) / z.shape[1]"),
        ("triton", "dead columns count in the variance", "tl.where(live, z - mean[:, None], 0.0)", "z - mean[:, None]"),
        ("triton", "layer norm with eps outside the root", "tl.sqrt_rn(variance + eps)", "(tl.sqrt_rn(variance) + eps)"),
        ("triton", "rms norm's statistic in fp16", "    z = tl.where(live, z, 0.0)\n", "    z = tl.where(live, z, 0.0).to(tl.float16).to(tl.float32)\n"),
        ("triton", "layer norm's gradient without mean(g)", "(g - mean_g[:, None] - c", "(g - c"),
        ("triton activations", "max for where: relu hides NaN", "tl.where(h < 0, 0.0, h)", "tl.where(h > 0, h, 0.0)"),
        ("triton activations", "expm1's series too far", "h > -0.5", "h > -2.0"),
    ],
    "fusedres/kernels/backward.py": [
        ("triton sums", "the arrival counter is not reset", "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, count)"),
        ("triton sums", "the first to arrive adds up", "== count - 1", "== 0"),
        ("triton sums", "no mask over partial sums", "(p < count)[:, None] & ", ""),
        ("triton sums", "rows past M count in sums", "tl.where(inside, dh * c, 0.0)", "dh * c"),
        ("triton sums", "dbeta's sums for dgamma", "dnorm_weight_ptr, partial_ptr + plane", "dnorm_weight_ptr, partial_ptr + 2 * plane"),
        ("triton", "no gamma in backward", "NORM_GRAD(gamma * dh", "NORM_GRAD(dh"),
        ("triton", "the derivative without beta", "ACT_GRAD(gamma * c + beta)", "ACT_GRAD(gamma * c)"),
        ("triton layouts", "dy passes for contiguous", "M, N, stride_dym, stride_dyn)", "M, N, N, 1)"),
    ],
    "fusedres/functional.py": [
        ("train", "running variance is biased", "var * (rows / (rows - 1))", "var"),
        ("ways", "drop-path's samples are rows", "1 if flat else rows_per_sample(x)", "1"),
        ("train", "every call draws the same masks", "draw_seed(x.device) if spec.random", "torch.ones(1, dtype=torch.int64) if spec.random"),
    ],
    "fusedres/autograd.py": [
        ("needs", "needs in the reverse order", "need << i for", "need << (6 - i) for"),
        ("train", "second derivatives are cut off", "create_graph = torch.is_grad_enabled()", "create_graph = False"),
    ],
}
# fmt: on
MUTANTS = [
    Mutant(file, suite, why, old, new) for file, rows in TABLE.items() for suite, why, old, new in rows
]


class Tree:
    """A copy of the package and its tests, with an extension of its own."""

    def __init__(self, path):
        self.path, self.log = path, path / "log"
        path.mkdir()
        junk = shutil.ignore_patterns("__pycache__", "*.so")
        for name in ("csrc", "fusedres", "tests"):
            shutil.copytree(ROOT / name, path / name, ignore=junk)
        shutil.copy(ROOT / "pyproject.toml", path)
        stages = path / "csrc/cpu/stages.h"  # each row loop once, for this machine's baseline: quick to compile
        text = re.sub(r"(#define FUSEDRES_SIMD_CLONES) .*", r"\1", stages.read_text())
        stages.write_text(text)
        self.sources = sorted([*path.glob("csrc/*.cpp"), *path.glob("csrc/cpu/*.cpp")])
        includes = [*include_paths(), sysconfig.get_path("include")]
        self.compile = [*os.environ.get("CXX", "g++").split(), *FLAGS.split(), "-DTORCH_EXTENSION_NAME=_C"]
        self.compile += [f"-I{path / 'csrc'}", *(f"-isystem{i}" for i in includes)]

    def run(self, command, environment=None):
        with self.log.open("w") as log:
            try:
                return subprocess.run(
                    command, cwd=self.path, env=environment, stdout=log, stderr=log, check=False, timeout=LIMIT
                ).returncode
            except subprocess.TimeoutExpired:
                return -1

    def depends(self, source, file, seen=()):
        """Whether `source` includes `file`, directly or not."""
        if source == file:
            return True
        names = re.findall(r'#include "(.*)"', source.read_text())
        paths = [self.path / "csrc" / name for name in names]
        return any(self.depends(p, file) for p in paths)

    def build(self, changed=None, suffix=".mutant.o"):
        """Compiles what depends on `changed` (default: everything) and links. True if that worked."""
        objects = []
        for source in self.sources:
            new = changed is None or self.depends(source, changed)
            objects.append(source.with_suffix(suffix if new else ".o"))
            if new and self.run([*self.compile, "-c", str(source), "-o", str(objects[-1])]):
                return False
        libraries = [f"-L{p}" for p in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        out = self.path / "fusedres" / f"_C{SUFFIX}"
        return self.run([self.compile[0], "-shared", *map(str, objects), *libraries, "-o", str(out)]) == 0

    def test(self, suite):
        """pytest's exit code."""
        alone = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")}
        environment = {**os.environ, **alone, "PYTHONPATH": str(self.path), "CUDA_VISIBLE_DEVICES": ""}
        environment["TRITON_INTERPRET"] = str(int(suite.startswith("triton")))
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-W", "ignore::RuntimeWarning"]
        return self.run([sys.executable, "-m", "pytest", *options, *SUITES[suite]], environment)

    def verdict(self, mutant):
        """ "killed", "survived" or "invalid: why"."""
        file = self.path / mutant.file
        whole = file.read_text()
        file.write_text(whole.replace(mutant.old, mutant.new))
        native = file.suffix != ".py"
        try:
            if native and not self.build(file):
                return "invalid: does not compile"
            code = self.test(mutant.suite)
        finally:
            file.write_text(whole)
        if native:
            self.build(Path(), ".o")  # links the unbroken objects
        return {0: "survived", 1: "killed"}.get(code, f"invalid: pytest's exit code {code}")


def on_trees(trees, function, jobs):
    """function(tree, job) for every job, as many at once as there are trees; results in order."""
    free = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(job):
        tree = free.get()
        try:
            return function(tree, job)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(one, jobs))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a mutant's file or description")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default 2)")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file}: {m.why}"]
    stale = [m for m in chosen if (ROOT / m.file).read_text().count(m.old) != 1]
    for m in chosen if options.list else stale:
        print(f"{'STALE ' if m in stale else ''}{m.file}: {m.why}")
    if stale or options.list or not chosen:
        sys.exit(f"{len(stale)} of {len(chosen)} mutants are stale: their text stands not once" if stale else 0)

    start, done = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        trees = [Tree(Path(temporary) / str(i)) for i in range(options.jobs)]
        if not all(on_trees(trees, lambda tree, _: tree.build(suffix=".o"), trees)):
            sys.exit("the unbroken tree does not compile:\n" + trees[0].log.read_text()[-3000:])

        def base(tree, suite):
            code = tree.test(suite)
            print(f"unbroken, {suite}: {code}", flush=True)
            return "" if code == 0 else f"{suite}:\n{tree.log.read_text()[-1500:]}"

        broken = "".join(on_trees(trees, base, sorted({m.suite for m in chosen})))
        if broken:
            sys.exit("these tests fail on the unbroken tree: " + broken)

        def judge(tree, mutant):
            begin = time.monotonic()
            done.append(tree.verdict(mutant))
            took = f"{time.monotonic() - begin:3.0f} s"
            print(f"{len(done):3}/{len(chosen)} {took} {done[-1]:9} {mutant.file}: {mutant.why}", flush=True)
            return done[-1]

        verdicts = on_trees(trees, judge, chosen)

    left = [(m, v) for m, v in zip(chosen, verdicts, strict=True) if v != "killed"]
    survivors = [f"{m.file}: {m.why}" for m, v in left if v == "survived"]
    invalid = [f"{m.file}: {m.why} ({v})" for m, v in left if v != "survived"]
    score = verdicts.count("killed") / len(chosen)
    for line in survivors + invalid:
        print("not caught:", line)
    print(f"caught {verdicts.count('killed')} of {len(chosen)}: {score:.1%}, {time.monotonic() - start:.0f} s")
    if not options.only:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        result = {"score": round(score, 4), "mutants": len(chosen), "survivors": survivors, "invalid": invalid}
        result |= {"commit": commit, "torch": torch.__version__, "date": date.today().isoformat()}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(invalid != [] or score < GOAL)


if __name__ == "__main__":
    main()
