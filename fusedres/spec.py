"""The order grammar: which stages a residual layer has, and in which order.

This file is the single list of stages, orders, norms, activations, gates and shortcuts. Everything
else, in Python, Triton and C++, is derived from it or tested against it.

A ``Spec`` is one layer's recipe without its tensors. ``str(spec)``, a line of text, is what
every backend reads (the ``recipe`` argument of the registered ops), and ``Spec.parse`` as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

STAGES = ("norm", "act", "linear", "gate", "dropout", "droppath", "add")

ORDERS = {
    "note": "linear-norm-act-add",
    "resnet-v1": "linear-norm-add-act",
    "preact": "norm-act-linear-add",
    "prenorm": "norm-linear-act-add",
    "postnorm": "linear-act-add-norm",
    "bert-output": "linear-dropout-add-norm",
    "branch-norm": "linear-act-norm-add",
}

Norm = Literal["layer", "rms", "batch"]
NORMS = ("layer", "rms", "batch")

ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "relu2",
    "relu6",
    "elu",
    "selu",
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
    "sin",
    "softsign",
)

REGISTERED: dict[str, Any] = {}  # a user's own activations, see activations/

Gate = Literal["scalar", "channel"]
GATES = ("scalar", "channel")

Shortcut = Literal["identity", "linear", "pad"]
SHORTCUTS = ("identity", "linear", "pad")


def one_of(what: str, value: object, known: tuple[str, ...] | dict[str, str]) -> str:
    """`value` if it is one of `known`, or an activation that a user registered; else a ValueError
    that lists them.
    """
    own, hint = {}, ""
    if what == "activation":
        own = REGISTERED
        if isinstance(value, str):
            hint = f"; for one of your own, call register_activation({value!r}, ...)"
    if isinstance(value, str) and (value in known or value in own):
        return value
    names = (*known, *own)
    none = ", None" if what in ("norm", "activation", "gate") else ""
    came = repr(value) if isinstance(value, (str, int, float)) else f"{_called(value)}, not a name"
    listed = f"{meant(value, names)}known: {', '.join(names)}{none}"
    raise ValueError(f"fusedres: unknown {what} {came}; {listed}{hint}")


def _called(value: object) -> str:
    """A class or function by its name, any other object by its class's."""
    return str(getattr(value, "__name__", type(value).__name__))


_ELSEWHERE = {"swish": "silu", "gpu": "cuda", "float32": "fp32", "float16": "fp16"}


def meant(value: object, names: tuple[str, ...]) -> str:
    """A question, where one of `names` is near: nn.LayerNorm is near "layer", F.gelu "gelu"."""
    word = value if isinstance(value, str) else _called(value)
    word = word.lower().removesuffix("1d").removesuffix("norm").strip("_- ")
    near = get_close_matches(_ELSEWHERE.get(word, word), names, 1)
    return f"did you mean {near[0]!r}? " if near else ""


@dataclass(frozen=True)
class Spec:
    """One layer's recipe. `stages` holds only stages that do something, in order of action."""

    stages: tuple[str, ...]
    norm: str | None = None
    activation: str | None = None
    gate: str | None = None
    eps: float = 1e-5
    dropout: float = 0.0
    drop_path: float = 0.0
    residual_scale: float = 1.0
    batch_stats: bool = False  # batch norm by the statistics of this very batch, as in training
    x_dtype: str | None = None  # these three where they are not weight's, which is the product's
    residual_dtype: str | None = None
    y_dtype: str | None = None

    # derived, plain attributes so that torch.compile can read them
    prologue: tuple[str, ...] = field(init=False, compare=False, repr=False)  # before `linear`
    epilogue: tuple[str, ...] = field(init=False, compare=False, repr=False)  # after `linear`
    adds: bool = field(init=False, compare=False, repr=False)
    random: bool = field(init=False, compare=False, repr=False)  # needs a seed
    saves_z: bool = field(init=False, compare=False, repr=False)  # backward needs z
    saves_residual: bool = field(init=False, compare=False, repr=False)  # and the shortcut
    casts: bool = field(init=False, compare=False, repr=False)  # x to weight's dtype, by itself
    dtypes: tuple[str, ...] = field(init=False, compare=False, repr=False)  # but weight's
    text: str = field(init=False, compare=False, repr=False)  # one line that says it all

    def __post_init__(self) -> None:
        linear = self.stages.index("linear")
        self._derive("prologue", self.stages[:linear])
        self._derive("epilogue", self.stages[linear + 1 :])
        self._derive("adds", "add" in self.stages)
        self._derive("random", "dropout" in self.stages or "droppath" in self.stages)
        # what `add`, `dropout` and `droppath` act on, their backward need not know
        after_add = self.stages[self.stages.index("add") + 1 :] if self.adds else ()
        saves_residual = any(stage in _NEEDS_INPUT or stage == "linear" for stage in after_add)
        self._derive("saves_z", any(stage in _NEEDS_INPUT for stage in self.epilogue))
        self._derive("saves_residual", saves_residual)
        self._derive("casts", self.x_dtype is not None and not self.prologue)
        dtypes = (self.x_dtype, self.residual_dtype, self.y_dtype)
        self._derive("dtypes", tuple(name for name in dtypes if name is not None))
        words = [f"{name}={_WRITE.get(name, str)(getattr(self, name))}" for name in _SETTINGS]
        words = [
            word
            for word, name in zip(words, _SETTINGS, strict=True)
            if getattr(self, name) != _DEFAULTS[name]
        ]
        self._derive("text", " ".join(("-".join(self.stages), *words)))

    def _derive(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def width(self, stage: str, in_features: int, out_features: int) -> int:
        """How many features the tensor has where `stage` acts."""
        return in_features if stage in self.prologue else out_features

    def with_batch_stats(self, batch_stats: bool) -> Spec:
        """This recipe with batch norm by this batch's statistics, or by the running ones."""
        return self if batch_stats == self.batch_stats else replace(self, batch_stats=batch_stats)

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Spec:
        """The inverse of ``str(spec)``."""
        stages, *words = text.split(" ")
        settings = dict(word.split("=", 1) for word in words)
        if "activation" in settings:  # another process may have registered it, not this one
            one_of("activation", settings["activation"], ACTIVATIONS)
        return Spec(
            tuple(stages.split("-")), **{k: _READ.get(k, float)(v) for k, v in settings.items()}
        )


_NEEDS_INPUT = ("norm", "act", "gate")
_SETTINGS = tuple(f.name for f in fields(Spec) if f.init and f.name != "stages")
_DEFAULTS = {f.name: f.default for f in fields(Spec)}
_WRITE: dict[str, Any] = {"batch_stats": int}
_READ: dict[str, Any] = {
    "norm": str,
    "activation": str,
    "gate": str,
    "x_dtype": str,
    "residual_dtype": str,
    "y_dtype": str,
    "batch_stats": lambda v: v == "1",
}


def spec_from(*settings: Any, **more: Any) -> Spec:
    """make_spec, which is cached; what has no hash, a list say, it refuses by name all the same."""
    try:
        return make_spec(*settings, **more)
    except TypeError:
        return make_spec.__wrapped__(*settings, **more)


def unknown_stage(stage: str, order: str, aliases: dict[str, str]) -> ValueError:
    near = meant(stage, STAGES if "-" in order else (*aliases, *STAGES))
    bare = order.lower().replace("-", "").replace("_", "")
    near = next((f"did you mean {a!r}? " for a in aliases if a.replace("-", "") == bare), near)
    return ValueError(
        f"fusedres: unknown stage {stage!r} in order {order!r}; {near}stages: "
        f"{', '.join(STAGES)}; well-known orders: {', '.join(aliases)}"
    )


def parse_order(order: str) -> tuple[str, ...]:
    """The stages of an alias or of a string of stages joined by "-"; nonsense is a ValueError."""
    if not isinstance(order, str):
        raise ValueError(
            f"fusedres: order must be a string such as 'linear-norm-act-add' or an alias such as "
            f"'preact', got {order!r}"
        )
    stages = tuple(ORDERS.get(order, order).split("-"))
    for stage in stages:
        if stage not in STAGES:
            raise unknown_stage(stage, order, ORDERS)
        if stages.count(stage) > 1:
            raise ValueError(f"fusedres: stage {stage!r} stands more than once in order {order!r}")
    if "linear" not in stages:
        raise ValueError(
            f"fusedres: order {order!r} has no 'linear' stage; a layer needs exactly one"
        )
    return stages


def _probability(what: str, p: float) -> float:
    if not isinstance(p, Real) or not 0.0 <= p <= 1.0:
        raise ValueError(f"fusedres: {what} must be a probability between 0 and 1, got {p!r}")
    return float(p)


def _number(what: str, value: float, least: float | None = None) -> float:
    ok = isinstance(value, Real) and value == value and abs(value) != float("inf")
    if not ok or (least is not None and value < least):
        bound = "" if least is None else f" >= {least:g}"
        raise ValueError(f"fusedres: {what} must be a finite number{bound}, got {value!r}")
    return float(value)


@lru_cache(maxsize=4096)
def make_spec(
    order: str = "note",
    norm: str | None = "layer",
    activation: str | None = "relu",
    gate: str | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    residual_scale: float = 1.0,
    training: bool = False,
) -> Spec:
    """Checks every setting and drops stages that are off.

    `gate`, `dropout` and `drop_path` that are on but have no stage in `order` get their usual
    place: in this order straight before `add` (at the end where there is no `add`). `norm` and
    `activation` act only where the order has a stage for them: `bert-output`, for one, has no
    activation whatever `activation` says. Without `training`, dropout and drop-path are off and
    batch norm uses its running statistics.
    """
    stages = list(parse_order(order))
    if norm is not None:
        one_of("norm", norm, NORMS)
    if activation is not None:
        one_of("activation", activation, ACTIVATIONS)
    if gate is not None:
        one_of("gate", gate, GATES)
    on = {
        "norm": norm is not None,
        "act": activation is not None,
        "gate": gate is not None,
        "dropout": _probability("dropout", dropout) > 0 and training,
        "droppath": _probability("drop_path", drop_path) > 0 and training,
    }
    for stage in ("gate", "dropout", "droppath"):
        if on[stage] and stage not in stages:
            stages.insert(stages.index("add") if "add" in stages else len(stages), stage)
    stages = [stage for stage in stages if on.get(stage, True)]
    return Spec(
        stages=tuple(stages),
        norm=norm if "norm" in stages else None,
        activation=activation if "act" in stages else None,
        gate=gate,
        eps=_number("eps", eps, 0.0) if "norm" in stages else 1e-5,
        dropout=float(dropout) if on["dropout"] else 0.0,
        drop_path=float(drop_path) if on["droppath"] else 0.0,
        residual_scale=_number("residual_scale", residual_scale) if "add" in stages else 1.0,
        batch_stats=norm == "batch" and "norm" in stages and bool(training),
    )
