"""python -m fusedres demo: that its nets train, and what it says."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusedres.tools import cli, demo

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Whatever runs the tests may want colours."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def one_thread():
    """As the demo trains; two that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found(**changed):
    """The finding, in round numbers."""
    results = {}
    for kind in demo.NETS:
        for depth in demo.DEPTHS:
            good = kind.startswith("residual") or depth < 56
            results[kind, depth] = [(99.0, 96.0) if good else (20.0, 15.0)]
    return results | {(kind, depth): [score] for kind, depth, score in changed.values()}


@pytest.fixture
def trained(monkeypatch):
    """As if the nets had been trained, with these results."""

    def trained(results):
        monkeypatch.setattr(demo, "run_grid", lambda depths, seeds: results)
        monkeypatch.setattr(demo, "identity_padding_difference", lambda: 0.0)
        monkeypatch.setattr(demo, "step_times", lambda depth: (1.5, 6.0))

    return trained


def test_a_net_trains(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 8)
    train, test = demo.train_and_score("residual, LayerNorm", 4)
    assert train > 90 and test > 85  # guessing: 10


def test_every_net_is_trained_at_every_depth(monkeypatch, capsys):
    """In threads, as the processes of the demo would import their own `train_and_score`."""
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(demo, "train_and_score", lambda kind, depth, seed: (len(kind), seed))
    results = demo.run_grid((4, 56), 2)
    results = {key: sorted(scores) for key, scores in results.items()}
    wanted = {(kind, n): [(len(kind), 0), (len(kind), 1)] for kind in demo.NETS for n in (4, 56)}
    assert results == wanted
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 24 and "100%  24 of 24 nets" in shown[-1]


def test_seeds_start_from_other_weights(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    first, same, other = (demo.train("plain", 4, seed).layers.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_several_seeds_are_drawn_as_a_band(trained, capsys, tmp_path, monkeypatch):
    """The table has the median; one seed that fails is a failure."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    titles = []
    monkeypatch.setattr(figure, "suptitle", lambda self, text, **_: titles.append(text))
    results = {key: [*scores, (97.0, 1.0), (99.5, 97.0)] for key, scores in found().items()}
    trained(results)
    out = tmp_path / "x.png"
    assert cli.main(["demo", "--seeds", "3", "--out", str(out)]) == 1 and out.exists()
    assert titles == ["lines: median of 3 seeds; bands: worst to best"]
    told, wrong = capsys.readouterr()
    assert "train / test %, the median of 3 seeds" in told and "each from 3 seeds" in told
    assert "99 / 96" in told and "residual, LayerNorm at 200 layers should train" in wrong


@pytest.mark.parametrize("kind", demo.NETS)
def test_every_net_has_the_layers_it_says(kind):
    layers = list(demo.Net(kind, 2).layers)
    assert {layer.spec.adds for layer in layers} == {kind.startswith("residual")}
    assert (layers[0].norm is None) == (kind in ("plain", "residual, ReZero gate"))


def test_identity_layers_change_nothing(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "PADDED", 12)
    assert demo.identity_padding_difference() == 0


def test_a_step_s_times():
    fused, eager = demo.step_times(4)
    assert 0 < fused < 1e3 and 0 < eager < 1e3


def test_it_prints_and_draws(trained, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    trained(found())
    picture = tmp_path / "degradation.png"
    assert cli.main(["demo", "--quick", "--out", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert picture.read_bytes().startswith(b"\x89PNG") and f"Picture: {picture}" in out
    assert "residual, ReZero gate" in out and "99 / 96" in out and "20 / 15" in out
    assert (
        "logits differ by 0.0" in out and "1.5 ms, by torch's own modules 6 ms" in out and not err
    )


@pytest.mark.parametrize(
    "wrong, told",
    [
        (("plain, LayerNorm", 4, (50.0, 50.0)), "a plain net of 4 layers should train, got 50.0"),
        (("plain, LayerNorm", 56, (99.0, 9.0)), "of 56 layers should fail to train, got 99.0"),
        (("residual, BatchNorm", 200, (97.0, 96.0)), "residual, BatchNorm at 200 layers should"),
        (("residual, BatchNorm", 200, (99.0, 92.0)), "got 99.0 / 92.0 %"),
    ],
)
def test_another_finding_is_a_failure(trained, capsys, monkeypatch, wrong, told):
    trained(found(wrong=wrong))
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("WRONG: ") and told in err and len(err.splitlines()) == 1


def test_a_difference_is_a_failure():
    assert demo.check(found(), 0.0) == []
    assert demo.check(found(), 1e-7) == ["identity layers changed the logits by 1e-07"]


def test_without_matplotlib(trained, capsys, monkeypatch, tmp_path):
    trained(found())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--out", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "No picture" in out and "pip install matplotlib" in out
    assert not (tmp_path / "x.png").exists()


def test_without_scikit_learn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(demo, "run_grid", None)  # nothing may be trained
    assert cli.main(["demo"]) == 1
    assert "pip install scikit-learn" in capsys.readouterr().err
