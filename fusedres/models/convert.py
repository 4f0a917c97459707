"""Existing models: `convert` fuses what provably stays the same function, `revert` undoes it.

Only a module's class changes, never a parameter, a submodule or a state-dict key: optimisers,
checkpoints and references into the model stay good, and so do copying and pickling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..layers import customised, stage_of
from ..modules import FusedResidual
from ..network import JOINED, FusedSequential
from ..reference import Residual
from ..spec import meant
from .fuse import check_when
from .plan import Planned, Plans, is_planned, planned_kind
from .report import Add, Change, ConversionReport
from .sequential import ConvertedSequential, become, convert_sequential

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
TITLE = "fusedres.convert"


def _convert_residual(name: str, module: Residual) -> Change:
    reason = None
    if type(module) is not Residual:
        reason = "a subclass of Residual"
    elif "forward" in module.__dict__:
        reason = "its forward was replaced"
    for child_name, child in module.named_children():
        if stage_of(child) and customised(child):
            reason = f"{child_name}: {customised(child)}"
    if reason is not None:
        return Change(name, False, f"{type(module).__name__}: {reason}")
    become(module, FusedResidual)
    module._converted = True
    return Change(name, True, f"Residual is now FusedResidual, order {module.order!r}")


class _Sums(TorchFunctionMode):
    """Sees which module's own forward adds two tensors of one shape, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.owners: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _SUMS and self.calls and len(args) > 1:
            a, b = args[:2]
            both = isinstance(a, Tensor) and isinstance(b, Tensor)
            if both and a.shape == b.shape and a.dim() > 1 and a.is_floating_point():
                module, given, named = self.calls[-1]
                self.owners.setdefault(module, (given, named))
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append((module, args, kwargs))

    def leave(self, module: nn.Module, args: Any, y: Any) -> None:
        if self.calls and self.calls[-1][0] is module:
            self.calls.pop()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """A call inside changes no buffer and no generator."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _see_sums(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Sums:
    """Runs the model once, in evaluation."""
    sums, hooks = _Sums(), []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(sums.enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(sums.leave, always_call=True))
    try:
        with _evaluation(model), sums:
            model(*args, **kwargs)
    except Exception as error:
        named = (f"{name}={_told(value)}" for name, value in kwargs.items())
        raise ValueError(
            f"{TITLE}: the model fails with the example inputs "
            f"({', '.join([*map(_told, args), *named])}): {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _told(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"{tuple(value.shape)} {value.dtype}" if is_tensor else type(value).__name__


def _differs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Whether a converted module gives something else than its own forward, in evaluation."""
    with _evaluation(module):
        ours = tree_leaves(module(*args, **kwargs))
        plans = module.__dict__.pop("_fusedres_plans")
        try:
            plain = tree_leaves(module(*args, **kwargs))
        finally:
            module.__dict__["_fusedres_plans"] = plans
    for a, b in zip(ours, plain, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        bound = 1e3 * torch.finfo(b.dtype).eps * b.abs().max()
        if a.dtype != b.dtype or a.shape != b.shape or not (a - b).abs().max() <= bound:
            return "its fused forward gives something else"
    return None


def _convert_owner(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], when: str
) -> list[Add]:
    """Lets a module's forward go by plans if one for these arguments fuses something."""
    if isinstance(module, (Residual, ConvertedSequential)) or "forward" in module.__dict__:
        return [Add(name, False, "its forward was replaced")] if "forward" in vars(module) else []
    if not isinstance(module, Planned):
        become(module, planned_kind(type(module)))
    plans = module.__dict__["_fusedres_plans"] = Plans(when)
    made = plans.make(module, args, kwargs)
    plan = None if made is None else made[0]
    reason = "it is given a subclass of torch.Tensor" if plan is None else plan.why_not
    fused = plan is not None and plan.call is not None
    if fused:
        reason = _differs(module, args, kwargs)
    if not fused or reason is not None:
        _unplan(module)
    if reason is not None:
        return [Add(name, False, f"{reason}; torch.compile(backend='fusedres') may read it")]
    assert plan is not None
    inner = [add.where.replace("(the model)", "") for add in plan.adds]
    return [
        replace(add, where=f"{name}.{where}" if where else name)
        for add, where in zip(plan.adds, inner, strict=True)
    ]


def _unplan(module: Any) -> None:
    """Lets its own forward run; its class stays where it was changed since, by FSDP2 say."""
    module.__dict__.pop("_fusedres_plans", None)
    kind = module._fusedres_kind
    if type(module) is planned_kind(kind):
        become(module, kind)


def _convert_sums(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], when: str
) -> list[Add]:
    names = {module: name or "(the model)" for name, module in model.named_modules()}
    owners = _see_sums(model, args, kwargs).owners
    adds: list[Add] = []
    for module in sorted(owners, key=lambda m: -names[m].count(".")):  # innermost first
        if not is_planned(module):
            adds += _convert_owner(names[module], module, *owners[module], when)
    places = {name: i for i, name in enumerate(names.values())}
    return sorted(adds, key=lambda add: places.get(add.where, 0))


def convert(
    model: nn.Module,
    *example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    linear_stacks: bool | None = None,
    when: str = "faster",
    **unknown: Any,
) -> ConversionReport:
    """Fuses, in place, the layers of a model that can be proved to stay the same function.

    * With `example_inputs`, arguments of the model, or `kwargs`: each module whose own forward adds
      is read by torch.fx, and what of the order grammar ends in that add runs fused, see
      ``torch.compile(model, backend="fusedres")``, which reads more. The model is run once with
      them, in evaluation.
    * A ``fusedres.Residual`` becomes a ``fusedres.FusedResidual``.
    * An nn.Sequential with residual layers in a row becomes a ``fusedres.FusedSequential``.
    * With `linear_stacks` (default: without example inputs), neighbours in an nn.Sequential that
      the order grammar can say (linear with a norm, an activation, a dropout, in any order) run as
      one fused layer without `add`.

    Parameters, buffers, submodules, state-dict keys, devices, dtypes and modes stay the very same.
    Other arguments than the examples, another mode, a changed setting or child, a new hook: a
    module is read again at its next call, up to 8 times; after that its own forward runs.

    Args:
        kwargs: those of the model's arguments that go by name, a dict, as torch.export has it:
            ``convert(model, ids, kwargs={"attention_mask": mask})``.
        when: of residual adds that can be fused, "faster" fuses those that are measured to be
            faster here (off a CPU all), "always" all.

    Returns a report to print: what was done, or why not. Raises TypeError for anything but a
    torch.nn.Module, `kwargs` other than a dict and other names, ValueError for an unknown `when`,
    and where the model fails with the example inputs: its own error is the cause.
    """
    _check_module("convert", model)
    check_when(TITLE, when)
    for name in unknown:
        question = meant(name, ("kwargs", "linear_stacks", "when"))
        raise TypeError(
            f"{TITLE}: unknown argument {name!r}; {question}what the model takes by name goes into "
            f"kwargs={{{name!r}: ...}}"
        )
    if not isinstance(kwargs, (Mapping, type(None))):
        raise TypeError(f"{TITLE}: kwargs must be a dict, got {type(kwargs).__name__}")
    given = bool(example_inputs or kwargs)
    adds = _convert_sums(model, example_inputs, dict(kwargs or {}), when) if given else []
    stacks = not given if linear_stacks is None else linear_stacks
    read = {m for module in model.modules() if is_planned(module) for m in module.modules()}
    changes: list[Change] = []
    handled: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        name = path or "(the model)"
        if module in handled or module in read:
            continue
        if isinstance(module, Residual) or type(module) in (nn.Sequential, ConvertedSequential):
            handled.update(m for m in module.children() if isinstance(m, nn.Linear))
        if isinstance(module, Residual) and not isinstance(module, FusedResidual):
            changes.append(_convert_residual(name, module))
        elif type(module) is nn.Sequential and stacks:
            changes += convert_sequential(path, module)
        elif isinstance(module, nn.Linear) and not given:
            reason = "its caller's forward is not read; convert(model, x) would"
            changes.append(Change(name, False, f"{type(module).__name__}: {reason}"))
    changes += _join_layers(model)
    return ConversionReport(TITLE, tuple(changes), tuple(adds))


def _join_layers(model: nn.Module) -> Iterator[Change]:
    """Every nn.Sequential with residual layers in a row becomes a FusedSequential."""
    for path, module in model.named_modules():
        if type(module) is nn.Sequential and "forward" not in module.__dict__:
            joins = [type(child) in JOINED for child in module]
            if any(map(and_, joins, joins[1:])):
                become(module, FusedSequential)
                module.__dict__["_converted"] = True
                told = "nn.Sequential is now FusedSequential: layers in a row are one call"
                yield Change(path or "(the model)", True, told)


def revert(model: nn.Module) -> ConversionReport:
    """Undoes `convert`, in place: every module gets the class it had.

    Layers that were FusedResidual from the start stay. Returns and raises as `convert` does.
    """
    _check_module("revert", model)
    changes: list[Change] = []
    for path, module in model.named_modules():
        name = path or "(the model)"
        if type(module) is ConvertedSequential:
            become(module, nn.Sequential)
            module.__dict__.pop("_stacks", None)
            changes.append(Change(name, True, "an nn.Sequential again"))
        elif type(module) is FusedSequential and module.__dict__.pop("_converted", False):
            become(module, nn.Sequential)
            changes.append(Change(name, True, "an nn.Sequential again"))
        elif is_planned(module):
            _unplan(module)
            changes.append(Change(name, True, f"{type(module).__name__}: its own forward again"))
        elif type(module) is FusedResidual and module.__dict__.pop("_converted", False):
            become(module, Residual)
            changes.append(Change(name, True, "a Residual again"))
    return ConversionReport("fusedres.revert", tuple(changes))


def _check_module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusedres.{op}: model must be a torch.nn.Module, got {type(model).__name__}"
        )
