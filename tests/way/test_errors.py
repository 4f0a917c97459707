"""NUMERICS 10: every misuse is an error that says op, argument, what came, what was expected."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres import FusedResidual, Residual, fused_residual
from fusedres.backends import native as extension

OP, LAYER = "fused_residual", "FusedResidual"
x, w, b = torch.randn(4, 6), torch.randn(6, 6), torch.randn(6)
wide = torch.randn(8, 6)
ones, stats = torch.ones(6), {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}


def call(*args, **settings):
    return lambda: fused_residual(*args, **settings)


def layer(*args, **settings):
    return lambda: FusedResidual(*args, **settings)


def on(module, *inputs):
    return lambda: module(*inputs)


# what is wrong: (the call, the error, what the message says: op, argument, came, expected)
CALLS = {
    "x is a list": (call([1.0], w), TypeError, [OP, "x", "list", "torch.Tensor"]),
    "x is None": (call(None, w), TypeError, [OP, "x", "NoneType", "torch.Tensor"]),
    "x is of integers": (
        call(x.long(), w.long()),
        TypeError,
        [OP, "x", "torch.int64", "torch.float32"],
    ),
    "x is complex": (
        call(x.cfloat(), w.cfloat()),
        TypeError,
        [OP, "x", "complex64", "torch.bfloat16"],
    ),
    "x is a scalar": (call(torch.tensor(1.0), w), ValueError, [OP, "x", "()", "(N=6, K=6)"]),
    "x is sparse": (call(x.to_sparse(), w), TypeError, [OP, "x", "sparse", "torch.strided"]),
    "x has too few features": (
        call(x[:, :5], w),
        ValueError,
        [OP, "x", "5 features", "(4, 5)", "expects 6"],
    ),
    "x is elsewhere": (call(x, w.to("meta")), ValueError, [OP, "weight", "meta", "cpu", ".to("]),
    "weight is an array": (
        call(x, w.numpy()),
        TypeError,
        [OP, "weight", "ndarray", "torch.Tensor"],
    ),
    "weight is a vector": (call(x, b), ValueError, [OP, "weight", "(6,)", "(N, K)"]),
    "weight is for another width": (call(x, w[:, :3]), ValueError, [OP, "x", "6", "K=3"]),
    "weight is in half": (
        call(x, w.half()),
        TypeError,
        [OP, "weight", "torch.float16", "torch.float32", "autocast"],
    ),
    "bias is a matrix": (call(x, w, w), ValueError, [OP, "bias", "(6, 6)", "(6,)"]),
    "bias is too long": (call(x, w, torch.ones(7)), ValueError, [OP, "bias", "(7,)", "(6,)"]),
    "bias is a number": (call(x, w, 1.0), TypeError, [OP, "bias", "float", "torch.Tensor or None"]),
    "bias is double": (
        call(x, w, b.double()),
        TypeError,
        [OP, "bias", "torch.float64", "torch.float32"],
    ),
    "norm weight too short": (
        call(x, w, b, b[:5]),
        ValueError,
        [OP, "norm_weight", "(5,)", "(6,)", "linear-norm"],
    ),
    "norm weight of a prenorm": (
        call(x, wide, None, torch.ones(8), order="prenorm", residual=torch.ones(4, 8)),
        ValueError,
        [OP, "norm_weight", "(8,)", "(6,)", "norm-linear-act-add"],
    ),
    "norm bias of integers": (
        call(x, w, b, b, b.long()),
        TypeError,
        [OP, "norm_bias", "torch.int64", "floating"],
    ),
    "norm weight without norm": (
        call(x, w, b, b, norm=None),
        ValueError,
        [OP, "norm_weight", "no norm"],
    ),
    "half of the statistics": (
        call(x, w, norm="batch", running_mean=ones),
        ValueError,
        [OP, "running_mean", "running_var", "both"],
    ),
    "statistics of another width": (
        call(x, w, norm="batch", running_mean=ones, running_var=torch.ones(9)),
        ValueError,
        [OP, "running_var", "(9,)", "(6,)"],
    ),
    "batch norm of one row": (
        call(x[:1], w, norm="batch", training=True),
        ValueError,
        [OP, "batch norm", "more than 1 row", "(1, 6)", ".eval()"],
    ),
    "gate of another width": (
        call(x, w, gate=torch.ones(5)),
        ValueError,
        [OP, "gate", "(5,)", "(6,)"],
    ),
    "gate is a number": (call(x, w, gate=0.5), TypeError, [OP, "gate", "float", "torch.Tensor"]),
    "gate is a matrix": (
        call(x, w, gate=torch.ones(6, 6)),
        ValueError,
        [OP, "gate", "(6, 6)", "(6,)"],
    ),
    "residual without add": (
        call(x, w, residual=x, order="linear-act"),
        ValueError,
        [OP, "residual", "linear-act", "no 'add'"],
    ),
    "residual of other rows": (
        call(x, w, residual=x[:3]),
        ValueError,
        [OP, "residual", "(3, 6)", "(4, 6)"],
    ),
    "residual of another width": (
        call(x, w, residual=x[:, :5]),
        ValueError,
        [OP, "residual", "(4, 5)", "(4, 6)"],
    ),
    "residual would broadcast": (
        call(x, w, residual=x[:1]),
        ValueError,
        [OP, "residual", "(1, 6)", "(4, 6)"],
    ),
    "residual of integers": (
        call(x, w, residual=x.int()),
        TypeError,
        [OP, "residual", "torch.int32", "torch.float32"],
    ),
    "residual is a number": (
        call(x, w, residual=1),
        TypeError,
        [OP, "residual", "int", "torch.Tensor or None"],
    ),
    "padded residual too wide": (
        call(x, w, residual=torch.ones(4, 7), shortcut="pad"),
        ValueError,
        [OP, "residual", "(4, 7)", "(4, 6)", "pad"],
    ),
    "x cannot be the shortcut": (
        call(x, wide),
        ValueError,
        [OP, "6 features", "8", "residual", "shortcut='linear'"],
    ),
    "linear shortcut without weight": (
        call(x, w, shortcut="linear"),
        ValueError,
        [OP, "shortcut_weight", "linear"],
    ),
    "unknown shortcut": (
        call(x, w, shortcut="conv"),
        ValueError,
        ["shortcut", "'conv'", "identity", "pad", "linear"],
    ),
    "unknown order": (
        call(x, w, order="linear-relu"),
        ValueError,
        ["stage", "'relu'", "act", "resnet-v1"],
    ),
    "unknown norm": (
        call(x, w, norm="group"),
        ValueError,
        ["norm", "'group'", "layer, rms, batch"],
    ),
    "unknown activation": (
        call(x, w, activation="swish"),
        ValueError,
        ["activation", "'swish'", "silu"],
    ),
    "unknown backend": (
        call(x, w, backend="cudnn"),
        ValueError,
        ["backend", "'cudnn'", "auto", "reference"],
    ),
    "dropout above 1": (call(x, w, dropout=2), ValueError, ["dropout", "between 0 and 1", "2"]),
    "eps below 0": (call(x, w, eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
    "a backend that cannot": (
        call(x, w, backend="cuda"),
        NotImplementedError,
        [OP, "'cuda'", "backend='auto'"],
    ),
}

LAYERS = {
    "no features": (layer(0), ValueError, [LAYER, "in_features", "positive int", "0"]),
    "half a feature": (layer(2.5), ValueError, [LAYER, "in_features", "positive int", "2.5"]),
    "negative outputs": (layer(4, -1), ValueError, [LAYER, "out_features", "positive int", "-1"]),
    "True features": (layer(True), ValueError, [LAYER, "in_features", "positive int", "True"]),
    "unknown shortcut": (
        layer(4, shortcut="conv"),
        ValueError,
        ["shortcut", "'conv'", "identity, linear, pad"],
    ),
    "pad to fewer": (
        layer(6, 4, shortcut="pad"),
        ValueError,
        [LAYER, "pad", "6", "4", "shortcut='linear'"],
    ),
    "unknown gate": (layer(4, gate="vector"), ValueError, ["gate", "'vector'", "scalar, channel"]),
    "unknown backend": (layer(4, backend="gpu"), ValueError, ["backend", "'gpu'", "auto"]),
    "x of another width": (
        on(FusedResidual(6), torch.ones(4, 5)),
        ValueError,
        [OP, "x", "(4, 5)", "6"],
    ),
    "x is a list": (on(FusedResidual(6), [1.0]), TypeError, [OP, "x", "list", "torch.Tensor"]),
    "x in half": (
        on(FusedResidual(6), x.half()),
        TypeError,
        [OP, "torch.float16", "torch.float32", "autocast"],
    ),
    "no residual for an identity": (
        on(FusedResidual(6, 8, shortcut="identity"), x),
        ValueError,
        [OP, "residual", "6 features", "8"],
    ),
    "linear shortcut of another width": (
        on(FusedResidual(6, 8, shortcut="linear"), x, torch.ones(4, 8)),
        ValueError,
        [OP, "shortcut", "(4, 8)", "6"],
    ),
    "a shortcut module of another width": (
        on(FusedResidual(6, shortcut=nn.Linear(6, 5)), x),
        ValueError,
        [OP, "residual", "(4, 5)", "(4, 6)"],
    ),
    "one row for batch norm": (
        on(FusedResidual(6, norm="batch"), x[:1]),
        ValueError,
        [OP, "batch norm", "(1, 6)"],
    ),
    "from a Bilinear": (
        lambda: FusedResidual.from_layers(nn.Bilinear(2, 2, 2)),
        TypeError,
        [LAYER, "linear", "Bilinear", "nn.Linear"],
    ),
    "from a GroupNorm": (
        lambda: FusedResidual.from_layers(nn.Linear(4, 4), nn.GroupNorm(2, 4)),
        ValueError,
        ["GroupNorm", "LayerNorm", "RMSNorm", "BatchNorm1d"],
    ),
    "from a norm of another width": (
        lambda: FusedResidual.from_layers(nn.Linear(4, 4), nn.LayerNorm(5)),
        ValueError,
        [LAYER, "norm", "5", "4"],
    ),
    "from a norm of two dimensions": (
        lambda: FusedResidual.from_layers(nn.Linear(4, 4), nn.LayerNorm((2, 4))),
        ValueError,
        ["LayerNorm", "(2, 4)"],
    ),
    "from a PReLU": (
        lambda: FusedResidual.from_layers(nn.Linear(4, 4), None, nn.PReLU()),
        ValueError,
        ["PReLU", "ReLU", "GELU"],
    ),
    "from a LeakyReLU of another slope": (
        lambda: FusedResidual.from_layers(nn.Linear(4, 4), None, nn.LeakyReLU(0.2)),
        ValueError,
        ["LeakyReLU", "negative_slope", "0.01", "0.2"],
    ),
}


@pytest.mark.parametrize(
    "wrong", [f"call: {what}" for what in CALLS] + [f"layer: {what}" for what in LAYERS]
)
def test_the_message_says_what_came_and_what_was_expected(wrong):
    kind, _, what = wrong.partition(": ")
    do, error, words = (CALLS if kind == "call" else LAYERS)[what]
    with pytest.raises(error) as raised:
        do()
    assert type(raised.value) is error
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


@pytest.mark.parametrize(
    "kind", ["Residual", "FusedResidual", "FusedResidualMLP", "FusedResidualStack"]
)
def test_an_unknown_argument_is_told_by_the_layer_s_name(kind):
    told = rf"^{kind}: unknown argument 'actvation'; did you mean 'activation'\? known: .*, dtype$"
    with pytest.raises(TypeError, match=told):
        getattr(fusedres, kind)(6, 2, actvation="relu")
    with pytest.warns(UserWarning, match=f"{kind}: gate_init") as told:
        getattr(fusedres, kind)(6, 2, gate_init=0.5)
    assert told[0].filename == __file__


def test_there_are_enough_misuses():
    assert len(CALLS) + len(LAYERS) >= 25


def test_the_reference_layer_refuses_what_the_fused_one_refuses():
    for module in (Residual(6), FusedResidual(6)):
        with pytest.raises(ValueError, match=r"\(4, 5\)"):
            module(torch.ones(4, 5))
        with pytest.raises(ValueError, match=r"\(3, 6\)"):
            module(x, x[:3])


def test_an_error_leaves_the_running_statistics_as_they_were():
    module = FusedResidual(6, norm="batch")
    for bad in (x[:1], x.half(), torch.ones(4, 5)):
        with pytest.raises((ValueError, TypeError)):
            module(bad)
    assert module.norm.running_mean.eq(0).all() and module.norm.running_var.eq(1).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name, value, rows, told",
    [
        ("running_mean", torch.zeros(1), 4, ["running_mean", "(1,)", "(6,)"]),
        ("running_var", torch.ones(9), 4, ["running_var", "(9,)", "(6,)"]),
        ("running_var", torch.ones(6, dtype=torch.int64), 4, ["running_var", "int64"]),
        ("running_var", torch.ones(6, device="meta"), 4, ["running_var", "meta", "cpu"]),
        ("running_mean", None, 4, ["running_mean", "running_var", "both"]),
        ("running_mean", torch.zeros(6), 1, ["more than 1 row"]),
    ],
)
def test_a_module_s_running_statistics_must_fit(name, value, rows, told, backend):
    """What a module owns is asked about in few words, in training too; nothing is broadcast."""
    module = FusedResidual(6, norm="batch", backend=backend)
    setattr(module.norm, name, value)
    with pytest.raises((ValueError, TypeError)) as error:
        module(torch.ones(rows, 6))
    assert all(word in str(error.value) for word in told), error.value
    assert module.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("FUSEDRES_BACKEND", "fast", "triton"),
        ("FUSEDRES_DISABLE", "yes", "0, 1"),
        ("FUSEDRES_LOG", "debug", "0, 1"),
    ],
)
def test_an_unknown_environment_value_is_an_error(name, value, known, monkeypatch):
    monkeypatch.setenv(name, value)
    features = 901 + len(name)  # a width of its own: the choice of a backend is remembered for each
    with pytest.raises(ValueError) as raised:
        FusedResidual(features)(torch.ones(2, features))
    assert all(words in str(raised.value) for words in (name, repr(value), known)), str(
        raised.value
    )


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("missing", ["linear.bias", "norm.weight", "norm.bias", "gate"])
def test_a_parameter_left_on_meta_is_an_error(missing, backend):
    """As load_state_dict(assign=True, strict=False) leaves it: no fake runs for real."""
    if backend == "cpu" and extension.missing:
        pytest.skip(extension.missing)
    settings = {"gate": "channel", "backend": backend}
    state = FusedResidual(6, **settings).state_dict()
    del state[missing]
    with torch.device("meta"):
        module = FusedResidual(6, **settings)
    module.load_state_dict(state, assign=True, strict=False)
    name = missing.replace("linear.", "").replace(".", "_")
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(ValueError, match=f"{name} is on meta, x is on cpu"):
            module(x)


def test_an_activation_that_this_process_has_not_registered(monkeypatch):
    """As a layer comes unpickled: its class checks nothing."""
    fusedres.register_activation("elsewhere", torch.tanh)
    layers = [cls(6, activation="elsewhere") for cls in (Residual, FusedResidual)]
    layers.append(FusedResidual(6, activation="elsewhere", backend="reference"))
    del fusedres.spec.REGISTERED["elsewhere"]
    del fusedres.reference.ACTIVATION_FUNCTIONS["elsewhere"]
    for module in layers:
        with pytest.raises(ValueError, match=r"'elsewhere'.*call register_activation\('elsewhere'"):
            module(x)
    with pytest.raises(ValueError, match="call register_activation"):
        fusedres.spec.Spec.parse("linear-act activation=elsewhere")


def test_public_names():
    assert set(fusedres.__all__) >= {
        "FusedResidual",
        "Residual",
        "fused_residual",
        "FusedResidualFunction",
    }
    assert all(hasattr(fusedres, name) for name in fusedres.__all__)


def test_a_full_gpu_is_torchs_own_error(monkeypatch):
    """What a CUDA C++ op can say of it is a RuntimeError."""
    layer = FusedResidual(6)
    if fusedres.explain(layer, x).backend != "cpu":
        pytest.skip("needs the C++ extension")

    def full(*args):
        raise RuntimeError("fusedres: CUDA out of memory for a tensor of 36 elements")

    y = layer(x)
    monkeypatch.setitem(fusedres.ops.BACKWARD, "cpu", full)
    with pytest.raises(torch.OutOfMemoryError, match="36 elements"):
        y.sum().backward()
    monkeypatch.setitem(fusedres.ops.FORWARD, "cpu", full)
    with pytest.raises(torch.OutOfMemoryError, match="36 elements"):
        layer(x)


OUT_OF_MEMORY = """
import resource
import torch
from fusedres import FusedResidual

def told(function, megabytes):
    "The error where there are only so many megabytes more."
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), -1))
    try:
        function()
    except RuntimeError as error:
        print(str(error).replace(chr(10), " "))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

def layer(K, N, **settings):
    return FusedResidual(K, N, shortcut="pad", activation="gelu", backend="cpu", **settings)

torch.set_num_threads(1)
layer(16, 16)(torch.ones(2, 16)).backward(torch.ones(2, 16))  # what that imports needs memory too
told(lambda: torch.empty(1 << 30), 32)  # torch's own
for dtype in (torch.float32, torch.float16):
    wide, x = layer(16, 8192).to(dtype), torch.randn(2048, 16, dtype=dtype)
    y = wide(x)  # 64 or 32 MiB, as z
    dy = torch.ones_like(y)
    told(lambda: wide(x), 24)
    told(lambda: y.backward(dy, retain_graph=True), 24)  # else dz lies over z
batch, x = layer(1, 1 << 22, norm="batch"), torch.randn(2, 1)
with torch.no_grad():
    told(lambda: batch(x), 100)  # y and z, but not the sums over columns
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
def test_no_memory_on_a_cpu_is_told_in_torchs_words(native):
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == 6
    for error in told:
        assert "DefaultCPUAllocator: can't allocate memory" in error


DECIMAL_COMMA = """
import locale
import torch
from fusedres import FusedResidual, Residual
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
plain = Residual(6, eps=0.25, dropout=0.5, drop_path=0.25, residual_scale=0.5)
fused = FusedResidual(6, eps=0.25, dropout=0.5, drop_path=0.25, residual_scale=0.5, backend="cpu")
fused.load_state_dict(plain.state_dict())
x, values = torch.randn(64, 6), []
for layer in (plain, fused):
    torch.manual_seed(0)
    values.append(layer(x))
torch.testing.assert_close(*values)
"""


def test_a_decimal_comma_changes_nothing(native, tmp_path):
    """Programs with a user interface call setlocale."""
    define = shutil.which("localedef")
    if define is None:
        pytest.skip("needs localedef, to have a German locale for sure")
    made = [define, "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")]
    if subprocess.run(made, capture_output=True).returncode:
        pytest.skip("localedef has no sources of a German locale")
    environment = os.environ | {"LOCPATH": str(tmp_path)}
    command = [sys.executable, "-c", DECIMAL_COMMA]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("number", ["", "0,5", "1e", "half", "0.5x"])
def test_a_recipe_s_number_must_be_one(number, native):
    with pytest.raises(ValueError, match="is no number"):
        extension.extension.knows(f"linear-add residual_scale={number}")
