"""python -m fusedres: what it prints, its exit codes, and that nothing makes `info` raise."""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import __main__, ops
from fusedres.backends import native
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import REGISTERED
from fusedres.tools import cli, commands, selftest, system

ROOT = Path(__file__).parents[2]
COMMANDS = ("info", "selftest", "explain", "bench", "demo", "tune")
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "sklearn", "matplotlib", "numpy", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from fusedres.tools.cli import main
codes = []
for command in sys.argv[1:]:
    print("@@", command, flush=True)
    codes.append(main(command.split()))
print("codes", *codes)
"""


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Whatever runs the tests may want colours."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(fusedres_command):
    return fusedres_command


def raises(error):
    def broken(*_, **__):
        raise error

    return broken


# info


def test_info(run):
    code, out, _ = run("info")
    assert code == 0 and torch.__version__ in out and fusedres.__version__ in out
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__
    assert facts["folder"] == str(ROOT / "fusedres") and facts["threads"] == torch.get_num_threads()
    packages = [d.metadata["Name"] for d in distributions()]
    assert (facts["packages"]["nvidia-cutlass"] is not None) == ("nvidia-cutlass" in packages)
    assert (facts["extension"] is None) == (native.missing is not None)
    if facts["extension"]:
        assert facts["extension"]["simd"] and facts["backends"]["cpu"] == "runs"


def test_info_survives_a_broken_machine(run, monkeypatch):
    fire = raises(RuntimeError("driver on fire"))
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "missing", "the C++ extension is not built (no compiler)")
    for module, name in (
        (torch.cuda, "device_count"),
        (torch.cuda, "is_available"),
        (torch, "get_num_threads"),
        (system.platform, "platform"),
        (system.backends, "why_not"),
        (system.shutil, "which"),
        (system, "cpu"),
        (system, "version"),
    ):
        monkeypatch.setattr(module, name, fire)
    monkeypatch.setenv("FUSEDRES_BACKEND", "warp")
    code, out, _ = run("info")
    assert code == 0 and out.count("unknown (RuntimeError: driver on fire)") >= 10
    for words in ("not built (no compiler)", "a working triton", "'warp'", "set or unset it"):
        assert words in out, words
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["GPUs"] == "unknown (RuntimeError: driver on fire)"


def test_info_says_what_is_missing_and_how_to_get_it(run, monkeypatch):
    def version(package):
        raise system.PackageNotFoundError(package)

    monkeypatch.setattr(system, "version", version)
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "missing", "the C++ extension is not built")
    monkeypatch.setattr(native, "hopper_missing", "no kernels for Hopper")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    _, out, _ = run("info", "--json")
    facts = json.loads(out)
    how = {item["what"].partition(",")[0]: item["how"] for item in facts["missing"]}
    for package in ("triton", "rich", "scikit-learn", "matplotlib", "numpy"):
        assert facts["packages"][package] is None and how[package] == f"pip install {package}"
    assert facts["packages"]["nvidia-cutlass"] is None and "nvidia-cutlass, for" not in str(how)
    build = "in the source repository: `pip install --no-build-isolation -e .`"
    assert how["the C++ extension is not built"] == f"install g++, then {build}"
    assert how["no kernels for Hopper"] == f"pip install nvidia-cutlass, then {build}"
    assert "build without CUDA" in how["a CUDA GPU (the CPU kernels need none)"]


def test_info_knows_a_package_that_is_broken(run, monkeypatch):
    monkeypatch.setattr(system, "version", lambda package: "1.2")
    monkeypatch.setattr(system.importlib, "import_module", raises(OSError("libfoo.so is gone")))
    _, out, _ = run("info", "--json")
    facts = json.loads(out)
    told = "1.2, but importing it fails (OSError: libfoo.so is gone)"
    assert facts["packages"]["rich"] == told
    assert any(told in item["what"] and "reinstall" in item["how"] for item in facts["missing"])


def test_info_names_a_gpu(run, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA Fake 1", 9, 0, 80 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    _, out, _ = run("info")
    assert "NVIDIA Fake 1 (sm_90, 80 GiB)" in out and "a CUDA GPU" not in out


# selftest


def test_selftest_passes(run):
    code, out, _ = run("selftest", "--seconds", "600")
    assert "WRONG" not in out
    if native.missing is None:
        assert code == 0 and "all is well" in out
        assert out.startswith("cpu") and "layers agree" in out


def test_selftest_json(run):
    code, out, _ = run("selftest", "--seconds", "1e-9", "--json")
    found = {each["backend"]: each for each in json.loads(out)}
    assert code == bool(native.missing and not native.skipped)
    assert list(found) == ["cpu", "triton", "cuda"]
    for each in found.values():
        assert (
            each["wrong"] == []
            and each["good"] + each["left"] + sum(each["refused"].values()) >= 62
        )
    if native.missing is None:  # one layer in any case, then the time is up
        every = 3 * len([*selftest.grid()])
        assert found["cpu"]["good"] == 1 and found["cpu"]["left"] == every - 1


def test_selftest_says_that_time_is_up(run, native):
    code, out, _ = run("selftest", "--seconds", "1e-9")
    left = 3 * len([*selftest.grid()]) - 1
    assert code == 0 and out.startswith("cpu     1 layers agree")
    assert f"no time for {left}, give more by --seconds" in out.splitlines()[0]


def test_selftest_finds_a_wrong_backend(run, monkeypatch, native):
    forward = ops.FORWARD[native]

    def wrong(*args):
        y, *saved = forward(*args)
        return [y + 1e-3, *saved]

    monkeypatch.setitem(ops.FORWARD, native, wrong)
    code, out, _ = run("selftest")
    assert code == 1 and "WRONG" in out and "y is off by" in out and "please report it" in out
    code, out, _ = run("selftest", "--json")
    assert code == 1 and "y is off by" in json.loads(out)[0]["wrong"][0]


def test_selftest_counts_a_backend_that_raises(run, monkeypatch, native):
    monkeypatch.setitem(ops.FORWARD, native, raises(RuntimeError("illegal instruction")))
    code, out, _ = run("selftest")
    assert code == 1 and "RuntimeError: illegal instruction" in out


def test_selftest_without_any_backend(run, monkeypatch):
    monkeypatch.setattr(native, "missing", "the C++ extension is not built")
    monkeypatch.setattr(selftest, "BACKENDS", ("auto", "reference", "cpu"))
    code, out, _ = run("selftest")
    assert code == 1 and "not here" in out
    assert out.endswith("the C++ extension is not built: `info` says how to get it\n")
    assert run("selftest", "--json")[0] == 1
    monkeypatch.setattr(native, "skipped", True)
    code, out, _ = run("selftest")
    assert code == 0 and "not here" in out and "nothing to check" in out


def test_selftest_covers_every_order_and_norm():
    settings = list(selftest.grid())
    assert {s.get("order") for s in settings} >= {*fusedres.ORDERS}
    assert {s.get("norm") for s in settings} >= {None, *fusedres.NORMS}


# explain


def test_explain(run):
    size = ("--shape", "4096x1024", "--dtype", "bf16", "--device", "cpu")
    code, out, _ = run("explain", "linear-norm-act-add", *size)
    assert code == 0 and "y = relu(layer_norm(x @ W.T + b)) + x" in out
    assert "(4096, 1024), torch.bfloat16, cpu" in out
    code, out, _ = run("explain", "prenorm", "--mlp", "--shape", "8x16", "--device", "cpu")
    assert code == 0 and "fc1" in out and "fc2" in out
    code, out, _ = run("explain", "note", "--shape", "8x16x4", "--device", "cpu")
    assert code == 0 and "shortcut" in out
    layer = ("--norm", "batch", "--activation", "none", "--eval")
    code, out, _ = run("explain", "note", "--shape", "8x16", *layer)
    assert code == 0 and "linear-norm-add norm=batch\n" in out


def test_explain_json(run):
    code, out, _ = run("explain", "note", "--shape", "8x16x4", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 0 and [call["name"] for call in found["calls"]] == ["shortcut", "layer"]
    assert found["backend"] == found["calls"][-1]["backend"]
    if found["backend"] == "cpu":
        saved = [sum(call["saved"].values()) for call in found["calls"]]
        assert found["saved_bytes"] == sum(saved) and saved[0] == 8 * 16 * 4  # x


# The rest


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("explain", "foo", "--shape", "8x8"), 2, "unknown stage 'foo'"),
        (("explain", "note", "--shape", "8"), 2, "MxK"),
        (("explain", "note", "--shape", "8x-1"), 2, "MxK"),
        (("explain", "note", "--shape", "8xa"), 2, "got '8xa'"),
        (("explain", "note"), 2, "--shape"),
        (("explain", "note", "--shape", "8x8", "--device", "toaster"), 2, "toaster"),
        (("explain", "note", "--shape", "8x8", "--backend", "cuda"), 1, "cannot run"),
        (("explain", "note", "--shape", "8x8", "--dropout", "2"), 2, "dropout"),
        (("explain", "note", "--shape", "8x8", "--surprise"), 2, "--surprise"),
        (("info", "--surprise"), 2, "--surprise"),
        (("selftest", "--seconds", "0"), 2, "positive float, got '0'"),
        (("selftest", "--seconds", "soon"), 2, "positive float, got 'soon'"),
        (("bench", "--order", "foo"), 2, "unknown stage 'foo'"),
        (("bench", "--shape", "8"), 2, "MxK"),
        (("bench", "--norm", "foo"), 2, "'foo'"),
        (("bench", "--activation", "foo"), 2, "'foo'"),
        (("bench", "--dtype", "fp64"), 2, "'fp64'"),
        (("bench", "--seconds", "nan"), 2, "positive float, got 'nan'"),
        (("bench", "--threads", "1.5"), 2, "positive int, got '1.5'"),
        (("bench", "--surprise"), 2, "--surprise"),
        (("demo", "--surprise"), 2, "--surprise"),
        (("demo", "--out", "no/such/folder/x.png"), 2, "no/such/folder"),
        (("tune", "--surprise"), 2, "--surprise"),
        (("tune", "--shape", "8"), 2, "MxK"),
        (("tune", "--order", "foo"), 2, "unknown stage 'foo'"),
        (("inof",), 2, "'inof'"),
        ((), 2, "COMMAND"),
    ],
)
def test_exit_codes(run, arguments, code, words):
    came, out, err = run(*arguments)
    assert came == code and words in err and not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [("bench", "--device", "cuda"), ("tune",)])
def test_what_needs_a_gpu_says_so(run, arguments):
    code, _, err = run(*arguments)
    assert code == 1 and "GPU" in err


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0 and "examples:" in out and "exit codes" in out
    for command in COMMANDS:
        assert f"\n    {command} " in out
        code, told, _ = run(command, "--help")
        assert code == 0 and "Answers: " in told and max(map(len, told.splitlines())) <= 100
        assert "exit codes: 0 " in told or command == "info"
    _, out, _ = run("explain", "--help")
    assert "bert-output  linear-dropout-add-norm" in out and "gelu_tanh" in out
    _, out, _ = run("tune", "--help")
    assert "--dry-run" in out and "default: bf16" in out and "default: 600" in out
    assert run("--version")[1] == f"fusedres {fusedres.__version__}\n"


def test_examples_in_the_help_are_valid(run):
    examples = 0
    for command in ((), *((name,) for name in COMMANDS)):
        for line in run(*command, "--help")[1].splitlines():
            if line.startswith("  python -m fusedres ") and "COMMAND" not in line:
                words = line.split("    ")[0].split(" > ")[0].split()[3:]
                assert cli.parser().parse_args(words).command == words[0]
                examples += 1
    assert examples == 15


def test_interrupted(capsys, monkeypatch):
    monkeypatch.setattr(commands, "info", raises(KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["fusedres", "info"])
    assert __main__.run() == 130 and capsys.readouterr().err == "interrupted\n"


def test_every_optional_package_may_be_missing(tmp_path):
    """Each command in a process where none can be imported."""
    every = (
        "info",
        "selftest",
        "explain note --shape 8x8",
        "explain note --shape 8x8 --device cuda",
        "bench --shape 8x8 --seconds 0.1 --threads 1",
        "demo",
        "tune --dry-run --shape 8x8",
        "tune",
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKER, *every],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.splitlines()[-1] == "codes 0 0 0 0 0 1 0 1", done.stdout + done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("@@ ")[1:])
    assert "importing it fails" in told["info"] and "Triton is not installed" in told["info"]
    assert "Of 2 rows" in told[every[4]]
    assert "pip install scikit-learn" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedres", "info"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_import_is_light_and_names_are_functions():
    check = (
        "import sys, fusedres; from fusedres.models.convert import ConversionReport; "
        "from fusedres.tools.explain import Explanation; "
        "commands = ('cli', 'commands', 'console', 'bench', 'demo', 'selftest', 'system', 'tune'); "
        "assert not {'fusedres.tools.' + name for name in commands} & sys.modules.keys(); "
        "import fusedres.tools.cli; "
        "heavy = {'triton', 'torch._dynamo', 'rich', 'sklearn', 'matplotlib'}; "
        "assert not heavy & sys.modules.keys(); "
        "assert all(type(f).__name__ == 'function' for f in "
        "(fusedres.convert, fusedres.revert, fusedres.explain))"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "explain", "nope", "--shape", "8x8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "unknown stage 'nope'" in done.stderr


def test_an_unknown_option_is_told_with_the_command_s_own_usage(capsys):
    for command in (["bench", "--nonsense"], ["info", "more"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and f"usage: python -m fusedres {command[0]}" in told
        assert f"unrecognized arguments: {command[1]}" in told


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("explain note --activation gleu", "unknown 'gleu'; did you mean 'gelu'? known: none, re"),
        ("bench --activation Swish", "unknown 'Swish'; did you mean 'silu'? known: none, relu"),
        ("tune --norm LayerNorm", "unknown 'LayerNorm'; did you mean 'layer'? known: none, layer"),
        ("explain note --dtype float32", "unknown 'float32'; did you mean 'fp32'? known: fp32"),
        ("explain note --device gpu", "unknown 'gpu'; did you mean 'cuda'? known: cpu, cuda"),
        (
            "explain prenorn --shape 8x8",
            "unknown stage 'prenorn' in order 'prenorn'; did you mean ",
        ),
        ("inof", "unknown 'inof'; did you mean 'info'? known: info, selftest"),
        ("explain note --shape 8x8 --actvation relu", "--actvation relu; did you mean --activatio"),
        ("bench --nonsense", "unrecognized arguments: --nonsense\n"),
    ],
)
def test_a_slip_is_told_what_was_meant(run, arguments, told):
    code, out, err = run(*arguments.split())
    assert code == 2 and told in err and not out


def test_an_activation_of_one_s_own(run):
    _, _, err = run("explain", "note", "--shape", "8x8", "--activation", "seen_by_cli")
    assert "one of your own: fusedres.explain, in Python" in err
    fusedres.register_activation("seen_by_cli", lambda h: h + h)
    try:
        code, out, _ = run("explain", "note", "--shape", "8x8", "--activation", "seen_by_cli")
        assert code == 0 and "activation=seen_by_cli" in out
    finally:
        del ACTIVATION_FUNCTIONS["seen_by_cli"], REGISTERED["seen_by_cli"]


def test_demo_refuses_a_folder_before_it_trains(capsys, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
