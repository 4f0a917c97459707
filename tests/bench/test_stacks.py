"""`python -m bench stacks`: it measures, judges, and the pages show each machine's newest file."""

import pytest
import torch

from bench import stacks


def test_a_net_is_measured_and_judged(monkeypatch, native, capsys):
    tiny = stacks.Net("digits", 16, 8, 4, 2)
    monkeypatch.setattr(stacks, "NETS", (tiny,))
    assert stacks.main(["--quick", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "| digits | 16 x 8" in out and "step with Adam" in out
    assert "not measured" in out  # the other nets' goals
    with pytest.raises(SystemExit):
        stacks.main(["--only", "nothing"])


def test_a_wrong_net_is_not_timed(monkeypatch, native):
    found = stacks.contenders(stacks.Net("wrong", 8, 8, 2))
    with torch.no_grad():
        found["fused"].weight.mul_(1.1)
    with pytest.raises(ArithmeticError, match="fused differs from eager"):
        stacks._check(found, torch.randn(8, 8, requires_grad=True))


def test_in_16_bits_fused_is_held_to_what_eager_errs(native):
    net = stacks.Net("wrong", 64, 32, 6, activation="silu", dtype="bf16")
    found = stacks.contenders(net)
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    stacks._check(found, x)
    with torch.no_grad():
        found["recompute"].norm_bias.add_(0.05)
    with pytest.raises(ArithmeticError, match="recompute differs from eager"):
        stacks._check(found, x)


def test_the_nets_of_a_gpu_have_goals_of_their_own():
    rows = [
        {"net": net.name, "mode": stacks.STEP, "times_us": {"fused": {"median": 3000.0}}}
        for net in stacks.NETS_ON_GPU
    ]
    judged = stacks.judge(rows, stacks.GOALS_ON_GPU)
    assert [goal["value"] for goal in judged] == [3.0, 3.0]
    assert [(goal["met"], goal["passed"]) for goal in judged] == [(True, False), (True, True)]


def test_goals_are_judged_by_what_was_found():
    row = {"net": "digits", "mode": stacks.INFERENCE, "ratios": {"eager": {"median": 4.5}}}
    judged = {goal["goal"]: goal for goal in stacks.judge([row])}
    assert judged["digits, forward"]["met"] and not judged["digits, forward"]["passed"]
    assert judged["digits, step"]["met"] is None


def test_pages_show_the_newest_results_of_each_machine():
    for page, text in stacks.pages().items():
        assert page.read_text() == text, f"{page.name}: run `make tables`"
