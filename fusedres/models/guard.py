"""When a plan holds: for arguments like those it was made for, while its modules are as they were.

This is asked at every call of every converted module. So modules are compared by one function of
the extension; without it the same takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..backends import native
from ..layers import HOOKS

PLAIN = (Tensor, nn.Parameter)
_NESTED = (tuple, list, dict)
_INTERNAL = nn.Module().__dict__.keys() - {"training"}  # of every module


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's arguments as a flat list, tuples, lists and dicts taken apart; their structure."""
    return tree_flatten((args, kwargs), is_leaf=lambda v: not isinstance(v, _NESTED))


def leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """`flatten` without the structure, for less."""
    flat = [*args, *kwargs.values()]
    for v in flat:
        if isinstance(v, _NESTED):
            return flatten(args, kwargs)[0]
    return flat


def _if_unchanged(facts: tuple[list[Any], ...], wanted: list[Any]) -> list[Any] | None:
    """If all still hold (a list of dict, key, value, and so on; dicts that are empty; pairs (dict,
    size) and (object, type)), what `wanted`, dict, key, and so on, finds; else None.
    """
    values, empty, sizes, kinds = facts
    entries = list(zip(values[::3], values[1::3], strict=True))
    asked = list(zip(wanted[::2], wanted[1::2], strict=True))
    holds = (
        not any(empty)
        and all(len(d) == size for d, size in sizes)
        and all(type(m) is kind for m, kind in kinds)
        and all(key in d for d, key in (*entries, *asked))
        and [d[key] for d, key in entries] == values[2::3]
    )
    return [d[key] for d, key in asked] if holds else None


if_unchanged = getattr(native.extension, "if_unchanged", _if_unchanged)


class Modules:
    """Modules as they were: settings, children, absent parameters, hooks, classes.

    Not the first one's hooks and class: they are at work before its forward is.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        entries: list[tuple[Any, str, Any]] = []
        for m in modules:
            entries += [(m.__dict__, k, v) for k, v in m.__dict__.items() if k not in _INTERNAL]
            entries += [(m._modules, k, v) for k, v in m._modules.items()]
            entries += [(m._parameters, k, v) for k, v in m._parameters.items() if v is None]
        dicts = [d for m in modules for d in (m.__dict__, m._modules)]
        dicts += [m.__dict__[name] for m in modules[1:] for name in HOOKS]
        self.facts = (
            [part for entry in entries for part in entry],
            [d for d in dicts if not d],
            [(d, len(d)) for d in dicts if d],
            [(m, type(m)) for m in modules[1:]],
        )

    def find(self, wanted: list[Any]) -> list[Any] | None:
        """If they are as they were, what `wanted`, dict, key, dict, key, ... finds; else None."""
        try:
            return if_unchanged(self.facts, wanted)
        except (RuntimeError, ValueError):  # tensors that are not the same one
            return None


Fits = Callable[[Any], bool]  # whether an argument is like the one before


def _fits_tensor(t: Tensor, sizes: Any) -> Fits:
    """`sizes`: a size that is no number is free."""
    dtype, device, rank = t.dtype, t.device, t.dim()
    fixed = [(d, size) for d, size in enumerate(sizes) if isinstance(size, int)]

    def fits(t: Any) -> bool:
        if type(t) not in PLAIN or t.dtype is not dtype or t.device != device:
            return False
        sizes = t.shape
        if len(sizes) != rank:
            return False
        for d, size in fixed:  # noqa: SIM110 (any() takes three times as long)
            if sizes[d] != size:
                return False
        return True

    return fits


def _fits_value(known: Any) -> Fits:
    return lambda v: type(v) is type(known) and v == known


class Guard:
    """What arguments must be. `fakes`: of arguments by their position in `leaves`, example
    values, in which a size that is free is a symbol.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: tuple[Any, ...],
        fakes: dict[int, Any],
    ) -> None:
        self.state, self.fakes = state, fakes
        self.count = 0  # of leaves so far
        self.places: dict[str, tuple[int, int]] = {}
        self.equal: list[tuple[int, int, int, int]] = []  # sizes that go by the same symbol
        self.only_tensors = not kwargs and all(isinstance(v, Tensor) for v in args)
        self.args = list(map(self._fits, args))
        self.kwargs = [(name, self._fits(v)) for name, v in kwargs.items()]

    def _fits(self, v: Any) -> Fits:
        if isinstance(v, _NESTED):
            inner = list(map(self._fits, v.values() if isinstance(v, dict) else v))
            kind, keys = type(v), list(v) if isinstance(v, dict) else range(len(v))
            return lambda v: (
                type(v) is kind
                and (list(v) if isinstance(v, dict) else range(len(v))) == keys
                and all(fits(v[key]) for fits, key in zip(inner, keys, strict=True))
            )
        i, self.count = self.count, self.count + 1
        if not isinstance(v, Tensor):
            return _fits_value(v)
        sizes = self.fakes[i].shape if i in self.fakes else v.shape
        for d, size in enumerate(sizes):
            if not isinstance(size, int):
                j, e = self.places.setdefault(str(size), (i, d))
                if (j, e) != (i, d):
                    self.equal.append((i, d, j, e))
        return _fits_tensor(v, sizes)

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: tuple[Any, ...]) -> bool:
        """Whether arguments and the state of gradients and autocast are as they were."""
        if state != self.state or len(args) != len(self.args) or len(kwargs) != len(self.kwargs):
            return False
        for v, fits in zip(args, self.args):  # noqa: B905
            if not fits(v):
                return False
        if kwargs:
            for (name, fits), came in zip(self.kwargs, kwargs):  # noqa: B905
                if name != came or not fits(kwargs[name]):
                    return False
        if self.equal:
            flat = leaves(args, kwargs)
            return all(flat[i].shape[d] == flat[j].shape[e] for i, d, j, e in self.equal)
        return True
