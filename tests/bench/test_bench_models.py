"""`python -m bench models`: it measures both ways, tells what is missing, and the page shows it."""

import pytest
import torch
from torch import nn

from bench import models
from bench.measure import results_file


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


def absent():
    raise ModuleNotFoundError("No module named 'nobody'", name="nobody")


def test_a_model_is_measured_and_an_absent_one_told(monkeypatch, native, capsys):
    made = {"tiny": lambda: (Tiny(), torch.randn(4, 8)), "not here": absent}
    monkeypatch.setattr(models, "MODELS", made)
    assert models.main(["--quick", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| tiny") == 2 and "not here: nobody is not installed." in out
    (row, _, told) = models.measure(["tiny", "not here"], 0.01)
    assert told == {"model": "not here", "why": "nobody is not installed"}
    assert {way: each["adds"] for way, each in row["ways"].items() if "always" in way} == {
        "convert, always": "1 of 1",
        "compile, always": "1 of 1",
    }
    with pytest.raises(SystemExit):
        models.main(["--only", "nothing"])


def test_a_wrong_model_is_not_timed():
    model, x = Tiny(), torch.randn(4, 8)
    wrong = Tiny()
    with pytest.raises(ArithmeticError, match="convert differs from eager"):
        models._check({"eager": model, "convert": wrong}, x)


def test_the_page_shows_the_newest_results_of_each_machine():
    text = models.PAGE.read_text()
    assert models.page() == text, "run `make tables`"
    assert text.count("**Public models") == len(
        {results_file.machine_of(results_file.load(p)) for p in models.RESULTS.glob("*.json")}
    )
