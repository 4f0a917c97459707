"""NUMERICS 9: any shape, strides, dtype, order, flags, subset of gradients, by hypothesis."""

import math

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cases import KINKS, make_case
from fusedres import ACTIVATIONS, NORMS
from fusedres.spec import STAGES, make_spec
from oracle import assert_close, eager, exact, fused, near_kink
from test_shapes import LAYOUTS

ci = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


@st.composite
def orders(draw):
    """`linear` and any other stages, in any order."""
    others = draw(st.lists(st.sampled_from([s for s in STAGES if s != "linear"]), unique=True))
    return "-".join(draw(st.permutations(["linear", *others])))


@st.composite
def cases(draw):
    """A call that is allowed: every setting of fused_residual, operands in any layout."""
    dtype, order = draw(st.sampled_from(DTYPES)), draw(orders())
    smooth = [a for a in ACTIVATIONS if a not in KINKS]  # in half precision a kink is luck
    kinds = {
        "order": order,
        "norm": draw(st.sampled_from((None, *NORMS))),
        "activation": draw(st.sampled_from((None, *(smooth if dtype in HALF else ACTIVATIONS)))),
        "gate": draw(st.sampled_from((None, "scalar", "channel"))),
        "dropout": draw(st.sampled_from((0.0, 0.4))),
        "drop_path": draw(st.sampled_from((0.0, 0.4))),
        "residual_scale": draw(st.sampled_from((1.0, -0.5))),
        "training": draw(st.booleans()),
    }
    lead = draw(st.sampled_from(((), (1,), (7,), (33,), (2, 5), (3, 1, 4), (0,))))
    spec = make_spec(**kinds)
    if spec.batch_stats and math.prod(lead) < 2:
        lead = (5,)
    K, N = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    width = spec.width("add", K, N)
    pad = spec.adds and draw(st.booleans())
    residuals = [None, *range(1, width)] if pad else [None, width]
    case = make_case(
        lead=lead,
        K=K,
        N=N,
        **kinds,
        eps=1.0,
        dtype=dtype,
        bias=draw(st.booleans()),
        affine=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        residual=draw(st.sampled_from(residuals)) if spec.adds else None,
        pad=pad,
        draw=draw(st.integers(0, 9)),
    )
    tensors = dict(case.tensors)
    if lead and math.prod(lead):
        for name in ("x", "residual", "weight", "dy"):
            layout = draw(st.sampled_from((None, *LAYOUTS)))
            if layout is not None and name in {*tensors, "dy"}:
                t = layout(tensors.get(name, case.dy))
                tensors[name] = t
    return case.with_tensors(dy=tensors.pop("dy", case.dy), **tensors)


@given(case=cases(), data=st.data())
@settings(ci, max_examples=500)
def test_any_call_agrees_with_the_reference(case, data):
    """Of any subset of gradients exactly those come, with the bytes they have among all."""
    if case.spec.activation in KINKS:
        assume(not near_kink(case).any())
    ours, terms = fused(case), case.x.numel() + case.dy.numel() + case.x.shape[-1] + 1
    assert_close(ours, eager(case), exact(case), terms, f"'{case.spec}' {tuple(case.x.shape)}")
    asked = data.draw(
        st.lists(st.sampled_from(case.asked), unique=True).map(tuple), "gradients asked for"
    )
    some = fused(case, asked=asked)
    assert {name for name in some if name[0] == "d"} == {f"d{name}" for name in asked}
    for name, t in some.items():
        assert torch.equal(t, ours[name]), f"{name} depends on which others are asked for"


@given(order=orders(), flags=st.tuples(*[st.booleans()] * 6))
@settings(ci, max_examples=200)
def test_any_order_keeps_its_stages_and_round_trips(order, flags):
    norm, act, gate, dropout, droppath, training = flags
    spec = make_spec(
        order,
        "rms" if norm else None,
        "tanh" if act else None,
        "scalar" if gate else None,
        dropout=0.5 * dropout,
        drop_path=0.25 * droppath,
        training=training,
    )
    written = order.split("-")
    on = {
        "norm": norm and "norm" in written,
        "act": act and "act" in written,
        "linear": True,
        "gate": gate,
        "dropout": dropout and training,
        "droppath": droppath and training,
        "add": "add" in written,
    }
    assert set(spec.stages) == {stage for stage in STAGES if on[stage]}
    assert [s for s in spec.stages if s in written] == [s for s in written if on[s]]
    assert type(spec).parse(str(spec)) == spec
