"""Stacks in an nn.Sequential: neighbours that one fused layer without `add` stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..layers import activation_name, customised, norm_features, norm_settings, stage_of, watched
from ..links import Part, joined, links_of, unchained
from ..modules import FusedResidual
from .report import Change


@dataclass(frozen=True, eq=False)
class Stack:
    """Neighbours in an nn.Sequential that one fused layer without `add` can stand for."""

    modules: tuple[nn.Module, ...]
    settings: tuple[Any, ...]  # of those that `layer` does not ask for theirs
    layer: FusedResidual  # over the same modules, and no module's child: it adds no state-dict keys

    @staticmethod
    def of(modules: tuple[nn.Module, ...]) -> Stack:
        """Raises ValueError if a module's settings have no fused form."""
        stages: dict[str, Any] = {str(stage_of(m)): m for m in modules}
        linear, norm, dropout = stages["linear"], stages.get("norm"), stages.get("dropout")
        for m in modules[: modules.index(linear)]:
            if getattr(m, "inplace", False):
                raise ValueError(f"{type(m).__name__} writes into the input (inplace=True)")
        if isinstance(norm, nn.SyncBatchNorm):
            raise ValueError("SyncBatchNorm sums over processes")
        if isinstance(norm, nn.RMSNorm) and norm.eps is None:
            raise ValueError("RMSNorm with eps=None follows the dtype; set its eps")
        layer = FusedResidual(
            linear.in_features,
            linear.out_features,
            order="-".join(stages),
            device="meta",
            activation=activation_name(stages.get("act")),
            dropout=dropout.p if dropout else 0.0,
            bias=linear.bias is not None,
            **norm_settings(norm, linear.weight.dtype),
        )
        if norm_features(layer.norm) != norm_features(norm):
            raise ValueError(f"{type(norm).__name__} has {norm_features(norm)} features")
        layer.linear, layer.norm = linear, norm
        layer.training = (dropout or linear).training
        return Stack(modules, _settings(modules), layer)

    def runs(self, modules: tuple[nn.Module, ...], x: Any) -> bool:
        """Whether the fused call is still what these modules do, one after another, with x."""
        if modules != self.modules or watched() or any(map(customised, modules)):
            return False
        training = self.layer.training
        if any(type(m) is nn.Dropout and m.training != training for m in modules):
            return False
        if isinstance(self.layer.norm, nn.BatchNorm1d) and x.dim() != 2:
            return False  # torch's norms dimension 1 then
        return _settings(modules) == self.settings


def _settings(modules: tuple[nn.Module, ...]) -> tuple[Any, ...]:
    """What activations and dropouts were told: torch lists the names for TorchScript."""
    return tuple(
        getattr(m, name)
        for m in modules
        if stage_of(m) in ("act", "dropout")
        for name in getattr(m, "__constants__", ())
    )


class ConvertedSequential(nn.Sequential):
    """An nn.Sequential whose stacks run in fused calls, neighbours in one; `convert` makes it,
    `revert` unmakes it.

    Its modules are the nn.Sequential's own. A stack that was changed since (a module replaced, a
    hook added, a dropout put into another mode) runs module by module, as does batch norm over
    3-D input. Dropout draws masks as FusedResidual does: other zeros than torch's, as many.
    """

    _stacks: Any = MappingProxyType({})  # position of a stack's first module -> Stack

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential's: input (..., K), the result of the last module."""
        modules: Any = tuple(self._modules.values())
        i = 0
        while i < len(modules):
            run = self._run_from(modules, i, input)
            links = []
            if len(run) > 1 and isinstance(input, Tensor) and unchained(input) is None:
                links = links_of((Part(stack.layer) for stack in run), input)
            y = joined(input, links) if len(links) > 1 else None
            if y is not None:
                input, run = y, run[: len(links)]
            elif run:
                input, run = run[0].layer(input), run[:1]
            else:
                input = modules[i](input)
            i += sum(len(stack.modules) for stack in run) or 1
        return input

    def _run_from(self, modules: tuple[Any, ...], i: int, input: Any) -> list[Stack]:
        """The stacks from modules[i] on, one beside the other, that run in fused calls."""
        run = []
        while (stack := self._stacks.get(i)) is not None:
            stop = i + len(stack.modules)
            if not stack.runs(modules[i:stop], input):
                break
            run.append(stack)
            i = stop
        return run

    def train(self, mode: bool = True) -> ConvertedSequential:
        for stack in self._stacks.values():
            stack.layer.train(mode)
        return super().train(mode)


def _find_stacks(modules: Sequence[nn.Module]) -> tuple[dict[int, Stack], dict[int, str]]:
    """Stacks by the position of their first module, and why other linears stand alone. Greedy."""
    stages = [None if customised(m) else stage_of(m) for m in modules]
    stacks: dict[int, Stack] = {}
    alone: dict[int, str] = {}
    i = 0
    while i < len(modules):
        stop = i
        while stop < len(modules) and stages[stop] and stages[stop] not in stages[i:stop]:
            stop += 1
        reason = (
            customised(modules[i]) or "no norm or activation with a fused form stands beside it"
        )
        while stop > i and "linear" in stages[i:stop] and {"norm", "act"} & {*stages[i:stop]}:
            try:
                stacks[i] = Stack.of(tuple(modules[i:stop]))
            except ValueError as error:
                reason, stop = str(error).removeprefix("fusedres: "), stop - 1
            else:
                break
        if i not in stacks and isinstance(modules[i], nn.Linear):
            alone[i] = reason
        i = stop if i in stacks else i + 1
    return stacks, alone


def convert_sequential(path: str, module: nn.Sequential) -> Iterator[Change]:
    if "forward" in module.__dict__:
        return
    names, children = list(module._modules), list(module)
    stacks, alone = _find_stacks(children)
    for i, stack in stacks.items():
        kinds = "-".join(type(m).__name__ for m in stack.modules)
        order = stack.layer.order
        yield Change(join(path, names[i]), True, f"{kinds} in one fused call, order '{order}'")
    for i, reason in alone.items():
        yield Change(join(path, names[i]), False, f"{type(children[i]).__name__}: {reason}")
    if stacks:
        become(module, ConvertedSequential)
        module._stacks = stacks  # type: ignore[assignment]


def become(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
