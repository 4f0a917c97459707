"""Operands of several dtypes on the emulated sm_80 kernels: float32 for x, residual or y beside a
product of 16 bits. FIDELITY 3: each as it comes, in one launch as ever.

Eager is the composite in the recipe's dtypes, which rounds no more often than the layer does under
autocast.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import cuda_on_cpu
from cases import ALIASES, make_case
from cuda_on_cpu.layers import Call, Settings, emulated, same_bytes
from fusedres.backends import native
from fusedres.dtypes import typed
from fusedres.operands import Operands
from fusedres.reference import composite, draw_seed
from fusedres.spec import ACTIVATIONS, Spec, parse_order
from oracle import FEW, assert_by_size, exact, gradients, without_kinks
from test_cuda_emulated import TILES, _one_thread, check_same  # noqa: F401

pytestmark = [
    pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing())),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # eager's norm
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ORDERS = (
    *ALIASES,
    "linear",
    "linear-act",
    "linear-add",
    "act-linear-add",
    "add-norm-act-linear",
    "gate-norm-act-add-linear",
    "linear-gate-add-norm-act",
)
SMOOTH = ("gelu", "silu", "tanh", None)
# product, x, residual (None: x itself); all of one dtype is elsewhere
MIXED = [
    (product, x, residual)
    for product in (BF16, F16)
    for x, residual in itertools.product((product, F32), (None, product, F32))
    if F32 in (x, residual)
]


def mixed(case, product, x, residual=None, y=None):
    """The case with operands of these dtypes and norms and gates of float32, and its recipe: as
    autocast on a GPU makes it. `y`: another dtype than that.
    """
    cast = {"x": x, "weight": product, "bias": product, "residual": residual or x}
    tensors = {name: t.to(cast.get(name, F32)) for name, t in case.tensors.items()}
    own = None if "residual" in tensors else x
    recipe, _ = typed(case.spec.text, x, F32, own or residual, product, "cuda")
    spec = Spec.parse(recipe)
    if y is not None:
        spec = replace(spec, y_dtype=None if y == product else str(y).removeprefix("torch."))
    y = getattr(torch, spec.y_dtype) if spec.y_dtype else product
    return case.with_tensors(case.dy.to(y), **tensors), spec


def eager(case, spec):
    """By the composite, in the recipe's dtypes."""
    leaves = {n: t.detach().requires_grad_(n in case.asked) for n, t in case.tensors.items()}
    torch.manual_seed(case.seed)
    seed = draw_seed(case.x.device) if spec.random else None
    o = Operands(**leaves, seed=seed)
    return gradients(leaves, case.asked, composite(spec, o), case.dy)


def check(case, dtypes, settings=None, **given):
    case, spec = mixed(without_kinks(case), *dtypes, **given)
    ours, plain = emulated(case, settings), eager(case, spec)
    for name, t in plain.items():
        assert ours[name].dtype == t.dtype, name
        if t.numel() < FEW:  # the roundings of few are those of the product, whatever they come in
            ours[name], plain[name] = ours[name].to(dtypes[0]), t.to(dtypes[0])
    assert_by_size(case, ours, plain, exact(case), f"'{spec}', {dtypes}, {settings}")


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_norms_and_dtypes(order, dtypes):
    """Norms, activations and tiles take turns."""
    number = ORDERS.index(order) + MIXED.index(dtypes)
    own = dtypes[2] is not None and "add" in parse_order(order)
    dtypes = (*dtypes[:2], dtypes[2] if own else None)
    for i, norm in enumerate([None, "layer", "rms", "batch"]):
        if (i + number) % 2:
            continue
        K, N = (72, 72) if not own or number % 3 else (67, 139)
        case = make_case(
            21,
            K,
            N,
            order=order,
            norm=norm,
            activation=SMOOTH[(number + i // 2) % 4],
            training=norm != "batch",
            gate="channel" if "gate" in order or number % 3 == 1 else None,
            residual_scale=0.5 if number % 2 else 1.0,
            residual=(K if order.startswith(("add", "gate-norm")) else N) if own else None,
            dtype=dtypes[0],
        )
        check(case, dtypes, Settings(seed=number))


@pytest.mark.parametrize("product", [BF16, F16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, product):
    order = ("linear-act-add", "act-linear-add")[activation == "sin"]
    case = make_case(24, 64, order=order, norm=None, activation=activation, dtype=product)
    check(case, (product, F32))


@pytest.mark.parametrize("product", [BF16, F16])
@pytest.mark.parametrize("x", ["product", F32])
@pytest.mark.parametrize("order", ["linear", "linear-act", "norm-linear", "linear-norm"])
def test_y_of_either_dtype(order, x, product):
    """And rows longer than what a product has of them in shared memory at a time."""
    x = product if x == "product" else x
    for y in (product, F32):
        case = make_case(21, 339, 270, order=order, activation="gelu", dtype=product)
        check(case, (product, x), y=y)


RECIPES = {
    "note": {"order": "note", "dropout": 0.3},
    "prenorm": {"order": "prenorm", "gate": "scalar"},
    "postnorm": {"order": "postnorm", "drop_path": 0.2, "residual": 264},
    "before": {"order": "gate-norm-act-add-linear", "gate": "channel"},
    "after": {"order": "linear-gate-add-norm-act", "gate": "channel"},
    "act": {"order": "linear-act-add", "norm": None},
}


def make_recipe(name, dtype, M=35, K=120, N=264):
    """In some x is the residual, of another width than y."""
    pad = "residual" not in RECIPES[name]
    return make_case(M, K, N, pad=pad, activation="gelu", dtype=dtype, **RECIPES[name])


def mixed_recipe(name, product=BF16, **sizes):
    case = make_recipe(name, product, **sizes)
    return mixed(case, product, F32, F32 if "residual" in case.tensors else None)[0]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("block", TILES)
def test_every_tile(block, name):
    product = (BF16, F16)[TILES.index(block) % 2]
    case = make_recipe(name, product, M=block[0] + 1)
    residual = F32 if "residual" in case.tensors else None
    given = Settings(block=block, parts=(2, 3), shared_limit=227 << 10)
    check(case, (product, F32, residual), given)
    if residual is None:  # x in the product's dtype; y in fp32 where layer norm makes it so
        check(case, (product, product), given)


@pytest.mark.parametrize("name", RECIPES)
def test_however_it_runs_the_bytes_are_the_same(name):
    for product, N in ((BF16, 264), (F16, 257)):
        case = mixed_recipe(name, product, N=264 if name == "postnorm" else N)
        first = Settings(block=(16, 64), parts=(3, 2))
        expected = emulated(case, first)
        for groups in (1, 2):
            got = emulated(case, replace(first, groups=groups, seed=groups, resident=groups))
            check_same(got, expected, f"{groups} programs a row block")
        for gap, shift in ((8, 0), (1, 0), (3, 3)):
            got = emulated(case, replace(first, gap=gap, shift=shift))
            check_same(got, expected, f"{gap}, {shift}")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_asked_for_changes_nothing_else(name):
    """x and the residual are stand-ins without memory where backward must not look at them."""
    case = mixed_recipe(name)
    with Call(case) as call, Call(case, keep=False) as other:
        assert same_bytes(call.forward()[0], other.forward()[0])
    everything = emulated(case)
    for asked in itertools.chain(
        itertools.combinations(case.asked, 1),
        itertools.combinations(case.asked, len(case.asked) - 1),
    ):
        got = emulated(case, asked=asked)
        check_same(got, {n: everything[n] for n in got}, f"only {asked}")


@pytest.mark.parametrize("name", RECIPES)
def test_no_races(name):
    for block, groups in (((16, 64), 1), ((64, 128), 0)):
        case = mixed_recipe(name, M=block[0] + 1)
        emulated(case, Settings(0, 3, 4, 227 << 10, block, groups, (2, 2), watched=True))


def test_the_cast_of_x_that_forward_keeps():
    for K in (120, 67):
        case, _ = mixed(make_case(21, K, 64, order="linear-act", dtype=BF16), BF16, F32)
        with Call(case, Settings(block=(16, 64), groups=1)) as call:
            call.forward()
            assert same_bytes(call.operand, case.x.to(BF16))


def test_what_is_refused():
    case, _ = mixed(make_case(8, 20000, 16, order="linear", norm=None, dtype=BF16), BF16, F32)
    with Call(case) as call:
        assert "rows of x do not fit" in call.refusal()
        call.layer.K = 64
        assert call.refusal() is None
        call.layer.y_dtype = 2
        assert "or float32" in call.refusal()


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
@pytest.mark.parametrize("product", [F32, F16, BF16])
def test_a_recipe_is_refused_as_its_tensors_are(product):
    """The backend asks by the recipe before the call, the op by what it got."""
    dtypes = (F32, F16, BF16)
    for order in ("note", "linear-add", "add-norm-linear"):
        for x, residual, y in itertools.product(dtypes, (None, *dtypes), dtypes):
            own = 72 if residual is not None else None
            plain = make_case(3, 72, 72, order=order, activation="gelu", residual=own)
            tensors = {name: t.to(product) for name, t in plain.tensors.items()}
            tensors |= {"x": plain.x.to(x)}
            if own:
                tensors |= {"residual": plain.tensors["residual"].to(residual)}

            def name(dtype):
                known = dtype is None or dtype == product
                return None if known else str(dtype).removeprefix("torch.")

            spec = replace(plain.spec, x_dtype=name(x), residual_dtype=name(residual))
            text = str(replace(spec, y_dtype=name(y)))
            asked = (text, str(product).removeprefix("torch."), 72, 72, 99 << 10, True)
            with Call(plain.with_tensors(plain.dy.to(y), **tensors)) as call:
                assert call.refusal() == native.extension.cuda_why_not(*asked), text
