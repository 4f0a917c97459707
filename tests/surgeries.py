"""Surgery (NUMERICS 13): what PyTorch programs do to modules, done to the eager layer and to ours.

A `Case` is plain data and its repr is code: a model, one call's tensors and a few operations.
`check(case)` runs it through eager modules, through ours and through eager ones in float64 (the
truth), and raises a `Difference` where ours can be told from eager. `PYTHONPATH=. python
tests/surgeries.py 10000` tries that many cases and counts the differences by kind.
"""

import copy
import math
import pickle
import random
import sys
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from cases import KINKS
from fusedres import FusedResidual, FusedResidualMLP, Residual
from fusedres.mlp import MLP_ORDERS
from fusedres.spec import NORMS, ORDERS, STAGES, make_spec

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NORM_CLASSES = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}
ACT_CLASSES = {
    name: getattr(nn, torch_name)
    for name, torch_name in zip(
        ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh"),
        ("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Softplus", "Tanh"),
        strict=True,
    )
}
TARGETS = {"norm": (*NORM_CLASSES.values(),), "act": (*ACT_CLASSES.values(),), "linear": nn.Linear}
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "sliced": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
}
HOOKS = {  # name: (its registration, which argument it looks at, whether it changes that)
    "look forward": ("forward_hook", 2, False),
    "forward": ("forward_hook", 2, True),
    "pre": ("forward_pre_hook", 1, True),
    "look backward": ("full_backward_hook", 2, False),
    "backward": ("full_backward_hook", 1, True),
    "backward pre": ("full_backward_pre_hook", 1, True),
}


class Difference(AssertionError):
    """Ours can be told from eager; the first words say by what."""


@dataclass(frozen=True)
class Case:
    kind: str = "layer"  # or "stack", "mlp", "sequential": torch's modules, converted
    settings: dict = field(default_factory=dict)
    dtype: torch.dtype = F32
    K: int = 6
    N: int = 6
    lead: tuple = (5,)
    x: dict = field(default_factory=dict)  # dtype, values, layout, grad
    residual: dict | None = None  # features, dtype, grad
    training: bool = True
    warm: bool = False  # a call before the operations
    operations: tuple = ()  # (name, where, choice), ...

    @property
    def order(self):
        order = self.settings.get("order", "prenorm" if self.kind == "mlp" else "note")
        return (MLP_ORDERS if self.kind == "mlp" else ORDERS).get(order, order).split("-")


# --- models ---


def numbers(shape, draw):
    """Odd multiples of 1/32 up to 3: exact in every dtype, never on a kink."""
    generator = torch.Generator().manual_seed(draw)
    return (2 * torch.randint(-48, 48, tuple(shape), generator=generator) + 1).double() / 32


@torch.no_grad()
def fill(module):
    """Other parameters and statistics than a new module has; exact in every dtype."""
    for draw, (name, t) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if t.is_floating_point():
            shift = t.dim() < 2 and not name.endswith(("bias", "mean"))
            t.copy_(numbers(t.shape, draw) / (8 if t.dim() > 1 else 4) + shift)
    return module


class EagerResidualMLP(FusedResidualMLP):
    """FusedResidualMLP by torch's own modules."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.fc1.__class__ = self.fc2.__class__ = Residual

    def forward(self, x, residual=None):
        if self.adds and residual is None:
            residual = x if self.shortcut is None else self.shortcut(x)
        return self.fc2(self.fc1(x), residual)


def build(case, ours=False):
    K, N, s = case.K, case.N, {**case.settings, "dtype": case.dtype}
    where = {"dtype": case.dtype}
    if case.kind == "sequential":
        act, stages, width = ACT_CLASSES[s["activation"]], [], K
        for stage in case.order:
            if stage == "linear":
                stages.append(nn.Linear(K, width := N, bias=s["bias"], **where))
            elif stage == "norm":
                stages.append(NORM_CLASSES[s["norm"]](width, eps=1e-5, **where))
            else:
                stages.append(act())
        model = nn.Sequential(*stages, nn.Linear(N, N, **where), act())
    elif case.kind == "mlp":
        model = (FusedResidualMLP if ours else EagerResidualMLP)(K, 2 * K, N, **s)
    else:
        if s.get("shortcut") == "module":
            width = make_spec("-".join(case.order)).width("add", K, N)
            s["shortcut"] = nn.Sequential(nn.Linear(K, width, **where), nn.Tanh())
        layer = FusedResidual if ours else Residual
        model = layer(K, N, **s)
        if case.kind == "stack":
            model = nn.Sequential(model, layer(N, N, **s))
    fill(model).train(case.training)
    if ours and case.kind == "sequential":
        fusedres.convert(model)
    return model


def twice(t):
    if isinstance(t, tuple):
        return tuple(v if v is None else 2 * v for v in t)
    return 2 * t


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


class Wrapped(nn.Module):
    """Calls another module."""

    def __init__(self, module, by=nn.Module.__call__):
        super().__init__()
        self.module, self.by = module, by

    def forward(self, *args):
        return self.by(self.module, *args)


class Lora(nn.Linear):
    """A low-rank addition to another linear, as a subclass or a wrapper without `weight`."""

    def __init__(self, base, has_weight):
        nn.Module.__init__(self)
        self.base, w = base, base.weight
        self.in_features, self.out_features = base.in_features, base.out_features
        if has_weight:
            self.weight, self.bias = base.weight, base.bias
        self.A = nn.Parameter(w.new_empty(2, base.in_features))
        self.B = nn.Parameter(w.new_empty(base.out_features, 2))
        fill(self)

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


class SameLinear(nn.Linear):
    pass


class OtherLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Float32Norm(nn.LayerNorm):
    """As models in half precision have it."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, F32)
        w, b = self.weight.to(wide), self.bias.to(wide)
        return nn.functional.layer_norm(x.to(wide), x.shape[-1:], w, b, self.eps).type_as(x)


NEW_NORMS = {
    **NORM_CLASSES,
    "rms of eps 0.5": lambda C, **where: nn.RMSNorm(C, 0.5, **where),
    "plain layer": lambda C, **where: nn.LayerNorm(C, elementwise_affine=False, **where),
    "layer without bias": lambda C, **where: nn.LayerNorm(C, bias=False, **where),
    "plain batch": lambda C, **where: nn.BatchNorm1d(C, affine=False, **where),
    "batch without statistics": lambda C, **w: nn.BatchNorm1d(C, track_running_stats=False, **w),
    "group": lambda C, **where: nn.GroupNorm(1, C, **where),
    "float32": Float32Norm,
}


# --- operations ---


class At(NamedTuple):
    """Where an operation acts: on an attribute of a module, or on the model of a run."""

    parent: Any
    name: str

    @property
    def thing(self):
        return getattr(self.parent, self.name)

    def put(self, thing):
        setattr(self.parent, self.name, thing)


OPERATIONS = {}


def on(target, *choices):
    """Makes a method (run, choice, at) an operation. `target`: "root" (the model or the call),
    "module", "child", "parameter", "norm", "linear" or "act".
    """

    def register(f):
        f.target, f.choices = target, choices
        OPERATIONS[f.__name__] = f
        return f

    return register


def places(model, target):
    """Where in a model an operation for `target` can be done."""
    if target == "root":
        return [""]
    if target == "parameter":
        return [name for name, _ in model.named_parameters()]
    kind = TARGETS.get(target, nn.Module)
    names = [name for name, m in model.named_modules() if isinstance(m, kind)]
    return [name for name in names if name or target == "module"]


class Operations:
    """The methods that `on` registers; the rest of a run is below."""

    @on("norm", 0.5, 1e-3)
    def eps(self, value, at):
        at.thing.eps = value

    @on("norm", None, 0.5, 0.0)
    def momentum(self, value, at):
        at.thing.momentum = value

    @on("norm", "track_running_stats", "running_mean", "num_batches_tracked")
    def statistics(self, choice, at):
        norm = at.thing
        if choice == "track_running_stats":
            norm.track_running_stats = False
        elif isinstance(norm, nn.BatchNorm1d):
            norm.num_batches_tracked = None
            if choice == "running_mean":
                norm.running_mean = norm.running_var = None

    @on(
        "act",
        *{"negative_slope": 0.25, "alpha": 0.5, "beta": 2.0, "threshold": 1.0}.items(),
        *{"approximate": "tanh", "inplace": True}.items(),
    )
    def activation(self, choice, at):
        if hasattr(at.thing, choice[0]):
            setattr(at.thing, *choice)

    @on("module", True, False)
    def mode(self, training, at):
        at.thing.train(training)

    # hooks

    def hook_of(self, choice):
        _, argument, changes = HOOKS[choice]

        def hook(module, *args):
            kind = (
                type(module)
                .__name__.replace("Fused", "")
                .replace("Converted", "")
                .replace("Eager", "")
            )
            value = args[argument - 1]
            tensors = value if isinstance(value, tuple) else (value,)
            told = [t if t is None else (t.dtype, *t.shape) for t in tensors]
            self.log.append((kind, choice, *told))
            return twice(value) if changes else None

        return hook

    @on("module", *HOOKS)
    def hook(self, choice, at):
        getattr(at.thing, f"register_{HOOKS[choice][0]}")(self.hook_of(choice))

    @on("root", *HOOKS)
    def global_hook(self, choice, _):
        register = getattr(global_hooks, f"register_module_{HOOKS[choice][0]}")
        self.exits.callback(register(self.hook_of(choice)).remove)

    @on("parameter", "before", "after")
    def tensor_hook(self, choice, at):
        if choice == "before":
            at.thing.register_hook(lambda g: 2 * g)
        else:
            at.thing.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))

    # parameters

    @on("parameter", False, True)
    def pruned(self, remove, at):
        mask = numbers(at.thing.shape, 7) > 0
        prune.custom_from_mask(*at, mask.to(at.thing.dtype))
        if remove:
            prune.remove(*at)

    @on("parameter", False, True)
    def parametrized(self, remove, at):
        parametrize.register_parametrization(*at, Twice())
        if remove:
            parametrize.remove_parametrizations(*at)

    @on("linear", "weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm")
    def reparametrized(self, choice, at):
        by = getattr(nn.utils if "old" in choice else parametrizations, choice.split(" ")[-1])
        for draw, (name, t) in enumerate(by(at.thing).named_buffers()):
            if name.endswith(("_u", "_v")):
                t.copy_(nn.functional.normalize(numbers(t.shape, draw), dim=0))

    @on("parameter", "tensor", "constant", "view")
    def hyper(self, choice, at):
        """A plain tensor instead of a parameter."""
        t = (2 * at.thing.detach()).requires_grad_(choice != "constant")
        delattr(*at)
        self.leaves[f"hyper {at.name}"] = t
        at.put(t.view(-1).view(t.shape) if choice == "view" else t)

    @on("parameter", "this", "all", "all but norms", "all but this")
    def frozen(self, choice, at):
        for name, p in self.model.named_parameters():
            this = p is at.thing
            kept = {"this": not this, "all but this": this, "all but norms": "norm" in name}
            if not kept.get(choice, False):
                p.requires_grad_(False)

    @on("root", 0, 1)
    def tied(self, which, _):
        """The weight of one linear layer is another's, too."""
        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if len(linears) > 1:
            linears[which].weight = linears[1 - which].weight

    @on("module", F32, BF16, F16, F64)
    def cast(self, dtype, at):
        self.rounded(at.thing, dtype)
        if at.parent is self:
            for name in ("x", "residual"):
                t = getattr(self, name)
                if t is not None:
                    t = self.rounded(t.detach(), dtype).requires_grad_(t.requires_grad)
                    setattr(self, name, t)

    @on("parameter", BF16, F32)
    def cast_parameter(self, dtype, at):
        at.thing.data = self.rounded(at.thing.data, dtype)

    @on("parameter", False, True)
    def assigned(self, missing, at):
        """Parameters on meta, loaded by assignment, maybe without this one."""
        state = {key: t.clone() for key, t in self.model.state_dict().items()}
        if missing:
            paths = {m: path for path, m in self.model.named_modules()}
            state.pop(f"{paths[at.parent]}.{at.name}".lstrip("."), None)
        self.model.to("meta").load_state_dict(state, strict=False, assign=True)

    # children

    @on("linear", False, True)
    def lora(self, has_weight, at):
        at.put(Lora(at.thing, has_weight))

    @on("linear", "new", "without bias", "subclass", "other forward")
    def new_linear(self, choice, at):
        kind = {"subclass": SameLinear, "other forward": OtherLinear}.get(choice, nn.Linear)
        N, K = at.thing.weight.shape
        at.put(fill(kind(K, N, choice != "without bias", dtype=at.thing.weight.dtype)))

    @on("norm", *NEW_NORMS)
    def new_norm(self, choice, at):
        w = getattr(at.thing, "weight", None)
        if w is not None:
            at.put(fill(NEW_NORMS[choice](len(w), dtype=w.dtype)))

    @on("child", "identity", "none", "wrapped", "forward")
    def replaced(self, choice, at):
        if choice == "forward":
            forward = at.thing.forward
            at.thing.forward = lambda *args: -forward(*args)
        else:
            at.put({"identity": nn.Identity(), "wrapped": Wrapped(at.thing)}.get(choice))

    # the whole model

    @on("root", "deepcopy", "pickle", "load", "swap", "overwrite")
    def copied(self, choice, at):
        if choice in ("deepcopy", "pickle"):
            by = copy.deepcopy if choice == "deepcopy" else lambda m: pickle.loads(pickle.dumps(m))
            return at.put(by(self.model))
        state = {key: t.clone() for key, t in self.model.state_dict().items()}
        if choice != "load":
            way = getattr(torch.__future__, f"set_{choice}_module_params_on_conversion")
            way(True)
            self.exits.callback(way, False)
            self.rounded(self.model, F64)
            self.rounded(self.model, self.case.dtype)
        return self.model.load_state_dict(state)

    @on("root", "convert", "revert")
    def converted(self, choice, _):
        if self.ours:
            getattr(fusedres, choice)(self.model)

    # the call

    def within(self, manager):
        call = self.call

        def inside(*args):
            with manager():
                return call(*args)

        self.call = inside

    @on("root", True, False)
    def checkpoint(self, reentrant, _):
        call = self.call
        self.call = lambda *args: recompute(call, *args, use_reentrant=reentrant)

    @on("root", (BF16, {}), (F16, {}), (BF16, {"enabled": False}), (BF16, {"cache_enabled": False}))
    def autocast(self, choice, _):
        dtype, how = choice
        if how.get("enabled", True):
            self.dtypes.add(dtype)
        self.within(lambda: nullcontext() if self.truth else torch.autocast("cpu", dtype, **how))

    @on("root", "no_grad", "inference_mode")
    def grad_mode(self, name, _):
        self.within(getattr(torch, name))

    @on("root", F64, BF16, "meta")
    def defaults(self, choice, _):
        """Another default dtype or device."""

        def manager():
            if isinstance(choice, str):
                return torch.device(choice)
            exits = ExitStack()
            exits.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(choice)
            return exits

        self.within(manager)

    @on("root", None, 1)
    def functional(self, most, _):
        """With other tensors for its parameters."""
        call = self.call

        def replaced(model, *args):
            new = {f"module.{name}": 2 * p for name, p in [*model.named_parameters()][:most]}
            return functional_call(Wrapped(model, call), new, args)

        self.call = replaced

    @on("root", "error", "different")
    def vmap(self, randomness, _):
        call = self.call

        def mapped(model, x, r):
            if len(x) == 0:  # torch cannot reshape these
                return call(model, x, r)
            dims = 0, None if r is None else 0
            return torch.vmap(lambda x, r: call(model, x, r), dims, randomness=randomness)(x, r)

        self.call = mapped

    @on("root", "x", "residual", "y")
    def edited(self, what, _):
        """In place, between forward and backward."""
        call = self.call

        def edit(model, x, r):
            y = call(model, x, r)
            if what == "y":
                return y.mul_(2)
            with torch.no_grad():
                if (x if what == "x" else r) is not None:
                    (x if what == "x" else r).mul_(2)
            return y

        self.call = edit

    @on("root", "bytes", "flops")
    def measured(self, what, _):
        """What is kept for backward, and what is counted as work."""
        call, kept = self.call, {}

        def pack(t):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = min(t.nbytes, storage.nbytes())
            return t, t._version

        def unpack(saved):
            if saved[0]._version != saved[1]:  # torch asks only where there are no such hooks
                raise RuntimeError("inplace edit of what was saved")
            return saved[0]

        def keep(model, x, r):
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = call(model, x, r)
            alive = {
                t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
            }
            self.kept = sum(size for at, size in kept.items() if at not in alive)
            return y

        def count(*args):
            with FlopCounterMode(display=False) as counter:
                y = call(*args)
            self.log.append(f"{counter.get_total_flops()} flops")
            return y

        if what == "bytes":
            self.call = keep
        elif not any(name == "checkpoint" for name, *_ in self.case.operations):
            self.call = count  # its global hooks would be gone when the forward is run again

    @on("root", "penalty", "twice", "accumulate", "train", "func.grad", "func.jvp")
    def differentiated(self, how, _):
        """Other ways to gradients than one backward."""

        def penalty():
            y = self.forward()
            (dx,) = torch.autograd.grad(y, self.x, self.cotangent(y), create_graph=True)
            (y.square().sum() + dx.square().sum()).backward()
            return y

        def train():
            y = self.backward()
            torch.optim.SGD(self.model.parameters(), lr=2**-6).step()
            return y

        def f(params, x):
            args = (x,) if self.residual is None else (x, self.residual)
            y = functional_call(self.model, params, args)
            return (y * self.cotangent(y)).sum(), y

        def transform():
            named = self.model.named_parameters()
            params = {name: p.detach() for name, p in named if p.requires_grad}
            if how == "func.jvp":
                tangents = params, numbers(self.x.shape, 103).to(self.x.dtype)
                *_, dy, y = torch.func.jvp(f, (params, self.x), tangents, has_aux=True)
                self.out["jvp"] = dy
                return y
            (dparams, self.out["dx"]), y = torch.func.grad(f, (0, 1), has_aux=True)(params, self.x)
            self.out.update({f"d{name}": g for name, g in dparams.items()})
            return y

        self.steps = 2 if how in ("accumulate", "train") else 1
        ways = {"penalty": penalty, "train": train, "accumulate": self.backward}
        ways["twice"] = lambda: self.backward(times=2)
        self.step = ways.get(how, transform)


# --- a run ---


class Run(Operations):
    """One of the three, and what comes out; the truth may be `nudge` of its operands away."""

    def __init__(self, case, ours=False, truth=False, nudge=0.0):
        self.case, self.ours, self.truth, self.nudge = case, ours, truth, nudge
        self.model = build(case, ours)
        if truth:
            self.model.double()
            for draw, p in enumerate(self.model.parameters()):
                p.data *= 1 + nudge * numbers(p.shape, draw).sign()
        r = case.residual
        self.x = self.leaf((*case.lead, case.K), case.x, 100)
        self.residual = r and self.leaf((*case.lead, r["features"]), r, 101)
        self.call = lambda model, x, r: model(x) if r is None else model(x, r)
        self.steps, self.step = 1, self.backward
        self.log, self.kept, self.dtypes = [], 0, set()
        self.out, self.leaves, self.exits = {}, {}, ExitStack()

    def leaf(self, shape, how, draw):
        dtype, t = how.get("dtype") or self.case.dtype, numbers(shape, draw)
        large = {"mean": 10 * t + 2000, "huge": 1e20 * t}
        t = large.get(how.get("values"), t).to(dtype)
        if self.truth:
            nudge = math.copysign(min(abs(self.nudge), torch.finfo(dtype).eps), self.nudge)
            t = t.double() * (1 + nudge * numbers(shape, draw).sign())
        t = LAYOUTS[how.get("layout", "contiguous")](t)
        return t.requires_grad_(how.get("grad", True))

    def rounded(self, t, dtype):
        """A module or tensor in `dtype`; for the truth only rounded to it."""
        self.dtypes.add(dtype)
        return t.to(dtype).double() if self.truth else t.to(dtype)

    def forward(self):
        return self.call(self.model, self.x, self.residual)

    def backward(self, times=1):
        y = self.forward()
        self.log.append(f"y requires a gradient: {y.requires_grad}")
        for i in range(times if y.requires_grad else 0):
            y.backward(self.cotangent(y), retain_graph=i + 1 < times)
            if self.residual is not None and self.residual.grad is not None:
                self.residual.grad = self.residual.grad.clone()  # eager's may be x.grad's memory
        return y

    def cotangent(self, y):
        return numbers(y.shape, 102).to(y.dtype)

    def operate(self, name, where, choice):
        parent, _, last = where.rpartition(".")
        try:
            at = At(self.model.get_submodule(parent), last) if where else At(self, "model")
            at.thing  # noqa: B018
        except AttributeError:  # an operation before this one took it away
            return self.log.append(f"{where} is gone")
        return OPERATIONS[name](self, choice, at)

    def results(self):
        """Tensors by name, or the error that was raised."""
        try:
            with self.exits, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.case.warm:
                    torch.manual_seed(0)
                    self.backward()
                    self.model.zero_grad()
                    self.x.grad = None
                    if self.residual is not None:
                        self.residual.grad = None
                for operation in self.case.operations:
                    self.operate(*operation)
                for i in range(self.steps):
                    torch.manual_seed(i)
                    y = self.step()
        except Exception as error:  # its frames hold contexts open, a checkpoint's for one
            error.__context__ = error.__cause__ = None
            return error.with_traceback(None)
        out = {"y": y, "x afterwards": self.x, **self.out, **dict(self.model.named_buffers())}
        leaves = {"x": self.x, "residual": self.residual, **self.leaves}
        for name, t in (leaves | dict(self.model.named_parameters())).items():
            if t is not None and t.grad is not None:
                out[f"d{name}"] = t.grad
        self.dtypes |= {t.dtype for t in (*out.values(), *self.model.parameters())}
        return {name: t.detach().clone() for name, t in out.items()}


class Kinks(TorchFunctionMode):
    """How near activations with a kink come to it, relative to their largest argument."""

    nearest = math.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for kink in {**KINKS, "elu": (0,)}.get(getattr(func, "__name__", ""), ()):
            h = args[0].detach()
            try:
                distance = ((h - kink).abs().min() / h.abs().max()).item() if h.numel() else 1.0
            except RuntimeError:  # inside a transform: nobody knows
                distance = 0.0
            self.nearest = min(self.nearest, distance)
        return func(*args, **(kwargs or {}))


# --- comparing ---

MAY_WORK = (  # what eager refuses and ours need not
    "inplace",  # an edit of what eager, not ours, has saved
    "mixed dtype (CPU)",  # parameters of a norm in another dtype than what it acts on,
    "expected scalar type",  # or than each other
    "INTERNAL ASSERT FAILED",  # torch's own mistake with these
    "Expected gradient function to be set",  # FlopCounterMode's
)


def check(case, ours=None):
    """Raises a Difference. `ours(case, True)` makes our run, or another one to check this check."""
    eager, fused = Run(case), (ours or Run)(case, True)
    expected, came = eager.results(), fused.results()
    if not isinstance(expected, Exception) and any(p.is_meta for p in eager.model.parameters()):
        return  # torch let it slip
    if isinstance(expected, Exception) or isinstance(came, Exception):
        return compare_errors(case, expected, came)
    if eager.log != fused.log:
        raise Difference(f"log: {fused.log}, eager {eager.log}")
    if came.keys() != expected.keys():
        raise Difference(f"tensors: {came.keys() ^ expected.keys()} on one side only")
    for name, t in expected.items():
        for what in ("dtype", "shape", "device"):
            a, b = getattr(came[name], what), getattr(t, what)
            if a != b:
                raise Difference(f"{what} of {name}: {a}, eager {b}")
    more = 64  # statistics of a row, a seed
    if counts_bytes(case, eager.dtypes) and fused.kept > eager.kept + more:
        raise Difference(f"bytes: {fused.kept} kept, eager {eager.kept}")
    with Kinks() as kinks:
        true = Run(case, truth=True).results()
    if isinstance(true, Exception):
        return compare_errors(case, true, came)
    rounding = max(torch.finfo(dtype).eps for dtype in eager.dtypes if dtype.is_floating_point)
    results = case, rounding, came, expected, true
    wrong = [name for name in true if compare(name, *results)]
    if wrong and kinks.nearest > 1000 * rounding:
        others = [Run(case, truth=True, nudge=by * rounding / 2).results() for by in (1, -1)]
        for error in (compare(name, *results, others) for name in wrong):
            if error:
                raise error


def counts_bytes(case, dtypes):
    """Whether no trick lets eager keep less: a result for its argument, a sum for its terms, a
    narrower copy.
    """
    plain = case.settings.get("activation", "relu") in ("gelu", "silu", "mish", "sin", None)
    one_dtype = sum(dtype.is_floating_point for dtype in dtypes) == 1
    add_last = "add" not in case.order[:-1]
    computed = not case.x.get("grad", True)  # a weight that is computed: ours keeps it even so
    before = case.order[: case.order.index("linear")]
    masked = before and not {"norm", "act", "gate"} & set(before)  # x, of which eager keeps a mask
    odd = "layout" in case.x or 0 in case.lead or computed or masked
    return plain and one_dtype and add_last and not odd


def compare_errors(case, expected, came):
    """Errors on both sides, of compatible kinds."""
    error, other = isinstance(expected, Exception), isinstance(came, Exception)
    done = [(name, choice) for name, _, choice in case.operations]
    # eager may have kept something made of x or the residual where ours kept them
    edited = ("edited", "x") in done or (("edited", "residual") in done and case.order[-1] != "add")
    if other and edited and "inplace" in str(came):
        return
    if error and any(words in str(expected) for words in MAY_WORK) and not other:
        return
    if not error and (("assigned", True) in done or "bias has dtype" in str(came)):
        return  # torch let a meta tensor slip, or added a bias of another dtype: some paths do
    compatible = isinstance(came, (type(expected), RuntimeError, ValueError, TypeError))
    if error and other and (compatible or "NoneType" in str(came)):
        return
    words = [repr(e)[:200] if isinstance(e, Exception) else "no error" for e in (came, expected)]
    raise Difference(f"error: {words[0]}, eager {words[1]}")


def compare(name, case, rounding, came, expected, true, others=()):
    """A Difference, unless as near to the truth as eager, with the same NaN and Inf.

    `others` are the truth of other operands that round to the same: eager may be lucky.
    """
    again = ("checkpoint", "", False) in case.operations
    if again and name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
        return None  # a recomputation updates eager's a second time, ours not: test_surgery_by_hand
    came, expected, true = came[name], expected[name], true[name]
    if not came.is_floating_point():
        same = torch.equal(came, expected)
        return None if same else Difference(f"value of {name}: {came}, eager {expected}")
    true = true.double()
    if case.x.get("values") == "huge":  # where a square overflows is eager's luck, too
        right = (came - true).abs() <= 1e-2 * true.abs()
        one = came.isfinite() ^ expected.isfinite()
        expected = torch.where(one & (right | ~came.isfinite()), came, expected)
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        a, b = what(came), what(expected)
        if not torch.equal(a, b):
            return Difference(f"{what.__name__} of {name}: {a.sum()}, eager {b.sum()}")
    finite = came.isfinite() & true.isfinite()
    if not finite.any():
        return None
    true, step = true[finite], torch.finfo(came.dtype).eps
    ours, eager = ((t[finite].double() - true).abs().max() for t in (came, expected))
    step, few = max(step, 1e-10 if came.dtype == F64 else 5e-6), true.numel() < 16
    if case.x.get("values") == "mean" and name[0] == "d" and case.settings.get("norm") == "batch":
        step *= 200  # a statistic's own rounding, at 200 sigma, times sums that cancel
    if few:  # eager may be lucky
        step = max(step, rounding)
    largest = true.abs().max()  # or sums of terms of about 1 that cancel
    spread = max(((other[name][finite] - true).abs().max() for other in others), default=0.0)
    times = 2 if largest > eager else 12  # of what cancels nothing but rounding is left
    if ours <= times * eager + 2 * spread + 2 * step * largest.clamp(min=4 if few else 0.25):
        return None
    told = f"{ours:.3g} from the truth, eager {eager:.3g}, largest {largest:.3g}"
    return Difference(f"value of {name}: {told}")


# --- drawing, by pick(sequence): one of its elements ---


def draw_settings(pick, kind, kinks):
    """Of a layer, a stack, an MLP or a Sequential; activations with a kink if `kinks`."""
    acts = ACT_CLASSES if kind == "sequential" else (*fusedres.ACTIVATIONS, None)
    others = [stage for stage in STAGES if stage != "linear" and pick((True, False))]
    stages = ["linear"]
    for stage in ("norm", "act") if kind == "sequential" else others:
        stages.insert(pick(range(len(stages) + 1)), stage)
    order = "-".join(stages)
    if kind == "mlp" or (kind != "sequential" and pick((True, False))):
        order = pick(tuple(MLP_ORDERS if kind == "mlp" else ORDERS))
    s = {
        "order": order,
        "norm": pick(NORMS if kind == "sequential" else (*NORMS, *NORMS, None)),
        "activation": pick([act for act in acts if kinks or act not in KINKS]),
        "bias": pick((True, False)),
    }
    if kind != "sequential":
        s["gate"] = pick((None, "scalar", "channel"))
        s["dropout"], s["drop_path"] = pick((0.0, 0.0, 0.4)), pick((0.0, 0.0, 0.4))
        s["residual_scale"] = pick((1.0, 1.0, -0.5))
    if kind == "layer" and "add" in Case(settings=s).order:
        s["shortcut"] = pick((None, None, "identity", "linear", "pad", "module"))
    return s


def draw_case(pick):
    kind = pick(("layer", "layer", "layer", "stack", "mlp", "sequential"))
    dtype, K = pick((F32, F32, F32, BF16, F16, F64)), pick(range(4, 17))
    N, kinks = pick((K, K, 7, 12)), dtype in (F32, F64) and pick((True, False, False))
    s = draw_settings(pick, kind, kinks)
    if s.get("shortcut") == "pad":
        N = max(K, N)
    lead = pick((*2 * ((5,), (7,), (12,), (2, 3)), (0,), (1,), ()))
    flags = {"training": pick((True, False)), "warm": pick((True, False))}
    case = Case(kind, s, dtype, K, N, lead, **flags)
    model, operations, often = build(case, False), [], 3 * ("autocast", "activation")
    where = {name: places(model, of.target) for name, of in OPERATIONS.items()}
    possible = tuple(name for name in (*OPERATIONS, *often) if where[name])
    for _ in range(pick((0, 1, 1, 2, 2, 3, 4))):
        name = pick(possible)
        operations.append((name, pick(where[name]), pick(OPERATIONS[name].choices)))
    mixed = any(name == "autocast" for name, *_ in operations)
    x, residual = {}, None
    for name, chance, values in (
        ("dtype", 2 if mixed else 20, (F32, BF16, F64)),
        ("values", 10, ("mean", "huge")),
        ("layout", 4, tuple(LAYOUTS)),
        ("grad", 5, (False,)),
    ):
        if pick(range(chance)) == 0:
            x[name] = pick(values)
    if x.get("values") == "huge" or not lead:
        x.pop("layout", None)
    if F16 in (dtype, x.get("dtype")):
        x.pop("values", None)
    if x.get("values") == "huge":  # others have squares or cubes inside, which overflow first
        s["activation"] = "gelu"
        operations = [done for done in operations if done[0] != "differentiated"]
    if "shortcut" in s and pick((True, False)):
        other = {"features": pick((K, N)), "dtype": pick((None, None, F32))}
        residual = {**other, "grad": pick((True, False))}
    return replace(case, x=x, residual=residual, operations=tuple(operations))


def difference(case):
    try:
        check(case)
    except Exception as error:
        return error if isinstance(error, Difference) else Difference(f"harness: {error!r}")
    return None


def smaller(case):
    """Cases with one thing less."""
    ops = case.operations
    yield from (replace(case, operations=ops[:i] + ops[i + 1 :]) for i in range(len(ops)))
    plain = Case()
    for name in ("warm", "x", "residual", "lead", "dtype", "training", "kind"):
        if getattr(case, name) != getattr(plain, name):
            yield replace(case, **{name: getattr(plain, name)})
    for name in ("x", "settings"):
        for key in getattr(case, name):
            less = {k: v for k, v in getattr(case, name).items() if k != key}
            yield replace(case, **{name: less})


def minimal(case, found):
    """A small case that is told from eager by the same first word."""
    word = str(found).split(":")[0]
    for less in smaller(case):
        error = difference(less)
        if word != "harness" and str(error).split(":")[0] == word:
            return minimal(less, error)
    return case, found


def main(examples, seed=0):
    """Counts differences by the operations and what is different, with a small case of each."""
    kinds, small, tried, pick = Counter(), {}, Counter(), random.Random(seed).choice
    for _ in range(examples):
        case = draw_case(pick)
        tried.update({name for name, *_ in case.operations})
        found = difference(case)
        if found is not None:
            case, error = minimal(case, found)
            done = " + ".join(f"{name} {choice}" for name, _, choice in case.operations)
            kind = f"{str(error).split(':')[0]} <- {done or 'nothing done'}"
            kinds[kind] += 1
            small.setdefault(kind, (case, error))
    for kind, count in kinds.most_common():
        case, error = small[kind]
        print(f"{count:5}  {kind}\n       {error}\n       {case}")
    print(f"{kinds.total()} of {examples} cases differ; operations:", dict(tried.most_common()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
