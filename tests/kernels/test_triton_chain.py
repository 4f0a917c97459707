"""Chains in Triton: the numbers of their layers one by one, in one launch forward."""

import copy

import pytest
import torch

from fusedres import FusedResidualStack
from fusedres.chain import composite_chain
from oracle import assert_as_accurate
from triton_run import DEVICE, DTYPES, F32, MARKS
from triton_run import _clean as _clean  # a fixture, for every test

from fusedres.backends import chain as backend  # isort: skip

pytestmark = MARKS


class Case:
    """A chain's operands, drawn as a stack's parameters, and a cotangent."""

    def __init__(self, M=37, N=32, depth=4, block=1, dtype=F32, **settings):
        torch.manual_seed(0)
        settings = {"activation": "silu", **settings}
        stack = FusedResidualStack(N, depth, layers_per_block=block, **settings)
        for name in ("norm_weight", "norm_bias"):
            t = getattr(stack, name)
            if t is not None:
                torch.nn.init.normal_(t, 1.0 if name == "norm_weight" else 0.0, 0.3)
        given = stack._given()
        self.depth, self.links, self.what = depth, stack._text(given), f"{stack}, {dtype}"
        self.names = ["x", *(n for n, _ in stack.named_parameters())]
        operands = [torch.randn(M, N), *(t.detach() for t in given if t is not None)]
        self.tensors = [t.to(DEVICE, dtype) for t in operands]
        self.dy = torch.randn(M, N).to(DEVICE, dtype)

    def without_stacking(self):
        """The same links with operands of their own."""
        twin = copy.copy(self)
        x, *stacked = self.tensors
        lines = self.links.split("\n")
        twin.links = "\n".join(lines * (self.depth // len(lines)))
        twin.tensors = [x, *(t for link in zip(*stacked, strict=True) for t in link)]
        twin.depth = 0
        return twin

    def ours(self, keep=1):
        x, *operands = self.tensors
        y, *saved = backend.chain_forward(x, operands, self.links, self.depth, keep)
        return {"y": y}, saved

    def plain(self, dtype):
        x, *operands = (t.to(dtype) for t in self.tensors)
        return {"y": composite_chain(self.links, self.depth, x, tuple(operands))}

    def check(self):
        ours, _ = self.ours()
        plain, true = self.plain(self.dy.dtype), self.plain(torch.float64)
        assert_as_accurate(ours, plain, true, self.what)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("order", ["note", "prenorm", "postnorm"])
def test_the_numbers_of_its_layers(order, norm, block):
    Case(order=order, norm=norm, block=block).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "preact", "activation": "gelu"},
        {"order": "resnet-v1", "residual_scale": 0.5},
        {"order": "branch-norm", "bias": False},
        {"order": "linear-add", "norm": None, "activation": None, "residual_scale": 0.3},
        {"block": 3, "depth": 6, "order": "resnet-v1", "norm": "rms"},
        {"depth": 1},
        {"depth": 60, "N": 16, "M": 16, "eps": 1e-3},
        {"N": 64, "M": 5},
        {"N": 128, "M": 17, "depth": 2},
    ],
    ids=str,
)
def test_other_settings_and_sizes(settings):
    Case(**settings).check()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("settings", [{}, {"order": "preact", "norm": "rms"}], ids=str)
def test_16_bits(dtype, settings):
    Case(M=50, dtype=dtype, **settings).check()
    Case(M=33, N=256, depth=2, dtype=dtype, **settings).check()


def test_what_is_kept_changes_nothing_and_is_what_links_got():
    case = Case(order="prenorm")
    y = {keep: case.ours(keep) for keep in (0, 1, 2)}
    assert [len(saved) for _, saved in y.values()] == [0, 2, 1]
    assert all(torch.equal(found["y"], y[0][0]["y"]) for found, _ in y.values())
    x, *operands = case.tensors
    for link, (got, z) in enumerate(zip(*y[1][1], strict=True)):
        assert torch.equal(got, y[2][1][0][link])
        if link == 0:
            assert torch.equal(got, x)
        first = [t[:link] for t in operands]
        if link:
            before = composite_chain(case.links, link, x.double(), tuple(t.double() for t in first))
            torch.testing.assert_close(got.double(), before, atol=1e-5, rtol=1e-5)
        assert z.isfinite().all()


def test_operands_of_their_own_and_views_give_the_same_bits():
    case = Case(M=20)
    y = case.ours()[0]["y"]
    assert torch.equal(y, case.without_stacking().ours()[0]["y"])
    x = torch.randn(20, 80, device=DEVICE)[:, 1:65:2]
    x.copy_(case.tensors[0])
    case.tensors[0] = x
    assert torch.equal(y, case.ours()[0]["y"])
    case.tensors[0] = x.t().contiguous().t()
    assert torch.equal(y, case.ours()[0]["y"])


def test_nan_stays_in_its_row_and_no_rows_are_no_work():
    case = Case(M=20, block=2, activation="relu")
    clean = case.ours()[0]["y"]
    case.tensors[0][3, 5] = float("nan")
    case.tensors[0][4, 5] = float("inf")
    y = case.ours()[0]["y"]
    plain = case.plain(F32)["y"]
    assert torch.equal(y.isnan(), plain.isnan()) and y[3].isnan().all()
    keep = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(y[keep], clean[keep])
    case.tensors[0] = case.tensors[0][:0]
    assert case.ours()[0]["y"].shape == (0, 32)
