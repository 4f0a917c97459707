"""python -m fusedres: what it prints, its exit codes, and that nothing makes `info` raise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import cli, ops, selftest, system

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and torch.__version__ in out and fusedres.__version__ in out
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__
    assert (facts["extension"] is None) == (ops.native_missing is not None)
    if facts["extension"]:
        assert facts["extension"]["simd"] and facts["backends"]["cpu"] == "runs"


def test_info_survives_a_broken_machine(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("driver on fire")

    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(ops, "native_missing", "the C++ extension is not built (no compiler)")
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(system, "_installed", lambda package: None)
    monkeypatch.setenv("FUSEDRES_BACKEND", "warp")
    code, out, _ = run(capsys, "info")
    assert code == 0
    for words in (
        "not built (no compiler)",
        "g++",
        "driver on fire",
        "Triton",
        "'warp'",
        "scikit-learn",
    ):
        assert words in out, words
    assert run(capsys, "info", "--json")[0] == 0


def test_selftest_passes(capsys):
    code, out, _ = run(capsys, "selftest")
    assert code == 0 and "all is well" in out and "WRONG" not in out
    if ops.native_missing is None:
        assert out.startswith("cpu") and "layers agree" in out


def test_selftest_finds_a_wrong_backend(capsys, monkeypatch, native):
    forward = ops.FORWARD[native]

    def wrong(*args):
        y, z, stats = forward(*args)
        return y + 1e-3, z, stats

    monkeypatch.setitem(ops.FORWARD, native, wrong)
    code, out, _ = run(capsys, "selftest")
    assert code == 1 and "WRONG" in out and "y is off by" in out


def test_selftest_counts_a_backend_that_raises(capsys, monkeypatch, native):
    def broken(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setitem(ops.FORWARD, native, broken)
    code, out, _ = run(capsys, "selftest")
    assert code == 1 and "RuntimeError: illegal instruction" in out


def test_selftest_without_any_backend(capsys, monkeypatch):
    monkeypatch.setattr(ops, "native_missing", "the C++ extension is not built")
    monkeypatch.setattr(selftest, "BACKENDS", ("auto", "reference", "cpu"))
    code, out, _ = run(capsys, "selftest")
    assert code == 0 and "not here" in out and "nothing to check" in out


def test_selftest_covers_every_order_and_norm():
    settings = list(selftest.grid())
    assert {s.get("order") for s in settings} >= {*fusedres.ORDERS}
    assert {s.get("norm") for s in settings} >= {None, *fusedres.NORMS}


def test_explain(capsys):
    size = ("--shape", "4096x1024", "--dtype", "bf16", "--device", "cpu")
    code, out, _ = run(capsys, "explain", "linear-norm-act-add", *size)
    assert code == 0 and "y = relu(layer_norm(x @ W.T + b)) + x" in out
    assert "(4096, 1024), torch.bfloat16, cpu" in out
    code, out, _ = run(capsys, "explain", "prenorm", "--mlp", "--shape", "8x16", "--device", "cpu")
    assert code == 0 and "fc1" in out and "fc2" in out
    code, out, _ = run(capsys, "explain", "note", "--shape", "8x16x4", "--device", "cpu")
    assert code == 0 and "shortcut" in out
    layer = ("--norm", "batch", "--activation", "none", "--eval")
    code, out, _ = run(capsys, "explain", "note", "--shape", "8x16", *layer)
    assert code == 0 and "linear-norm-add norm=batch\n" in out


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("explain", "foo", "--shape", "8x8"), 2, "unknown stage 'foo'"),
        (("explain", "note", "--shape", "8"), 2, "MxK"),
        (("explain", "note", "--shape", "8x-1"), 2, "MxK"),
        (("explain", "note"), 2, "--shape"),
        (("explain", "note", "--shape", "8x8", "--device", "toaster"), 2, "toaster"),
        (("explain", "note", "--shape", "8x8", "--backend", "cuda"), 1, "cannot run"),
        (("explain", "note", "--shape", "8x8", "--surprise"), 2, "--surprise"),
        (("info", "--surprise"), 2, "--surprise"),
        (("tune", "--surprise"), 2, "--surprise"),
        (("tune", "--shape", "8"), 2, "MxK"),
        (("tune", "--order", "foo"), 2, "unknown stage 'foo'"),
        ((), 2, "COMMAND"),
    ],
)
def test_exit_codes(capsys, arguments, code, words):
    came, _, err = run(capsys, *arguments)
    assert came == code and words in err


def test_help_teaches(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "examples:" in out and "exit codes" in out
    code, out, _ = run(capsys, "explain", "--help")
    assert code == 0 and "bert-output" in out and "gelu_tanh" in out
    code, out, _ = run(capsys, "tune", "--help")
    assert code == 0 and "--dry-run" in out and "default: bf16" in out


def test_scripts_of_the_repository(capsys, monkeypatch, tmp_path):
    ran = []

    def record(command, env):
        ran.append(command[1:])
        assert env["PYTHONPATH"].startswith(str(ROOT))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", record)
    assert cli.main(["demo"]) == cli.main(["bench", "--quick", "--help"]) == 3
    assert ran == [
        [str(ROOT / "examples" / "degradation.py")],
        ["-m", "bench", "--quick", "--help"],
    ]
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for command in ("demo", "bench"):
        code, _, err = run(capsys, command)
        assert code == 1 and "source repository" in err and f"make {command}" in err


def test_import_is_light_and_names_are_functions():
    check = (
        "import sys, fusedres; from fusedres.convert import ConversionReport; "
        "from fusedres.explain import Explanation; import fusedres.cli; "
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules; "
        "assert all(type(f).__name__ == 'function' for f in "
        "(fusedres.convert, fusedres.revert, fusedres.explain))"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "explain", "nope", "--shape", "8x8"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "unknown stage 'nope'" in done.stderr
