"""Low-rank changes of many tasks in one forward pass: each row of a batch gets its own task's.

The factors of the tasks lie side by side, `A` as `(R, in)` and `B` as `(R, out)` with R the sum of
the ranks. A row's `A x` is set to zero where it is another task's, so a row's result does not
depend on the other rows: an exact zero is added to it. Three matrix operations a module, however
many tasks there are; the stack holds the tasks in use and is made again only when a task that it
lacks comes in. DoRA's magnitudes (Liu et al. 2024, section 4.1) are multiples of the base's rows,
so they are multiples of the base's output here (`core.deltas._factors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltaloom.core.deltas.lowrank import Factors
from deltaloom.core.errors import InputError

RANKS = 256
"""Sum of ranks up to which tasks that are not in use stay in the stack. Ours: a tenth of the work
of a layer of width 4,096."""


@dataclass(frozen=True)
class _Part:
    """One task's change of one module, float32 as PEFT computes it."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(r, out), scaled"""
    rows: Tensor | None
    """(out,)"""


@dataclass
class _Stacked:
    """One module's factors of all stacked tasks."""

    a: Tensor
    """(R, in)"""
    b: Tensor
    """(R, out)"""
    rows: Tensor | None
    """(tasks + 1, out), the last of them zero"""
    ranks: tuple[int, ...]
    """By stacked task: the key of the mask."""
    owner: Tensor
    """(R,), whose task's a column is"""


class AdapterStack:
    """The low-rank tasks of one model, applied by hooks on its linear modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._tasks: dict[str, dict[str, _Part]] = {}
        self._hooks: dict[str, Any] = {}
        self._stacked: dict[str, _Stacked] = {}
        self._order: list[str] = []
        self._masks: dict[tuple[int, ...], Tensor | None] = {}
        """By ranks: (b, 1, R), true where a column is not the row's task's; None where none is."""
        self._own: Tensor | None = None
        self._used: tuple[str | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held, those stacked for the rows under way with them."""
        parts = [part for parts in [*self._tasks.values()] for part in parts.values()]
        held = [*parts, *self._stacked.values()]
        each = [one for part in held for one in (part.a, part.b, part.rows)]
        return sum(tensor.nbytes for tensor in each if tensor is not None)

    def add(self, name: str, factors: Mapping[str, Factors], weights: Any) -> None:
        """Take a task's factors, by tensor of the base.

        `weights(name)` reads the base's tensor, for DoRA. Raises InputError for a module that the
        model does not have, for one that is not linear and for factors that are not finite.
        """
        parts, modules = {}, dict(self.model.named_modules())
        for tensor, own in factors.items():
            module = tensor.removesuffix(".weight")
            found = modules.get(module)
            if found is None or not hasattr(found, "weight"):
                raise InputError(f"{name}: changes {tensor}, which the base does not have")
            if own.magnitude is not None:
                own = own.settled(weights(tensor))
            a, b = own.a.float(), own.b.float().T * own.scale
            if not (a.isfinite().all() and b.isfinite().all()):
                raise InputError(f"{name}: the factors of {tensor} are not finite; tune it again")
            device = found.weight.device
            rows = None if own.rows is None else own.rows.float().to(device)
            parts[module] = _Part(a.to(device), b.contiguous().to(device), rows)
        self._tasks[name] = parts
        for module in parts.keys() - self._hooks.keys():
            target = self.model.get_submodule(module)
            self._hooks[module] = target.register_forward_hook(self._hook(module))
        self._forget(name)

    def remove(self, name: str) -> None:
        """Forget a task that no row uses."""
        del self._tasks[name]
        self._forget(name)
        used = {module for parts in self._tasks.values() for module in parts}
        for module in self._hooks.keys() - used:
            self._hooks.pop(module).remove()

    def use(self, tasks: Sequence[str | None]) -> None:
        """The next passes have these rows; None is the base alone."""
        if tuple(tasks) == self._used:
            return
        wanted = {task for task in tasks if task is not None}
        self._masks, self._own, self._used = {}, None, tuple(tasks)
        if not wanted:
            return
        if not wanted <= {*self._order}:
            self._build(wanted)
        place = {task: i for i, task in enumerate(self._order)}
        own = torch.tensor([place.get(task, -1) if task else -1 for task in tasks])  # (b,)
        for stacked in self._stacked.values():
            if stacked.ranks not in self._masks:
                mask = stacked.owner[None] != own[:, None]  # (b, R)
                hidden = mask[:, None].to(stacked.a.device) if bool(mask.any()) else None
                self._masks[stacked.ranks] = hidden
        self._own = own

    def _forget(self, name: str) -> None:
        self._used = self._own = None
        if name in self._order:
            self._order, self._stacked = [], {}

    def _build(self, wanted: set[str]) -> None:
        """Stack the wanted tasks, and of the rest those last used while there is room."""
        rank = {
            name: max((len(part.a) for part in parts.values()), default=0)
            for name, parts in self._tasks.items()
        }
        order = sorted(wanted)
        room = RANKS - sum(rank[name] for name in order)
        for name in [*self._order, *self._tasks]:
            if name in self._tasks and name not in order and rank[name] <= room:
                order.append(name)
                room -= rank[name]
        self._order = order
        modules = sorted({module for name in order for module in self._tasks[name]})
        self._stacked = {
            module: _stack([self._tasks[name].get(module) for name in order]) for module in modules
        }

    def _hook(self, module: str) -> Any:
        def apply(own: Any, given: tuple[Any, ...], made: Tensor) -> Tensor | None:
            stacked = self._stacked.get(module)
            if self._own is None or stacked is None:
                return None
            if stacked.rows is not None:
                straight = made if own.bias is None else made - own.bias
                times = stacked.rows[self._own.to(made.device)][:, None]  # (b, 1, out)
                made = made + (straight * times).to(made.dtype)
            inner = linear(given[0].to(stacked.a.dtype), stacked.a)  # (b, q, R)
            mask = self._masks[stacked.ranks]
            if mask is not None:
                inner = inner.masked_fill_(mask, 0.0)
            if made.dtype == inner.dtype:
                return torch.addmm(made.flatten(0, 1), inner.flatten(0, 1), stacked.b).view_as(made)
            return made + (inner @ stacked.b).to(made.dtype)

        return apply


def _stack(parts: Sequence[_Part | None]) -> _Stacked:
    there = [part for part in parts if part is not None]
    rows = None
    if any(part.rows is not None for part in there):
        nothing = torch.zeros_like(there[0].b[0])
        each = [nothing if part is None or part.rows is None else part.rows for part in parts]
        rows = torch.stack([*each, nothing])
    ranks = tuple(0 if part is None else len(part.a) for part in parts)
    return _Stacked(
        torch.cat([part.a for part in there]),
        torch.cat([part.b for part in there]),
        rows,
        ranks,
        torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)),
    )
