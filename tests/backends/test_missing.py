"""Nobody gets an unfused package without knowing, and nobody who asked for one is told."""

import importlib
import runpy
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from fusedres import FusedResidual, fused_residual, register_activation
from fusedres.backends import choose, cuda, native, plan
from fusedres.reference import ACTIVATION_FUNCTIONS
from fusedres.spec import REGISTERED


@pytest.fixture(autouse=True, scope="module")
def _own_activation():
    register_activation("twice_missed", lambda h: h + h)
    yield
    del ACTIVATION_FUNCTIONS["twice_missed"], REGISTERED["twice_missed"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process without the extension."""
    monkeypatch.setattr(native, "missing", "the C++ extension is not built (stub)")
    monkeypatch.setattr(native, "skipped", False)
    for name in ("FUSEDRES_BACKEND", "FUSEDRES_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    choose.cache_clear()
    native.warn.cache_clear()
    yield
    choose.cache_clear()
    native.warn.cache_clear()


def calls(**settings):
    for features in (3, 4, 4):
        FusedResidual(features, **settings)(torch.ones(2, features, device=settings.get("device")))


def test_the_first_call_warns_and_no_other():
    with pytest.warns(RuntimeWarning) as told:
        calls()
    (message,) = (str(one.message) for one in told)
    assert message.startswith(
        "fusedres: the C++ extension is not built (stub), and this call would"
    )
    assert "`python -m fusedres info`" in message


def test_a_compiled_call_warns(recwarn):
    torch.compile(FusedResidual(5), backend="eager")(torch.ones(2, 5))
    assert len([w for w in recwarn if "C++ extension" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "variables, settings",
    [
        ({"FUSEDRES_DISABLE": "1"}, {}),
        ({"FUSEDRES_BACKEND": "reference"}, {}),
        ({}, {"backend": "reference"}),
        ({}, {"activation": "twice_missed"}),  # not for the C++ kernels
        ({}, {"device": "meta"}),
    ],
)
def test_who_does_not_want_it_is_not_told(monkeypatch, variables, settings):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(**settings)


def test_who_skipped_it_is_not_told(monkeypatch):
    monkeypatch.setattr(native, "skipped", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls()


def test_a_named_backend_raises_instead():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotImplementedError, match=r"extension is not built \(stub\)"):
            fused_residual(torch.ones(2, 3), torch.ones(3, 3), backend="cpu")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(extension, note): native.py run anew; the extension is a module or the error of it."""

    def run(extension, note=None):
        folder = tmp_path / "fusedres" / "backends"
        folder.mkdir(parents=True, exist_ok=True)
        if note:
            (folder.parent / "without_extension.txt").write_text(note)

        def import_module(name):
            assert name == "fusedres._C"
            if isinstance(extension, Exception):
                raise extension
            return extension

        path = shutil.copy(native.__file__, folder)
        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", import_module)
            return SimpleNamespace(**runpy.run_path(path))

    return run


def test_why_there_is_no_extension(load):
    absent, broken = ModuleNotFoundError("No module named 'fusedres._C'"), ImportError("bad symbol")
    told = load(absent)
    assert told.missing == f"the C++ extension is not built ({absent})" and not told.skipped
    told = load(absent, "torch was not importable in the build")
    assert "not built (torch was not importable in the build)" in told.missing and not told.skipped
    told = load(absent, "FUSEDRES_SKIP_EXT=1 was set")
    assert "not built (FUSEDRES_SKIP_EXT=1 was set)" in told.missing and told.skipped
    told = load(broken)  # the note of an earlier build is no excuse
    assert told.missing == "the C++ extension does not load (bad symbol)" and not told.skipped


def test_a_checkout_that_hides_the_installed_package(load, tmp_path, monkeypatch):
    """Python takes what lies in the folder where it was started."""
    absent, site = ModuleNotFoundError("No module named 'fusedres._C'"), tmp_path / "site"
    metadata = site / "fusedres-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Name: fusedres\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(site)
    assert str(absent) in load(absent).missing, "an editable one hides nothing"
    (site / "fusedres").mkdir()
    (site / "fusedres/__init__.py").touch()
    told = load(absent).missing
    assert f"({tmp_path / 'fusedres'} hides the installed {site / 'fusedres'})" in told


@pytest.mark.parametrize(
    "cuda, hopper, missing",
    [
        ("13.0, for 8.0 8.0+PTX 9.0a", "left out", True),
        ("13.0, for 8.0 8.0+PTX 9.0a", "built", False),
        ("13.0, for 8.0 8.0+PTX 10.0", "left out", False),  # not asked for
        ("none", "left out", False),
    ],
)
def test_hopper_kernels_left_out(load, cuda, hopper, missing):
    found = load(SimpleNamespace(build_info=lambda: {"cuda": cuda, "hopper": hopper}))
    assert found.missing is None and found.has_cuda == (cuda != "none")
    assert (found.hopper_missing is not None) == missing


def test_a_call_on_hopper_without_its_kernels_warns(monkeypatch, recwarn):
    monkeypatch.setattr(native, "hopper_missing", "no kernels for Hopper")
    monkeypatch.setattr(cuda, "_refusal", lambda *_: None)
    for architecture, warned in (("sm_80", 0), ("sm_90", 1), ("sm_90", 1)):
        device = plan.UNKNOWN._replace(architecture=architecture)
        monkeypatch.setattr(plan, "device_of", lambda _, device=device: device)
        assert cuda.name(None, torch.bfloat16, torch.device("cuda"), 64, 64) == "cuda"
        assert len(recwarn) == warned
    assert "no kernels for Hopper, and this call" in str(recwarn[0].message)
