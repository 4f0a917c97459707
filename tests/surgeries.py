"""Surgery (NUMERICS 13): what PyTorch programs do to modules, done to the eager layer and to ours.

A `Case` is plain data and its repr is code: a model, one call's tensors and a few operations of
`OPERATIONS`. `check(case)` runs it three times, through eager modules, through ours and through
eager ones in float64 (the truth), and raises a `Difference` where ours can be told from eager.
`python tests/surgeries.py 10000` tries that many and counts the differences by their kind.
"""

import copy
import io
import math
import pickle
import random
import sys
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as hooks
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
NORM_TYPES = tuple(NORM_CLASSES.values())
ACT_CLASSES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2] if t.dim() > 1 else t,
    "sliced": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
}


class Difference(AssertionError):
    """Ours can be told from eager; the first word says by what."""


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
        given = residual is not None and residual.shape[-1] == self.out_features
        if self.adds and self.shortcut is not None and not (given and self._default_shortcut):
            residual = self.shortcut(x if residual is None else residual)
        elif self.adds and residual is None:
            residual = x
        return self.fc2(self.fc1(x), residual)


def build(case, ours):
    K, N, s = case.K, case.N, {**case.settings, "dtype": case.dtype}
    if case.kind == "sequential":
        norm, act, dtype = NORM_CLASSES[s["norm"]], ACT_CLASSES[s["activation"]], case.dtype
        stages, width = [], K
        for stage in s["order"].split("-"):
            if stage == "linear":
                stages.append(nn.Linear(K, width := N, bias=s["bias"], dtype=dtype))
            else:
                stages.append(norm(width, eps=1e-5, dtype=dtype) if stage == "norm" else act())
        model = nn.Sequential(*stages, nn.Linear(N, N, dtype=dtype), act())
    elif case.kind == "mlp":
        model = (FusedResidualMLP if ours else EagerResidualMLP)(K, 2 * K, N, **s)
    else:
        layer = FusedResidual if ours else Residual
        if s.get("shortcut") == "module":
            width = make_spec(s["order"]).width("add", K, N)
            s["shortcut"] = nn.Sequential(nn.Linear(K, width, dtype=case.dtype), nn.Tanh())
        model = layer(K, N, **s)
        if case.kind == "stack":
            model = nn.Sequential(model, layer(N, N, **s))
    fill(model).train(case.training)
    if ours and case.kind == "sequential":
        fusedres.convert(model)
    return model


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


class Run:
    """One of the three: what operations change, and what comes out."""

    def __init__(self, case, ours=False, truth=False, nudge=0.0):
        self.case, self.ours, self.truth, self.nudge = case, ours, truth, nudge
        self.model = build(case, ours)
        if truth:
            self.model.double()
            for draw, p in enumerate(self.model.parameters()):
                p.data *= 1 + nudge * numbers(p.shape, draw).sign()
        self.x = self.leaf((*case.lead, case.K), case.x, 100)
        r = case.residual
        self.residual = r and self.leaf((*case.lead, r["features"]), r, 101)
        self.call = lambda model, x, r: model(x) if r is None else model(x, r)
        self.steps, self.step = 1, self.backward
        self.log, self.kept, self.dtypes = [], None, set()
        self.out, self.leaves, self.exits = {}, {}, ExitStack()

    def leaf(self, shape, how, draw):
        dtype, values = how.get("dtype") or self.case.dtype, how.get("values", "normal")
        t = numbers(shape, draw)
        if values != "normal":
            large = {"mean": 10 * t + 2000, "huge": (1e4 if dtype == F16 else 1e20) * t}
            t = large[values]
        t = t.to(dtype)
        if self.truth:
            nudge = math.copysign(min(abs(self.nudge), torch.finfo(dtype).eps), self.nudge)
            t = t.double() * (1 + nudge * numbers(shape, draw).sign())
        t = LAYOUTS[how.get("layout", "contiguous")](t)
        return t.requires_grad_(how.get("grad", True))

    def forward(self):
        return self.call(self.model, self.x, self.residual)

    def backward(self):
        y = self.forward()
        self.log.append(f"y requires a gradient: {y.requires_grad}")
        if y.requires_grad:
            y.backward(self.cotangent(y))
        return y

    def cotangent(self, y):
        return numbers(y.shape, 102).to(y.dtype)

    def cast(self, t, dtype):
        """A module or tensor in `dtype`; for the truth only rounded to it."""
        self.dtypes.add(dtype)
        return t.to(dtype).double() if self.truth else t.to(dtype)

    def results(self):
        """This run's tensors by name, or the error it raised."""
        try:
            with self.exits, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.case.warm:
                    torch.manual_seed(0)
                    self.backward()
                    for t in (self.x, self.residual, *self.model.parameters()):
                        if t is not None:
                            t.grad = None
                for name, where, choice in self.case.operations:
                    self.operate(name, where, choice)
                for i in range(self.steps):
                    torch.manual_seed(i)
                    y = self.step()
        except Exception as error:  # its frames hold contexts open, a checkpoint's for one
            error.__context__ = error.__cause__ = None
            return error.with_traceback(None)
        out = {"y": y, "x afterwards": self.x, **self.out}
        leaves = {"x": self.x, "residual": self.residual, **self.leaves}
        for name, t in (*leaves.items(), *self.model.named_parameters()):
            if t is not None and t.grad is not None:
                out[f"d{name}"] = t.grad
        out |= dict(self.model.named_buffers())
        self.dtypes |= {t.dtype for t in (*out.values(), *self.model.parameters())}
        return {name: t.detach().clone() for name, t in out.items()}

    def operate(self, name, where, choice):
        operation, (parent, _, last) = OPERATIONS[name], where.rpartition(".")
        if operation.target == "root":
            return operation(self, choice)
        try:
            if operation.target == "module":
                return operation(self, self.model.get_submodule(where), choice)
            at = self.model.get_submodule(parent)
            getattr(at, last)
        except AttributeError:  # an operation before this one took it away
            return self.log.append(f"{where} is gone")
        return operation(self, at, last, choice)


OPERATIONS: dict[str, Any] = {}


def operation(target, *choices):
    """Registers f(run, [module | parent, name], choice); `target` says what it is done to."""

    def register(f):
        f.target, f.choices = target, choices
        OPERATIONS[f.__name__] = f
        return f

    return register


# --- settings ---


@operation("norm", 0.5, 1e-3)
def eps(run, parent, name, value):
    getattr(parent, name).eps = value


@operation("norm", None, 0.5, 0.0)
def momentum(run, parent, name, value):
    getattr(parent, name).momentum = value


@operation("norm", "track_running_stats", "no statistics", "training only")
def statistics(run, parent, name, choice):
    norm = getattr(parent, name)
    if choice == "track_running_stats":
        norm.track_running_stats = False
    elif isinstance(norm, nn.BatchNorm1d):
        norm.num_batches_tracked = None
        if choice == "no statistics":
            norm.running_mean = norm.running_var = None


@operation(
    "act",
    *{
        "negative_slope": 0.25,
        "alpha": 0.5,
        "beta": 2.0,
        "threshold": 1.0,
        "approximate": "tanh",
        "inplace": True,
    }.items(),
)
def activation(run, parent, name, choice):
    if hasattr(getattr(parent, name), choice[0]):
        setattr(getattr(parent, name), *choice)


@operation("module", True, False)
def mode(run, module, training):
    module.train(training)


# --- hooks ---


def _twice(value):
    many = isinstance(value, tuple)
    return tuple(v if v is None else 2 * v for v in value) if many else 2 * value


def _told(run, module, what, tensors):
    kind = type(module).__name__.replace("Fused", "").replace("Eager", "")
    tensors = tensors if isinstance(tensors, tuple) else (tensors,)
    run.log.append((kind, what, *(t if t is None else (t.dtype, tuple(t.shape)) for t in tensors)))


HOOKS = {  # name: (its registration, which argument is looked at, whether it is changed)
    "look forward": ("forward_hook", 2, False),
    "forward": ("forward_hook", 2, True),
    "pre": ("forward_pre_hook", 1, True),
    "backward": ("full_backward_hook", 1, True),
    "look backward": ("full_backward_hook", 2, False),
    "backward pre": ("full_backward_pre_hook", 1, True),
}


def _hook(run, choice):
    _, argument, changes = HOOKS[choice]

    def hook(*args):
        _told(run, args[0], choice, args[argument])
        return _twice(args[argument]) if changes else None

    return hook


@operation("module", *HOOKS)
def hook(run, module, choice):
    getattr(module, f"register_{HOOKS[choice][0]}")(_hook(run, choice))


@operation("root", *HOOKS)
def global_hook(run, choice):
    handle = getattr(hooks, f"register_module_{HOOKS[choice][0]}")(_hook(run, choice))
    run.exits.callback(handle.remove)


# --- parameters ---


@operation("parameter", "", "remove")
def pruned(run, parent, name, choice):
    mask = (numbers(getattr(parent, name).shape, 7) > 0).to(getattr(parent, name).dtype)
    prune.custom_from_mask(parent, name, mask)
    if choice == "remove":
        prune.remove(parent, name)


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


@operation("parameter", "", "remove")
def parametrized(run, parent, name, choice):
    parametrize.register_parametrization(parent, name, Twice())
    if choice == "remove":
        parametrize.remove_parametrizations(parent, name)


@operation("linear", "weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm")
def reparametrized(run, parent, name, choice):
    by = getattr(nn.utils if "old" in choice else parametrizations, choice.split(" ")[-1])
    linear = by(getattr(parent, name))
    for draw, (buffer, t) in enumerate(linear.named_buffers()):
        if buffer[-2:] in ("_u", "_v"):
            t.copy_(nn.functional.normalize(numbers(t.shape, draw), dim=0))


@operation("parameter", "before", "after")
def tensor_hook(run, parent, name, choice):
    parameter = getattr(parent, name)
    if choice == "before":
        parameter.register_hook(_twice)
    else:
        parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))


@operation("parameter", "tensor", "constant", "view")
def hyper(run, parent, name, choice):
    """A plain tensor instead of a parameter."""
    t = (2 * getattr(parent, name).detach()).requires_grad_(choice != "constant")
    delattr(parent, name)
    if choice != "constant":
        run.leaves[f"hyper {name}"] = t
    setattr(parent, name, t.view(-1).view(t.shape) if choice == "view" else t)


@operation("parameter", "this", "all", "all but norms", "all but this")
def frozen(run, parent, name, choice):
    this = getattr(parent, name)
    if choice == "this":
        return this.requires_grad_(False)
    for path, p in run.model.named_parameters():
        if not ((choice == "all but this" and p is this) or (choice[-1] == "s" and "norm" in path)):
            p.requires_grad_(False)


@operation("root", 0, 1)
def tied(run, which):
    """The weight of one linear layer is another's, too."""
    linears = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
    if len(linears) > 1:
        linears[which].weight = linears[1 - which].weight


@operation("module", F32, BF16, F16, F64)
def cast(run, module, dtype):
    run.cast(module, dtype)
    if module is run.model:
        run.x, run.residual = (
            t if t is None else run.cast(t.detach(), dtype).requires_grad_(t.requires_grad)
            for t in (run.x, run.residual)
        )


@operation("parameter", BF16, F32)
def cast_parameter(run, parent, name, dtype):
    getattr(parent, name).data = run.cast(getattr(parent, name).data, dtype)


@operation("parameter", "none missing", "this missing")
def assigned(run, parent, name, choice):
    """Meta parameters, loaded by assignment."""
    state = {key: t.clone() for key, t in run.model.state_dict(keep_vars=False).items()}
    if choice == "this missing":
        where = next(path for path, m in run.model.named_modules() if m is parent)
        state.pop(f"{where}.{name}".lstrip("."), None)
    run.model.to("meta").load_state_dict(state, strict=False, assign=True)


# --- children ---


class Lora(nn.Module):
    def __init__(self, base, delegates):
        super().__init__()
        self.base_layer, weight, self.delegates = base, base.weight, delegates
        for name, rows, columns in (("A", 2, base.in_features), ("B", base.out_features, 2)):
            self.register_parameter(name, nn.Parameter(weight.new_empty(rows, columns)))
        fill(self)

    def __getattr__(self, name):
        if name in ("weight", "bias", "in_features", "out_features") and self.delegates:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


@operation("linear", False, True)
def lora(run, parent, name, delegates):
    setattr(parent, name, Lora(getattr(parent, name), delegates))


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class SameLinear(nn.Linear):
    pass


class OtherLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


@operation("linear", "new", "without bias", "subclass", "other forward")
def new_linear(run, parent, name, choice):
    kind = {"subclass": SameLinear, "other forward": OtherLinear}.get(choice, nn.Linear)
    old = getattr(parent, name)
    if isinstance(old, nn.Linear):
        K, N, bias = old.in_features, old.out_features, choice != "without bias"
        setattr(parent, name, fill(kind(K, N, bias, dtype=old.weight.dtype)))


class Float32Norm(nn.LayerNorm):
    """As models in half precision have it."""

    def forward(self, x):
        if x.dtype == F64:
            return super().forward(x)
        w, b = (p if p is None else p.float() for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.float(), x.shape[-1:], w, b, self.eps).type_as(x)


NEW_NORMS = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "rms of eps 0.5": lambda C, **where: nn.RMSNorm(C, 0.5, **where),
    "batch": nn.BatchNorm1d,
    "plain layer": lambda C, **where: nn.LayerNorm(C, elementwise_affine=False, **where),
    "layer without bias": lambda C, **where: nn.LayerNorm(C, bias=False, **where),
    "plain batch": lambda C, **where: nn.BatchNorm1d(C, affine=False, **where),
    "batch without statistics": lambda C, **w: nn.BatchNorm1d(C, track_running_stats=False, **w),
    "group": lambda C, **where: nn.GroupNorm(1, C, **where),
    "float32": Float32Norm,
}


@operation("norm", *NEW_NORMS)
def new_norm(run, parent, name, choice):
    old = getattr(parent, name)
    if isinstance(getattr(old, "weight", None), torch.Tensor):
        setattr(parent, name, fill(NEW_NORMS[choice](len(old.weight), dtype=old.weight.dtype)))


@operation("child", "identity", "none", "wrapped", "forward")
def replaced(run, parent, name, choice):
    child = getattr(parent, name)
    if choice == "forward":
        forward = child.forward
        child.forward = lambda *args: -forward(*args)
    else:
        news = {"identity": nn.Identity(), "wrapped": Wrapped(child), "none": None}
        setattr(parent, name, news[choice])


# --- the whole model ---


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return pickle.loads(pickle.dumps(torch.load(file, weights_only=False)))


@operation("root", "deepcopy", "pickle")
def copied(run, by):
    run.model = copy.deepcopy(run.model) if by == "deepcopy" else _pickled(run.model)


@operation("root", "load", "swap", "overwrite")
def loaded(run, choice):
    state = {key: t.clone() for key, t in run.model.state_dict().items()}
    setting = {"swap": "swap_module_params", "overwrite": "overwrite_module_params"}.get(choice)
    if setting:
        getattr(torch.__future__, f"set_{setting}_on_conversion")(True)
        run.exits.callback(getattr(torch.__future__, f"set_{setting}_on_conversion"), False)
        run.cast(run.model, F64)
        run.cast(run.model, run.case.dtype)
    run.model.load_state_dict(state)


@operation("root", "convert", "revert")
def converted(run, choice):
    if run.ours:
        getattr(fusedres, choice)(run.model)


# --- the call ---


def around_call(*choices):
    """An operation f(run, choice) that makes a call(model, x, residual) of the one there is."""

    def register(f):
        def wrap(run, choice):
            run.call = f(run, run.call, choice)

        wrap.__name__ = f.__name__
        return operation("root", *choices)(wrap)

    return register


def _inside(manager):
    """A call inside of a context manager."""

    @wraps(manager)
    def wrap(run, call, choice):
        def inside(model, x, r):
            with manager(run, choice):
                return call(model, x, r)

        return inside

    return wrap


@around_call(True, False)
def checkpoint(run, call, reentrant):
    return lambda *args: recompute(call, *args, use_reentrant=reentrant)


@around_call((BF16, {}), (F16, {}), (BF16, {"enabled": False}), (BF16, {"cache_enabled": False}))
@_inside
def autocast(run, choice):
    dtype, how = choice
    if how.get("enabled", True):
        run.dtypes.add(dtype)
    return nullcontext() if run.truth else torch.autocast("cpu", dtype, **how)


@around_call("no_grad", "inference_mode")
@_inside
def grad_mode(run, name):
    return getattr(torch, name)()


@around_call(F64, BF16, "meta")
@_inside
def defaults(run, choice):
    """Another default dtype or device."""
    exits = ExitStack()
    if isinstance(choice, str):
        exits.enter_context(torch.device(choice))
    else:
        exits.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(choice)
    return exits


@around_call("all", "first")
def functional(run, call, choice):
    """With other tensors for parameters."""

    class Called(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return call(self.model, *args)

    def replaced(model, x, r):
        names = [name for name, _ in model.named_parameters()]
        names = names[:1] if choice == "first" else names
        new = {f"model.{name}": 2 * model.get_parameter(name) for name in names}
        return functional_call(Called(model), new, (x, r))

    return replaced


@around_call("error", "different")
def vmap(run, call, randomness):
    def mapped(model, x, r):
        if len(x) == 0:  # torch cannot reshape these
            return call(model, x, r)
        dims = 0, None if r is None else 0
        f = torch.func.vmap(lambda x, r: call(model, x, r), dims, randomness=randomness)
        return f(x, r)

    return mapped


@around_call("x", "residual", "y")
def edited(run, call, what):
    """In place, between forward and backward."""

    def edit(model, x, r):
        y = call(model, x, r)
        with torch.no_grad() if what != "y" else nullcontext():
            t = {"x": x, "y": y, "residual": r}[what]
            return t.mul_(2) if what == "y" else y if t is None else (t.mul_(2), y)[1]

    return edit


@around_call("bytes", "flops")
def measured(run, call, what):
    """What is kept for backward, and what is counted as work."""

    def keep(model, x, r):
        kept, alive = {}, [*model.parameters(), *model.buffers()]

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = call(model, x, r)
        there = {t.untyped_storage().data_ptr() for t in alive}
        run.kept = sum(size for at, size in kept.items() if at not in there and x.numel())
        return y

    def count(model, x, r):
        with FlopCounterMode(display=False) as counter:
            y = call(model, x, r)
        run.log.append(f"{counter.get_total_flops()} flops")
        return y

    return keep if what == "bytes" else count


@operation("root", "penalty", "twice", "accumulate", "train", "func.grad", "func.jvp")
def differentiated(run, how):
    """Other ways to gradients than one backward."""

    def penalty():
        y = run.forward()
        (dx,) = torch.autograd.grad(y, run.x, run.cotangent(y), create_graph=True)
        (y.square().sum() + dx.square().sum()).backward()
        return y

    def twice():
        y = run.forward()
        y.backward(run.cotangent(y), retain_graph=True)
        y.backward(run.cotangent(y))
        return y

    def train():
        y = run.backward()
        torch.optim.SGD(run.model.parameters(), lr=2**-6).step()
        return y

    def transform():
        names = [name for name, p in run.model.named_parameters() if p.requires_grad]
        params = {name: run.model.get_parameter(name).detach() for name in names}

        def f(params, x):
            r = run.residual
            y = functional_call(run.model, params, (x,) if r is None else (x, r))
            return (y * run.cotangent(y)).sum(), y

        if how == "func.jvp":
            tangents = params, numbers(run.x.shape, 103).to(run.x.dtype)
            *_, run.out["jvp"], y = torch.func.jvp(f, (params, run.x), tangents, has_aux=True)
            return y
        (dparams, run.out["dx"]), y = torch.func.grad(f, (0, 1), has_aux=True)(params, run.x)
        run.out.update({f"d{name}": g for name, g in dparams.items()})
        return y

    run.steps = 2 if how in ("accumulate", "train") else 1
    ways = {"penalty": penalty, "twice": twice, "train": train, "accumulate": run.backward}
    run.step = ways.get(how, transform)


# --- comparing ---

MAY_WORK = (  # what eager refuses and ours need not
    "modified by an inplace operation",
    "mixed dtype (CPU)",  # parameters of a norm in another dtype than what it acts on,
    "expected scalar type",  # or than each other
    "Expected gradient function to be set",  # FlopCounterMode's
)


def check(case, ours=None):
    """Raises a Difference; `ours` makes another run than FusedResidual's, to check this check."""
    eager, fused = Run(case), (ours or Run)(case, True)
    expected, came = eager.results(), fused.results()
    if isinstance(expected, Exception) or isinstance(came, Exception):
        return compare_errors(case, expected, came)
    if any(p.is_meta for p in eager.model.parameters()):  # torch's own slip
        return None
    if eager.log != fused.log:
        raise Difference(f"log: {fused.log}, eager {eager.log}")
    if came.keys() != expected.keys():
        raise Difference(f"tensors: {came.keys() ^ expected.keys()} on one side only")
    for name, t in expected.items():
        for what in ("dtype", "shape", "device"):
            a, b = getattr(came[name], what), getattr(t, what)
            if a != b:
                raise Difference(f"{what} of {name}: {a}, eager {b}")
    if (fused.kept or 0) > (eager.kept or 0) + 64:  # statistics of a row, a seed
        raise Difference(f"bytes: {fused.kept} kept, eager {eager.kept}")
    with Kinks() as kinks:
        true = Run(case, truth=True).results()
    if isinstance(true, Exception):
        return compare_errors(case, true, came)
    rounding = max(torch.finfo(dtype).eps for dtype in eager.dtypes if dtype.is_floating_point)
    results = came, expected, true, rounding, case.x.get("values") == "huge"
    wrong = [name for name in true if compare(name, *results)]
    if wrong and kinks.nearest > 1000 * rounding:
        others = [Run(case, truth=True, nudge=by * rounding / 2).results() for by in (1, -1)]
        for name in wrong:
            error = compare(name, *results, others)
            if error:
                raise error


def compare_errors(case, expected, came):
    """Errors on both sides, of compatible kinds."""
    error, other = isinstance(expected, Exception), isinstance(came, Exception)
    compatible = [type(expected), RuntimeError, ValueError, TypeError]
    if isinstance(expected, TypeError):
        compatible.append(AttributeError)
    if error and other and isinstance(came, tuple(compatible)):
        return
    if error and not other and any(words in str(expected) for words in MAY_WORK):
        return
    edits_x = any(name == "edited" and choice == "x" for name, _, choice in case.operations)
    if other and "inplace" in str(came) and edits_x:  # eager may have kept a function of x instead
        return
    words = [repr(e)[:200] if isinstance(e, Exception) else "no error" for e in (came, expected)]
    raise Difference(f"error: {words[0]}, eager {words[1]}")


def compare(name, came, expected, true, rounding, huge, others=()):
    """A Difference, unless as near to the truth as eager, with the same NaN and Inf.

    `others` are the truth of other operands that round to the same: eager may be lucky.
    """
    came, expected, true = came[name], expected[name], true[name]
    if not came.is_floating_point():
        same = torch.equal(came, expected)
        return None if same else Difference(f"value of {name}: {came}, eager {expected}")
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        a, b = what(came), what(expected)
        if huge:  # eager's own NaN depend on the width, where a variance overflows
            a, b = ~came.isfinite() & b, b
        if not torch.equal(a, b):
            counts = f"{a.sum()}, eager {b.sum()}"
            return Difference(f"{what.__name__} of {name}: {counts}")
    true = true.double()
    finite = came.isfinite() & true.isfinite()
    if not finite.any():
        return None
    true, step = true[finite], torch.finfo(came.dtype).eps
    ours, eager = ((t[finite].double() - true).abs().max() for t in (came, expected))
    step, few = max(step, 1e-10 if came.dtype == F64 else 5e-6), true.numel() < 16
    if few:  # eager may be lucky
        step = max(step, rounding)
    largest = true.abs().max()  # or sums of terms of about 1 that cancel
    spread = max(((other[name][finite] - true).abs().max() for other in others), default=0.0)
    if ours <= 2 * eager + 2 * spread + 2 * step * largest.clamp(min=4 if few else 0.25):
        return None
    told = f"{ours:.3g} from the truth, eager {eager:.3g}, largest {largest:.3g}"
    return Difference(f"value of {name}: {told}")


# --- drawing, by pick(sequence): one of its elements ---


def draw_settings(pick, kind, kinks):
    acts = ACT_CLASSES if kind == "sequential" else fusedres.ACTIVATIONS
    acts = [act for act in acts if kinks or act not in KINKS]
    if kind == "sequential":
        stages, norms, acts = ["linear"], NORMS, [*acts]
        others = ("norm", "act")
    else:
        stages, norms, acts = ["linear"], (*NORMS, *NORMS, None), [*acts, None]
        others = [stage for stage in STAGES if stage != "linear" and pick((True, False))]
    for stage in others:
        stages.insert(pick(range(len(stages) + 1)), stage)
    order = "-".join(stages)
    if kind == "mlp" or (kind != "sequential" and pick((True, False))):
        order = pick(tuple(MLP_ORDERS if kind == "mlp" else ORDERS))
    s = {"order": order, "norm": pick(norms), "activation": pick(acts), "bias": pick((True, False))}
    if kind != "sequential":
        s["gate"] = pick((None, "scalar", "channel"))
        s["dropout"], s["drop_path"] = pick((0.0, 0.0, 0.4)), pick((0.0, 0.0, 0.4))
        s["residual_scale"] = pick((1.0, 1.0, -0.5))
    if kind == "layer" and "add" in ORDERS.get(order, order):
        s["shortcut"] = pick((None, None, "identity", "linear", "pad", "module"))
    return s


def places(model, target):
    """Where in a model an operation for `target` can be done."""
    if target == "root":
        return [""]
    if target == "parameter":
        return [name for name, _ in model.named_parameters()]
    if target == "module":
        return [name for name, _ in model.named_modules()]
    kinds = {"norm": NORM_TYPES, "linear": nn.Linear, "act": tuple(ACT_CLASSES.values())}
    kind = kinds.get(target, nn.Module)
    return [name for name, m in model.named_modules() if name and isinstance(m, kind)]


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
