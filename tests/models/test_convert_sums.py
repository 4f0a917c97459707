"""convert with example inputs: modules whose own forward adds, read by torch.fx; and afterwards
everything that people do with a model.
"""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from blocks import BLOCKS, LEFT, MLP, TWICE, K, drop_path, linear
from blocks import _make as make
from fusedres import convert, revert
from fusedres.models import gain, guard
from fusedres.models.plan import MOST, Plan, Planned
from test_compiled import assert_same, step

UNREAD = ("the caller's memory", "overwritten in between")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Block(nn.Module):
    """One that pickles."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(K), nn.Linear(K, 12), nn.Linear(12, K)
        self.drop, self.act = nn.Dropout(0.0), nn.GELU()
        self.scale = 1.0

    def forward(self, x):
        rows, features = x.shape[0], x.shape[-1]
        y = self.fc2(self.drop(self.act(self.fc1(self.norm(x)))))
        return x + self.scale * y.reshape(rows, -1, features)


def net():
    return nn.Sequential(Block(), nn.Linear(K, K), Block())


def calls(model, x):
    """How many of a model's modules run fused with x."""
    with mock.patch.object(Plan, "run", autospec=True, side_effect=Plan.run) as run:
        model(x)
    return run.call_count


@pytest.mark.parametrize("name", BLOCKS)
def test_found_and_equal(name):
    make_block, recipes = BLOCKS[name]
    block, x = make_block(), torch.randn(3, 6, K)
    plain = copy.deepcopy(block)
    report = convert(block, x, when="always").residual_adds
    assert report.found == len(report.fused) == (2 if name in TWICE else 1)
    assert report.fused[-1].what.split(" in ")[0].split(", ") == recipes
    assert calls(block, x) == 1
    assert_same(step(block, block, x), step(plain, plain, x))
    with torch.no_grad():
        assert_same([block.eval()(x[:2])], [plain.eval()(x[:2])])
    revert(block)
    assert not isinstance(block, Planned) and "_fusedres_plans" not in vars(block)
    assert_same(step(block.train(), block, x), step(plain, plain, x))


@pytest.mark.parametrize("name", [name for name in LEFT if name not in UNREAD])
def test_left_with_the_reason(name):
    make_block, _word = LEFT[name]
    block, x = make_block(), torch.randn(3, 6, K)
    kind, before = type(block), step(block, block, x)
    report = convert(block, x, when="always").residual_adds
    assert not report.fused and report.left and type(block) is kind
    assert_same(step(block, block, x), before, 0.0)


def test_drop_path():
    """The mask's own questions for the branch's size do not keep it from being fused."""
    net = make(lambda s, x: x + drop_path(s.fc(x), 0.25, s.training), fc=linear())
    plain, x = copy.deepcopy(net), torch.randn(500, 4, K)
    report = convert(net, x, when="always")
    assert "linear-droppath-add drop_path=0.25" in str(report)
    assert calls(net, x) == 1
    dropped = (net(x) == x).view(500, -1)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert abs(dropped.all(1).double().mean() - 0.25) < 0.08
    assert_same([net.eval()(x)], [plain.eval()(x)])


def test_a_batch_norm_that_is_called_twice():
    """Its statistics are what torch's backward of the other call still reads."""
    net = make(
        lambda s, x: x + (s.norm(s.a(x)) + s.norm(s.fc(x))),
        a=linear(), fc=linear(), norm=lambda: nn.BatchNorm1d(K),
    )  # fmt: skip
    plain, x = copy.deepcopy(net), torch.randn(20, K)
    report = convert(net, x, when="always").residual_adds
    assert not report.fused and "its batch norm is called more than once" in str(report)
    assert_same(step(net, net, x), step(plain, plain, x))
    assert_same(list(net.buffers())[:2], list(plain.buffers())[:2])


@pytest.mark.parametrize("name", ["in place", "in place into the branch", "in place into the skip"])
def test_what_writes_in_place_is_timed_too(name, monkeypatch):
    """In training, where a leaf that learns must not be written into."""
    timed = []
    measure = gain._measure
    # Taken for slower, whatever it was: one that is fused is timed again, without gradients.
    monkeypatch.setattr(gain, "_measure", lambda pair: timed.append(measure(pair)) or (1.0, 2.0))
    monkeypatch.setattr(gain, "_MEASURED", {})
    convert(BLOCKS[name][0](), torch.randn(3, 6, K, requires_grad=True))
    assert len(timed) == 1


def test_parameters_keys_and_modules_stay():
    model, x = net(), torch.randn(3, 6, K)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    ids, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    modules, modes = list(model.modules()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = convert(model, x, when="always")
    assert torch.equal(torch.get_rng_state(), state)
    assert [add.where for add in report.residual_adds.fused] == ["0", "2"]
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == keys
    assert list(model.modules()) == modules and [m.training for m in modules] == modes
    assert isinstance(model[0], Block) and type(model[0]).__name__ == "Block"
    before = model[0].fc1.weight.clone()
    model(x).sum().backward()
    optimiser.step()
    assert not torch.equal(model[0].fc1.weight, before)
    assert calls(model, x) == 2
    model.load_state_dict(net().state_dict())


def test_copies_and_pickles():
    model, x = net(), torch.randn(3, 6, K)
    convert(model, x, when="always")
    expected, buffer = model(x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert calls(twin, x) == 2
        assert_same([twin(x)], [expected])
        with torch.no_grad():
            twin[0].fc2.weight.zero_()
            twin[0].fc2.bias.zero_()
        assert_same([twin[0](x)], [x])
        revert(twin)
        assert type(twin[0]) is Block
    assert_same([model(x)], [expected])


@pytest.mark.parametrize("name", ["setting", "child", "hook", "forward", "eps", "scale", "None"])
def test_surgery_after_convert(name):
    model, x = Block(), torch.randn(3, 6, K)
    convert(model, x, when="always")
    plain = copy.deepcopy(model)
    revert(plain)
    for m in (model, plain):
        if name == "setting":
            m.act.approximate = "tanh"
        elif name == "child":
            m.act = nn.Tanh()
        elif name == "hook":
            m.fc1.register_forward_hook(lambda _m, _a, y: y * 2)
        elif name == "forward":
            m.fc1.forward = lambda h, fc1=m.fc1: nn.Linear.forward(fc1, h) * 3
        elif name == "eps":
            m.norm.eps = 0.5
        elif name == "scale":
            m.scale = 0.125
        else:
            m.fc2.bias = None
    assert_same(step(model, model, x), step(plain, plain, x))
    assert len(model._fusedres_plans.plans) > 1
    convert(model, x, when="always")
    assert_same(step(model, model, x), step(plain, plain, x))


@pytest.mark.parametrize("if_unchanged", {guard.if_unchanged, guard._if_unchanged})
def test_what_is_noticed(if_unchanged, monkeypatch):
    """By the extension as without it; nothing of what leaves a forward as it was."""
    monkeypatch.setattr(guard, "if_unchanged", if_unchanged)
    model = Block()
    model.table = torch.arange(4)  # has no truth value
    modules = guard.Modules(list(model.modules()))
    wanted = [model.fc1._parameters, "weight", model.fc2._parameters, "bias"]
    assert modules.find([]) == [] and modules.find([{}, "gone"]) is None
    model.scale, model.fc1.weight = float("1.0"), nn.Parameter(torch.ones(12, K))
    weight, bias = modules.find(wanted)
    assert weight is model.fc1.weight and bias is model.fc2.bias
    act, fc = model.act, model.fc1
    for do, undo in (
        (lambda: setattr(model, "scale", 2.0), lambda: setattr(model, "scale", 1.0)),
        (lambda: setattr(model, "more", None), lambda: delattr(model, "more")),
        (lambda: model.drop.eval(), lambda: model.drop.train()),
        (lambda: act.register_forward_hook(print), lambda: act._forward_hooks.clear()),
        (lambda: model.add_module("more", act), lambda: model._modules.pop("more")),
        (lambda: setattr(fc, "__class__", Block), lambda: setattr(fc, "__class__", nn.Linear)),
        (lambda: setattr(model, "table", torch.arange(4)), lambda: None),
    ):
        assert modules.find(wanted) is not None
        do()
        assert modules.find(wanted) is None
        undo()


def test_nested_and_named_arguments():
    def forward(s, x, pair=None, scale=1.0):
        return x + scale * s.fc(pair["y"][0])

    model, x, y = make(forward, fc=linear()), torch.randn(3, K), torch.randn(3, K)
    plain = copy.deepcopy(model)
    assert len(convert(model, x, {"y": (y, 2)}, when="always").residual_adds.fused) == 1
    plans = model._fusedres_plans.plans
    before = len(plans)
    for given, made in (
        ({"pair": {"y": (y, 2)}}, 1),
        ({"pair": {"y": (y, 2)}}, 1),
        ({"pair": {"y": (y, 3)}}, 2),
        ({"pair": {"y": [y, 3]}}, 3),
        ({"pair": {"y": (y, 3), "z": y}}, 4),
        ({"scale": 0.5, "pair": {"y": (y, 2)}}, 5),
    ):
        assert_same([model(x, **given)], [plain(x, **given)])
        assert len(plans) == before + made


def test_modes_sizes_and_dtypes_of_calls():
    model, x = Block(), torch.randn(3, 6, K)
    convert(model, x, when="always")
    plain = copy.deepcopy(model)
    revert(plain)
    plans = len(model._fusedres_plans.plans)
    for size in ((3, 6), (5, 6), (2, 9)):
        assert_same(
            step(model, model, torch.ones(*size, K)), step(plain, plain, torch.ones(*size, K))
        )
    assert len(model._fusedres_plans.plans) == plans  # sizes that nothing asked for are free
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(model, model, x), step(plain, plain, x), 2e-2)
    for dtype in (torch.float64, torch.bfloat16):
        model, plain = model.to(dtype), plain.to(dtype)
        y = x.to(dtype)
        assert_same(
            step(model, model, y), step(plain, plain, y), 1e-12 if dtype.itemsize == 8 else 0.05
        )
    model.eval(), plain.eval()
    assert_same([model(y)], [plain(y)], 0.05)


def test_too_many_kinds_of_arguments_run_as_they_did():
    def forward(s, x):
        return x + s.fc(x) * (2.0 if x.shape[0] > 3 else 1.0)  # asks for a size

    model = make(forward, fc=linear())
    plain = copy.deepcopy(model)
    convert(model, torch.randn(2, K), when="always")
    for rows in range(1, MOST + 5):
        x = torch.randn(rows, K)
        assert_same([model(x)], [plain(x)])
    assert len(model._fusedres_plans.plans) == MOST


def _stops(s, x):
    if x.sum() > 0:
        return x + s.fc(x)
    return x - s.fc(x)


def _counts_groups(s, x):
    return x + s.fc(x) * (int(x.argmax()) + 1)


def _draws(s, x):
    return x + s.fc(x) * float(torch.rand(()))


def _counts(s, x):
    s.calls = getattr(s, "calls", 0) + 1
    return x + s.fc(x)


def _switches(s, x):
    with torch.no_grad():
        y = s.fc(x)
    return x + y


def _makes(s, x):
    return x + s.fc(x) * torch.ones(K)


@pytest.mark.parametrize(
    "forward, why",
    [
        (_stops, "values of a tensor at test_convert_sums.py"),
        (_counts_groups, "values of a tensor at test_convert_sums.py"),
        (_draws, "random numbers"),
        (_counts, "changes attributes"),
        (_switches, "switches autocast or gradients"),
        (_makes, "tensor of its own"),
    ],
)
def test_what_cannot_be_read(forward, why):
    model, x = make(forward, fc=linear()), torch.randn(3, K)
    kind = type(model)
    report = convert(model, x, when="always")
    assert type(model) is kind and why in str(report) and "torch.compile" in str(report)


def _asks_for_kinds(s, x):
    pair = (x, x) if isinstance(x, torch.Tensor) else x
    if not isinstance(x, (list, nn.Parameter)):
        return pair[0] + s.fc(pair[1])
    return pair[0]


def test_a_tensor_is_a_tensor_while_it_is_read():
    model, x = make(_asks_for_kinds, fc=linear()), torch.randn(3, K)
    plain, asks = copy.deepcopy(model), isinstance
    report = convert(model, x, when="always").residual_adds
    assert report.found == len(report.fused) == calls(model, x) == 1
    assert_same(step(model, model, x), step(plain, plain, x))
    assert isinstance is asks


def test_what_a_forward_keeps_is_its_own():
    """Not what stood for it while the forward was read."""

    def forward(s, x):
        s.kept = s.kept * 0.5 + x
        s.before = x
        return x + s.fc(x)

    model, x = make(forward, fc=linear()), torch.ones(3, K)
    model.register_buffer("kept", torch.zeros(3, K))
    report = convert(model, x, when="always")
    assert "changes attributes" in str(report) and type(model.kept) is torch.Tensor
    plain = copy.deepcopy(model)
    assert_same([model(x), model.kept, model.before], [plain(x), plain.kept, plain.before])


def test_inputs_by_name_and_inputs_that_do_not_fit():
    model = make(lambda s, x, *, mask: (x := x * mask) + s.fc(x), fc=linear())
    x, mask = torch.randn(3, K), torch.ones(3, 1)
    for wrong, named, told in (
        ((x,), None, "((3, 8) torch.float32): TypeError: .*'mask'"),
        ((x[:, 1:], 1), {"mask": mask}, "((3, 7) torch.float32, int, mask=(3, 1) torch.float32): "),
        ((x[:, 1:],), {"mask": mask}, "mask=(3, 1) torch.float32): RuntimeError: "),
    ):
        told = told.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(
            ValueError, match=f"fusedres.convert: the model fails .*{told}"
        ) as raised:
            convert(model, *wrong, kwargs=named)
        assert type(raised.value.__cause__) in (TypeError, RuntimeError)
        assert not model._forward_hooks and model.training
    with pytest.raises(TypeError, match="kwargs must be a dict, got Tensor"):
        convert(model, x, kwargs=mask)
    with pytest.raises(TypeError, match=r"unknown argument 'mask'; .* into kwargs=\{'mask': ...\}"):
        convert(model, x, mask=mask)
    with pytest.raises(TypeError, match="unknown argument 'wehn'; did you mean 'when'"):
        convert(model, x, wehn="always")
    plain = copy.deepcopy(model)
    for given in ((x,), {"mask": mask}), ((), {"x": x, "mask": mask}):
        assert (
            len(convert(model, *given[0], kwargs=given[1], when="always").residual_adds.fused) == 1
        )
        assert_same([model(x, mask=mask)], [plain(x, mask=mask)])
        revert(model)


def test_what_cannot_be_read_is_called():
    """A child that draws random numbers or makes tensors does not keep its caller from being fused.

    One that decides by values does: what it gives is not known.
    """
    child = make(lambda s, x: x * torch.full((), 3.0))
    model = make(lambda s, x: x + s.fc(s.child(x)), fc=linear(), child=lambda: child)
    plain, x = copy.deepcopy(model), torch.randn(3, K)
    assert len(convert(model, x, when="always").residual_adds.fused) == 1
    for y in (x, -x):
        assert_same(step(model, model, y), step(plain, plain, y))


def test_only_what_is_measured_to_be_faster(monkeypatch):
    monkeypatch.setattr(gain, "_measure", lambda pair: (1.0, 2.0))
    monkeypatch.setattr(gain, "_MEASURED", {})
    model, x = net(), torch.randn(3, 6, K)
    report = convert(model, x)
    assert not report.residual_adds.fused and "no faster here" in str(report)
    assert not any(isinstance(m, Planned) for m in model.modules())


@pytest.mark.parametrize("name", BLOCKS)
def test_every_kind_can_be_timed(monkeypatch, name):
    monkeypatch.setattr(gain, "MARGIN", float("inf"))
    monkeypatch.setattr(gain, "ROUNDS", 1)
    block, x = BLOCKS[name][0](), torch.randn(3, 6, K)
    report = convert(block, x).residual_adds
    assert report.found == len(report.fused), report.left


def test_a_kind_that_cannot_be_timed_is_left(monkeypatch):
    def fails(pair):
        raise RuntimeError("no memory")

    monkeypatch.setattr(gain, "_measure", fails)
    monkeypatch.setattr(gain, "_MEASURED", {})
    report = convert(net(), torch.randn(3, 6, K))
    assert "to time it beside torch failed: no memory" in str(report)


def test_compile_export_and_trace_see_the_model():
    model, x = net(), torch.randn(3, 6, K)
    convert(model, x, when="always")
    expected = model(x)
    torch._dynamo.reset()
    assert_same([torch.compile(model, fullgraph=True, backend="aot_eager")(x)], [expected])
    assert_same([torch.export.export(model, (x,)).module()(x)], [expected])
    assert_same([torch.jit.trace(model, (x,))(x)], [expected])


def test_transforms_and_checkpointing():
    model, x = net(), torch.randn(5, 6, K)
    plain = copy.deepcopy(model)
    convert(model, x, when="always")

    def grads(m):
        parameters = dict(m.named_parameters())

        def loss(p, row):
            return torch.func.functional_call(m, p, (row[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    assert_same(list(grads(model).values()), list(grads(plain).values()))
    changed = {name: p * 0.5 for name, p in model.named_parameters()}
    functional = torch.func.functional_call
    assert_same([functional(model, changed, (x,))], [functional(plain, changed, (x,))])
    checkpointed = make(lambda s, x: checkpoint(s.net, x, use_reentrant=False), net=lambda: model)
    assert_same(step(checkpointed, model, x), step(plain, plain, x))


def test_hooks_of_a_converted_module_are_called():
    model, x, seen = Block(), torch.randn(3, 6, K), []
    convert(model, x, when="always")
    model.register_forward_pre_hook(lambda _m, args: seen.append("before"))
    model.register_forward_hook(lambda _m, args, y: seen.append("after"))
    assert calls(model, x) == 1 and seen == ["before", "after"]
    model.fc1.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(x).sum().backward()
    assert seen[-1] == "backward"


def test_unknown_when():
    with pytest.raises(ValueError, match="known: faster, always"):
        convert(nn.Linear(2, 2), when="often")


def test_report_is_readable():
    model, x = (
        nn.Sequential(make(lambda s, x: x + s.fc2(s.fc1(x)).cos(), **MLP), Block()),
        torch.randn(3, 6, K),
    )
    text = str(convert(model, x, when="always")).splitlines()
    assert text[0] == "fusedres.convert: 1 of 2 residual adds fused"
    assert text[1].split(maxsplit=2) == ["left", "0", "its branch ends in 'cos'"]
    assert fusedres.convert(Block()).residual_adds.found == 0
