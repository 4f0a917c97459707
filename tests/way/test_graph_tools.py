"""FIDELITY 7: tools that read the graph see through, or say which way there is."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusedres import FusedResidual, FusedResidualMLP, Residual, fused_residual

M, K = 6, 16
SETTINGS = (
    {},
    {"order": "prenorm", "activation": "gelu"},
    {"order": "preact", "gate": "channel", "gate_init": 0.5},
    {"norm": "batch", "activation": "silu"},
    {"norm": None, "order": "linear-act"},
)


def pair(settings, cls=FusedResidual):
    """An eager net and a fused one with the same parameters."""
    nets = []
    for kind in (Residual, cls):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(K, K), kind(K, **settings), nn.Linear(K, 4)))
    return nets


def grads_of(net, x):
    x = x.clone().requires_grad_()
    loss = net(x).square().sum()
    parameters = [t for _, t in sorted(net.named_parameters())]
    return [loss, *torch.autograd.grad(loss, [x, *parameters])]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(b.abs().max().item(), 0.2))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_flops_are_eagers(settings, frozen, native):
    counts = []
    for net in pair(settings):
        net[0].requires_grad_(False)
        net[1].linear.weight.requires_grad_(frozen != "weight")
        x = torch.randn(M, K, requires_grad=frozen != "x")
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 2 * 3 * M * K * K


@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_flops_of_the_function(frozen, native):
    """A module is run stage by stage under the counter, whose hooks are on every module."""
    tensors = {"x": torch.randn(M, K), "weight": torch.randn(K, K)}
    for name, t in tensors.items():
        t.requires_grad_(name != frozen)
    with FlopCounterMode(display=False) as counter:
        fused_residual(**tensors).sum().backward()
    assert counter.get_total_flops() == (6 if frozen == "" else 4) * M * K * K


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_exported_program_trains(settings, strict, native):
    plain, fused = pair(settings)
    x = torch.randn(M, K)
    program = torch.export.export(fused, (x,), strict=strict)
    assert any(
        node.target is torch.ops.fusedres.residual_layer.default for node in program.graph.nodes
    )
    net = program.module()
    for _ in range(2):
        assert_same(grads_of(net, x), grads_of(plain, x))
    buffers = dict(plain.named_buffers())
    for name, t in net.named_buffers():
        assert torch.allclose(t.float(), buffers[name].float(), atol=2e-6), name


def test_a_gradient_of_a_gradient_of_an_exported_program(native):
    plain, fused = pair({"activation": "gelu"})
    x = torch.randn(M, K)
    found = []
    for net in (plain, torch.export.export(fused, (x,)).module()):
        a = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(a).square().sum(), a, create_graph=True)
        found.append(
            torch.autograd.grad(g.square().sum(), [a, *net.parameters()], allow_unused=True)
        )
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


LOAD = """
import sys, torch, fusedres
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2])
net = program.module()
y = net(x)
y.square().sum().backward()
assert all(p.grad is not None for p in net.parameters())
torch.save(y.detach(), sys.argv[3])
"""


def test_an_exported_program_loads_in_another_process(tmp_path, native):
    _, fused = pair({})
    x = torch.randn(M, K)
    files = [str(tmp_path / name) for name in ("net.pt2", "x.pt", "y.pt")]
    torch.export.save(torch.export.export(fused, (x,)), files[0])
    torch.save(x, files[1])
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    assert torch.equal(torch.load(files[2]), fused(x))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_jit_trace_gets_plain_ops(settings, lead):
    plain, fused = pair(settings)
    plain.eval(), fused.eval()
    traced = torch.jit.trace(fused, torch.randn(M, *lead, K))
    assert "fusedres::" not in str(traced.inlined_graph)
    x = torch.randn(2 * M, *lead, K)  # another batch
    torch.testing.assert_close(traced(x), plain(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_gets_plain_ops(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    plain, fused = pair({"order": "note", "activation": "relu"})
    plain.eval(), fused.eval()
    x, path = torch.randn(M, K), str(tmp_path / "net.onnx")
    torch.onnx.export(fused, (x,), path, dynamo=dynamo, verbose=False)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    found = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [FusedResidual(K), Residual(K), FusedResidualMLP(K)])
def test_fx_and_script_say_which_way_there_is(layer):
    with pytest.raises(TypeError, match=r"torch\.fx\.Proxy.*is_leaf_module.*torch\.export"):
        torch.fx.symbolic_trace(nn.Sequential(layer))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(nn.Sequential(layer))
