"""dz is written where z lies if, and only if, nobody else will look at z."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedres import FusedResidual, FusedResidualStack, chain, ops

pytestmark = pytest.mark.skipif("cpu" not in ops.BACKWARD, reason="the extension is missing")
OVER_Z = 1 << 7  # csrc/call.h
SETTINGS = (
    {"norm": "layer", "activation": "gelu"},
    {"norm": "batch", "activation": "relu"},
    {"norm": "batch", "activation": "relu", "order": "prenorm"},
    {"norm": "rms", "activation": "silu", "order": "linear-norm-act-gate-add"},
)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each backward of a layer was told that it may write over z."""
    told: list[bool] = []
    backward = ops.BACKWARD["cpu"]

    def spy(*call: Any) -> Any:
        told.append(bool(call[-1] & OVER_Z))
        return backward(*call)

    with monkeypatch.context() as patch:
        patch.setitem(ops.BACKWARD, "cpu", spy)
        yield told


def layer_and_x(features: int = 128, rows: int = 200, **settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = FusedResidual(features, **settings)
    return layer, torch.randn(rows, features, dtype=settings.get("dtype")).requires_grad_()


def gradients(layer: nn.Module, x: Tensor, y: Tensor, **how: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y), **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_gradients(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_and_x(dtype=dtype, **settings)
    with watched(monkeypatch) as told:
        y = layer(x)
        kept = gradients(layer, x, y, retain_graph=True)
        given = gradients(layer, x, y)
    assert told == [False, True]
    assert all(a.equal(b) for a, b in zip(kept, given, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(layer, x, y)


def held(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    z = y.grad_fn.saved_tensors[-1]
    before = z.clone()
    found = gradients(layer, x, y)
    assert z.equal(before)
    return found


def hooked(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        y = layer(x)
    before = [t.clone() for t in packed]
    found = gradients(layer, x, y)
    assert all(a.equal(b) for a, b in zip(packed, before, strict=True))
    return found


def differentiated_again(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return gradients(layer, x, layer(x), create_graph=True)


def kept_graph(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    first = gradients(layer, x, y, retain_graph=True)
    again = gradients(layer, x, y, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    return again


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


def recorded(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    with Recorder():
        return gradients(layer, x, y)


@pytest.mark.parametrize("use", [held, hooked, differentiated_again, kept_graph, recorded])
def test_z_stays_as_it_is(
    use: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_and_x()
    expected = gradients(layer, x, layer(x))
    with watched(monkeypatch) as told:
        found = use(layer, x)
    assert not any(told)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # one way is by torch's ops


def test_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_x()
    expected = gradients(layer, x, layer(x))
    found = gradients(layer, x, checkpoint(layer, x, use_reentrant=False))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_a_failed_backward_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it may have written over must not be taken for z."""
    layer, x = layer_and_x()
    y = layer(x)

    def fails(*call: Any) -> Any:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setitem(ops.BACKWARD, "cpu", fails)
        with pytest.raises(RuntimeError, match="no memory left"):
            gradients(layer, x, y)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(layer, x, y)


def test_small_layers_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_x(8, 4)
    with watched(monkeypatch) as told:
        gradients(layer, x, layer(x))
    assert told == [False]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("features", [64, 512])  # weights of all layers fit a cache, or do not
def test_of_a_stack(
    features: int, norm: str | None, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    depth = 6 if features == 64 else 9
    net = FusedResidualStack(features, depth=depth, norm=norm, recompute=recompute)
    x = torch.randn(300, features, requires_grad=True)
    told: list[bool] = []
    real = chain.donated

    def spy(*question: Any) -> bool:
        told.append(real(*question))
        return told[-1]

    monkeypatch.setattr(chain, "donated", spy)
    y = net(x)
    kept = gradients(net, x, y, retain_graph=True)
    given = gradients(net, x, y)
    assert told == [False, True]
    assert all(a.equal(b) for a, b in zip(kept, given, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(net, x, y)
