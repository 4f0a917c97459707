"""The order grammar: what parses, what it means, and what is refused."""

from itertools import permutations

import pytest

from fusedres.spec import (
    ACTIVATIONS,
    GATES,
    NORMS,
    ORDERS,
    SHORTCUTS,
    STAGES,
    Spec,
    make_spec,
    parse_order,
)

ALL_ON = {
    "norm": "rms",
    "activation": "silu",
    "gate": "channel",
    "dropout": 0.1,
    "drop_path": 0.2,
    "training": True,
}
CORE = ("norm", "act", "linear", "add")


def stages(order, **settings):
    return "-".join(make_spec(order, **settings).stages)


def test_the_names_are_those_of_the_design():
    assert ORDERS == {
        "note": "linear-norm-act-add",
        "resnet-v1": "linear-norm-add-act",
        "preact": "norm-act-linear-add",
        "prenorm": "norm-linear-act-add",
        "postnorm": "linear-act-add-norm",
        "bert-output": "linear-dropout-add-norm",
        "branch-norm": "linear-act-norm-add",
    }
    assert {"norm", "act", "linear", "gate", "dropout", "droppath", "add"} == set(STAGES)
    assert set(NORMS) == {"layer", "rms", "batch"}
    assert set(GATES) == {"scalar", "channel"} and set(SHORTCUTS) == {"identity", "linear", "pad"}
    smooth = {
        "elu",
        "gelu",
        "gelu_tanh",
        "silu",
        "mish",
        "softplus",
        "sigmoid",
        "tanh",
        "sin",
        "softsign",
    }
    kinked = {"relu", "leaky_relu", "relu2", "relu6", "selu", "hardswish"}
    assert smooth | kinked <= set(ACTIVATIONS)


@pytest.mark.parametrize("alias", ORDERS)
def test_an_alias_is_its_string(alias):
    assert parse_order(alias) == tuple(ORDERS[alias].split("-")) == parse_order(ORDERS[alias])
    settings = {
        **ALL_ON,
        "gate": None,
        "drop_path": 0.0,
        "dropout": 0.1 if alias == "bert-output" else 0.0,
    }
    assert make_spec(alias, **settings) == make_spec(ORDERS[alias], **settings)
    assert make_spec(alias, **settings).stages == tuple(ORDERS[alias].split("-"))


@pytest.mark.parametrize("order", list(permutations(CORE)), ids="-".join)
def test_prologue_and_epilogue_of_every_permutation(order):
    spec = make_spec("-".join(order), "layer", "gelu")
    assert spec.stages == order
    assert (*spec.prologue, "linear", *spec.epilogue) == order
    assert "linear" not in spec.prologue and "linear" not in spec.epilogue
    for stage in order:
        expected = 3 if order.index(stage) < order.index("linear") else 5
        assert spec.width(stage, 3, 5) == (5 if stage == "linear" else expected)


def test_every_permutation_of_all_seven_stages_keeps_its_order_and_round_trips():
    for order in permutations(STAGES):
        spec = make_spec("-".join(order), **ALL_ON)
        assert spec.stages == order
        assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "order", ["linear", "linear-act", "norm-linear", "act-linear-norm", "linear-norm-act"]
)
def test_a_layer_without_add_is_a_plain_fused_linear(order):
    spec = make_spec(order, residual_scale=2.0)
    assert "-".join(spec.stages) == order and not spec.adds
    assert spec.residual_scale == 1.0, "a scale on nothing"


def test_stages_that_are_off_are_left_out():
    assert stages("note", norm=None) == "linear-act-add"
    assert stages("note", activation=None) == "linear-norm-add"
    assert stages("note", norm=None, activation=None) == "linear-add"
    everything = "norm-act-linear-gate-dropout-droppath-add"
    assert stages(everything) == "norm-act-linear-add"
    assert stages(everything, gate="scalar") == "norm-act-linear-gate-add"
    assert stages(everything, **{**ALL_ON, "training": False}) == "norm-act-linear-gate-add"


def test_norm_and_activation_act_only_where_the_order_has_them():
    spec = make_spec("bert-output", "layer", "relu")
    assert spec.stages == ("linear", "add", "norm") and spec.activation is None
    spec = make_spec("linear-act-add", "batch", "relu", training=True)
    assert spec.norm is None and not spec.batch_stats


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("note", "linear-norm-act-gate-dropout-droppath-add"),
        ("resnet-v1", "linear-norm-gate-dropout-droppath-add-act"),
        ("preact", "norm-act-linear-gate-dropout-droppath-add"),
        ("postnorm", "linear-act-gate-dropout-droppath-add-norm"),
        ("bert-output", "linear-dropout-gate-droppath-add-norm"),
        ("linear-act", "linear-act-gate-dropout-droppath"),
        ("gate-linear-add", "gate-linear-dropout-droppath-add"),
        ("droppath-linear-act-add", "droppath-linear-act-gate-dropout-add"),
    ],
)
def test_usual_place_of_gate_dropout_and_droppath(order, expected):
    assert stages(order, **ALL_ON) == expected


def test_each_usual_place_alone():
    assert stages("note", gate="channel") == "linear-norm-act-gate-add"
    assert stages("note", dropout=0.5, training=True) == "linear-norm-act-dropout-add"
    assert stages("note", drop_path=0.5, training=True) == "linear-norm-act-droppath-add"


def test_training_decides_about_masks_and_batch_statistics():
    settings = {"norm": "batch", "activation": "relu", "dropout": 0.1, "drop_path": 0.2}
    train, evaluate = (make_spec("note", training=on, **settings) for on in (True, False))
    assert train.batch_stats and train.random and (train.dropout, train.drop_path) == (0.1, 0.2)
    assert not evaluate.batch_stats and not evaluate.random
    assert (evaluate.dropout, evaluate.drop_path) == (0.0, 0.0)
    assert (
        evaluate.with_batch_stats(True).batch_stats
        and not train.with_batch_stats(False).batch_stats
    )
    assert not make_spec("note", "layer", training=True).batch_stats


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [False, True])
def test_text_round_trips_every_setting(order, training):
    for norm in (None, *NORMS):
        for activation in (None, *ACTIVATIONS):
            spec = make_spec(order, norm, activation, None, 1e-12, 0.0, 0.0, 1 / 3, training)
            assert Spec.parse(str(spec)) == spec
    for gate in (None, *GATES):
        spec = make_spec(order, "batch", "relu", gate, 0.1, 1 / 7, 0.3, -2.5e-7, training)
        back = Spec.parse(str(spec))
        assert back == spec
        assert (back.dropout, back.residual_scale) == (spec.dropout, -2.5e-7)


def test_text_is_one_readable_line():
    assert str(make_spec()) == "linear-norm-act-add norm=layer activation=relu"
    text = str(make_spec("preact", "batch", "silu", eps=1e-3, residual_scale=0.5, training=True))
    assert text.split() == [
        "norm-act-linear-add",
        "norm=batch",
        "activation=silu",
        "eps=0.001",
        "residual_scale=0.5",
        "batch_stats=1",
    ]


def test_a_spec_is_frozen_and_hashable():
    spec = make_spec()
    with pytest.raises(AttributeError):
        spec.norm = "rms"
    assert {spec: 1}[make_spec()] == 1


def test_what_backward_needs():
    """z where a later stage needs its input; the residual only where one acts on the sum."""

    def needs(order, norm="layer", activation="relu", **settings):
        spec = make_spec(order, norm, activation, training=True, **settings)
        return spec.saves_z, spec.saves_residual

    assert needs("note") == (True, False)
    assert needs("note", norm=None, activation=None, dropout=0.5) == (False, False)
    assert needs("preact") == (False, False)
    assert needs("preact", gate="scalar") == (True, False)
    assert needs("resnet-v1") == needs("postnorm") == (True, True)
    assert needs("bert-output", dropout=0.5) == (True, True)
    assert needs("linear-add-dropout", dropout=0.5) == (False, False)
    assert needs("linear-act") == (True, False)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("linear-linear-add", ["'linear'", "more than once", "'linear-linear-add'"]),
        ("norm-act-add", ["no 'linear'", "'norm-act-add'"]),
        ("", ["unknown stage ''", "norm, act, linear", "resnet-v1"]),
        ("linear--add", ["unknown stage ''"]),
        ("-linear", ["unknown stage ''"]),
        ("linear-relu-add", ["unknown stage 'relu'", "act", "droppath"]),
        ("Linear-add", ["unknown stage 'Linear'", "linear"]),
        ("linear add", ["unknown stage 'linear add'"]),
        ("pre-norm", ["unknown stage 'pre'", "did you mean 'prenorm'?"]),
        ("Resnet_V1", ["did you mean 'resnet-v1'?"]),
        ("linear-norm-norm", ["'norm'", "more than once"]),
        (None, ["must be a string", "None"]),
        (("linear", "add"), ["must be a string", "('linear', 'add')"]),
    ],
)
def test_nonsense_orders_are_refused(order, says):
    with pytest.raises(ValueError) as error:
        parse_order(order)
    for words in says:
        assert words in str(error.value), str(error.value)
    with pytest.raises((ValueError, TypeError)):
        make_spec(order)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm": "Layer"}, ["norm 'Layer'", "layer, rms, batch"]),
        ({"norm": True}, ["norm True", "layer, rms, batch, None"]),
        ({"activation": "swish"}, ["activation 'swish'", "silu"]),
        ({"activation": 3}, ["activation 3", "relu"]),
        ({"gate": "vector"}, ["gate 'vector'", "scalar, channel, None"]),
        ({"dropout": 1.5}, ["dropout", "between 0 and 1", "1.5"]),
        ({"dropout": float("nan")}, ["dropout", "between 0 and 1", "nan"]),
        ({"drop_path": -0.1}, ["drop_path", "between 0 and 1", "-0.1"]),
        ({"eps": -1e-5}, ["eps", ">= 0", "-1e-05"]),
        ({"eps": "small"}, ["eps", "number", "'small'"]),
        ({"residual_scale": float("inf")}, ["residual_scale", "finite", "inf"]),
        ({"residual_scale": float("nan")}, ["residual_scale", "finite", "nan"]),
    ],
)
def test_nonsense_settings_are_refused(settings, says):
    with pytest.raises(ValueError) as error:
        make_spec(**settings)
    for words in says:
        assert words in str(error.value), str(error.value)
