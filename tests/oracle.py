"""The three results that every accuracy test compares, and the rules by which it does.

`exact`: the formula in float64. `eager`: the same formula in the tested dtype by plain torch.
`fused`: ours. A result is a dict: "y", "dx", "dweight", ... and "running_mean", "running_var" where
they were updated.
"""

import copy
from unittest import mock

import torch

from cases import DIFFERENTIABLE, KINKS, STATISTICS
from cases import make_case as make_case
from fusedres import Residual, fused_residual
from fusedres.operands import Operands
from fusedres.reference import ACTIVATION_FUNCTIONS, composite, draw_seed, rows_per_sample

FEW = 64  # elements: fewer have no RMS error worth the name


def gradients(leaves, asked, y, dy):
    """{"y": y, "dx": dx, ...} for the leaves asked for."""
    wanted = [leaves[name] for name in asked]
    grads = torch.autograd.grad(y, wanted, dy) if wanted else ()
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(asked, grads, strict=True)}}


def _leaves(case, asked, dtype):
    """Fresh leaves with the operands' values and strides, in `dtype`; copies of statistics."""
    copies = {name: case.tensors[name].clone() for name in STATISTICS if name in case.tensors}
    return {
        name: t.detach().to(dtype).requires_grad_(name in asked)
        for name, t in {**case.tensors, **copies}.items()
    }


def _statistics(case, leaves):
    return {name: leaves[name] for name in STATISTICS if name in leaves and case.spec.batch_stats}


def fused(case, backend="auto", asked=None):
    """By fused_residual."""
    asked = case.asked if asked is None else asked
    leaves = _leaves(case, asked, case.x.dtype)
    settings = {name: value for name, value in case.settings.items() if name != "gate"}
    torch.manual_seed(case.seed)
    y = fused_residual(
        **leaves,
        **settings,
        momentum=case.momentum,
        shortcut="pad" if case.pad else None,
        backend=backend,
    )
    return gradients(leaves, asked, y, case.dy) | _statistics(case, leaves)


def _plain(case, dtype, asked):
    """By the composite in `dtype`."""
    spec, leaves = case.spec, _leaves(case, asked, dtype)
    operands = {name: leaves.get(name) for name in (*DIFFERENTIABLE, *STATISTICS)}
    for name in ("x", "residual"):
        if operands[name] is not None:
            operands[name] = operands[name].reshape(-1, operands[name].shape[-1])
    torch.manual_seed(case.seed)
    seed = draw_seed(case.x.device) if spec.random else None
    o = Operands(*operands.values(), seed, rows_per_sample(case.x))
    y = composite(spec, o, case.momentum)
    y = y.view(*case.x.shape[:-1], y.shape[-1])
    return gradients(leaves, asked, y, case.dy.to(dtype)) | _statistics(case, leaves)


def exact(case, asked=None):
    return _plain(case, torch.float64, case.asked if asked is None else asked)


def eager(case, asked=None):
    """By plain torch. In float64, where that is the oracle: with float32's error, scaled by eps."""
    asked = case.asked if asked is None else asked
    if case.x.dtype != torch.float64:
        return _plain(case, case.x.dtype, asked)
    floats = {name: t.float() for name, t in case.tensors.items()}
    single = case.with_tensors(case.dy.float(), **floats)
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    rounded, true = eager(single, asked), exact(single, asked)
    errors = {name: shrink * (rounded[name] - true[name]) for name in true}
    return {name: t + errors[name] for name, t in exact(case, asked).items()}


def double(layer):
    """The same layer as a float64 oracle."""
    other = copy.deepcopy(layer).double()
    other.__class__ = Residual
    return other


def pre_activation(case, dtype):
    """What the activation sees."""
    seen, name = [], case.spec.activation
    function = ACTIVATION_FUNCTIONS[name]
    with mock.patch.dict(ACTIVATION_FUNCTIONS, {name: lambda h: seen.append(h) or function(h)}):
        _plain(case, dtype, ())
    return seen[0]


def near_kink(case):
    """(M, C) bool: whether twice eager's largest error could carry the element across a kink."""
    h = pre_activation(case, torch.float64)
    dtype = torch.float32 if case.x.dtype == torch.float64 else case.x.dtype
    error, near = (pre_activation(case, dtype) - h).abs(), torch.zeros(h.shape, dtype=torch.bool)
    for kink in KINKS.get(case.spec.activation, {}):
        around = (h - kink).abs()
        if (around < 1).any():
            near |= around <= 2 * error[around < 1].max()
    return near


def without_kinks(case):
    """The case without the rows that have an element near a kink, at most 0.5 % of the elements."""
    if case.spec.activation not in KINKS:
        return case
    near = near_kink(case)
    assert near.double().mean() <= 0.005, f"{near.sum()} of {near.numel()} elements lie near a kink"
    keep = ~near.any(1)
    assert keep.double().mean() >= 0.25, f"{keep.sum()} of {keep.numel()} rows are left"
    rows = {name: case.tensors[name][keep] for name in ("x", "residual") if name in case.tensors}
    return case.with_tensors(dy=case.dy[keep], **rows)


def _errors(name, ours, plain, true):
    for result in (ours, plain):
        assert result.shape == true.shape, f"{name}: shape {result.shape}, expected {true.shape}"
        assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    return (ours.double() - true).abs().flatten(), (plain.double() - true).abs().flatten()


def assert_as_accurate(ours, plain, true, what=""):
    """NUMERICS 1 for every tensor of three results: RMS error <= 1.10x, largest <= 2x eager's.

    Each plus one rounding step at the largest value: for the RMS, in one element. The RMS of n
    errors is itself only known to 1/sqrt(2n): the ratio of two may exceed 1.10 by 4/sqrt(n), four
    standard deviations. In float64 the oracle has errors of the same size: twice as much.
    """
    assert ours.keys() == true.keys()
    for name in true:
        error, allowed = _errors(name, ours[name], plain[name], true[name])
        n = error.numel()
        if n == 0:
            continue
        step = torch.finfo(ours[name].dtype).eps * true[name].abs().max()
        rms, rms_allowed = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        oracle = 2 if ours[name].dtype == torch.float64 else 1
        factor = 1.10 * oracle + 4 * n**-0.5
        told = f"{name} of {what}: RMS error {rms:.3g}, eager {rms_allowed:.3g} "
        told += f"(x{rms / rms_allowed:.2f}); "
        told += (
            f"largest {error.max():.3g}, eager {allowed.max():.3g}; one step {step:.3g}; n = {n}"
        )
        assert rms <= factor * rms_allowed + step * n**-0.5, told
        most = 2.001 * oracle * allowed.max()  # where the gradient is 0 two whole steps are a tie
        assert error.max() <= most + step, told


def assert_close(ours, plain, true, terms, what=""):
    """For a few elements, which have no RMS: within twice eager's error, and some roundings.

    Those are four in the dtype (z, y, and the like) and a random walk of `terms` additions in fp32
    or better, each of a term as large as the result, or as 3: operands are of the order of 1, and
    terms can cancel. What this looks for is wrong by the size of the values themselves.
    """
    assert ours.keys() == true.keys()
    for name in true:
        error, allowed = _errors(name, ours[name], plain[name], true[name])
        if error.numel():
            dtype = ours[name].dtype
            sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            roundings = (4 * torch.finfo(dtype).eps + terms**0.5 * sums) * max(
                3.0, true[name].abs().max()
            )
            told = f"{name} of {what}: error {error.max():.3g}, eager {allowed.max():.3g}"
            told += f", roundings {roundings:.3g}"
            assert error.max() <= 2 * allowed.max() + roundings, told


def assert_by_size(case, ours, plain, true, what=""):
    """The one rule or the other for every tensor of three results of a case, by its size."""
    few = {name for name, t in true.items() if t.numel() < FEW}
    terms = case.dy.numel() + case.x.shape[-1]
    for names, rule in (
        (few, lambda *results: assert_close(*results, terms, what)),
        (true.keys() - few, lambda *results: assert_as_accurate(*results, what)),
    ):
        rule(*({name: result[name] for name in names} for result in (ours, plain, true)))


def pooled(results):
    """Several results as one, for tensors too small for an RMS of their own."""
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


def check_accuracy(*cases, backend="auto"):
    """The accuracy rule for one case, or for the errors of several cases together.

    Float64 with batch statistics goes by assert_close: torch has float32's in double, so that
    float32's error, scaled, says nothing about them.
    """
    runs = (lambda case: fused(case, backend)), eager, exact
    results = [[run(case) for case in cases] for run in runs]
    for ours, plain in zip(results[0], results[1], strict=True):
        for name in plain:
            assert ours[name].shape == plain[name].shape, name
            assert ours[name].dtype == plain[name].dtype, name
    first = cases[0]
    together = [r[0] if len(r) == 1 else pooled(r) for r in results]
    what = f"'{first.spec}', {first.x.dtype}"
    if first.x.dtype == torch.float64 and first.spec.batch_stats:
        assert_close(*together, sum(first.tensors["weight"].shape) + len(first.x), what)
    else:
        assert_as_accurate(*together, what)
