"""A model whose chosen parameters are moved by plus or minus eps z in its forward passes.

`Perturbed` leaves the weights alone: hooks change what modules give. For a linear module and a thin
direction z = U V' the output W x becomes W x +/- eps U (V' x), which costs what a LoRA adapter of
that rank costs, and both signs fit in one batch: its first half is moved by plus, its second by
minus eps z. Embeddings look the same ids up in z and add that. Any other module is called with
moved copies of its own parameters, one module's at a time. Nothing is restored, so nothing is lost
to rounding.

`Moved` is the published way: the weights themselves move, and what rounding leaves stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.core.deltas.descent import Rule, move
from deltaloom.core.deltas.directions import Direction
from deltaloom.core.errors import InputError

BOTH = (1.0, -1.0)


class Directed:
    """The chosen parameters and the direction of each at the present step."""

    together = False
    """Whether both signs may share one batch."""

    def __init__(self, model: nn.Module, names: Sequence[str], rule: Rule) -> None:
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}
        self.rule = rule
        self._directions = rule.directions
        self._kept: dict[tuple[int, str], Direction] = {}
        self._step = self._number = 0

    def choose(self, step: int, number: int) -> None:
        """Take the directions of perturbation `number` of a step."""
        if step != self._step:
            self._kept.clear()
        self._step, self._number = step, number

    def direction(self, name: str, number: int | None = None) -> Direction:
        """That of one parameter, of the present perturbation or another one of this step."""
        at = (self._number if number is None else number, name)
        found = self._kept.get(at)
        if found is None:
            found = self._directions.of(self._step, *at, self.parameters[name])
            if self.rule.direction == "lowrank":  # others are as large as the parameters
                self._kept[at] = found
        return found

    @contextmanager
    def signed(self, signs: tuple[float, ...], rows: int = 0) -> Iterator[None]:
        """Move by these signs of eps z: one for all rows, or `BOTH` for the halves of `rows`."""
        raise NotImplementedError
        yield

    def is_swapped(self, module: nn.Module) -> bool:
        """Whether the module is given other parameters at each call, which is dear."""
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Moved(Directed):
    """Moves the weights in place: + eps z, then - 2 eps z, then back. Signs must come as + and -.

    Raises InputError for 16-bit parameters, which this would disturb by more than it tunes them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rule: Rule) -> None:
        super().__init__(model, names, rule)
        narrow = [n for n, p in self.parameters.items() if p.dtype.itemsize < 4]
        if narrow:
            raise InputError(
                f"direction = gaussian moves weights in place, and {narrow[0]} is "
                f"{str(self.parameters[narrow[0]].dtype).removeprefix('torch.')}: rounding would "
                "disturb it more than the steps change it; take direction=lowrank or rademacher, "
                "or base.dtype=float32"
            )

    @contextmanager
    def signed(self, signs: tuple[float, ...], rows: int = 0) -> Iterator[None]:
        """See `Directed`."""
        (sign,) = signs
        self._shift(self.rule.eps if sign > 0 else -2 * self.rule.eps)
        yield
        if sign < 0:
            self._shift(self.rule.eps)

    @torch.no_grad()
    def _shift(self, length: float) -> None:
        for name, parameter in self.parameters.items():
            move(parameter, self.direction(name), length)


class Perturbed(Directed):
    """Hooks in place of moved weights; use as a context manager around forward passes.

    Raises InputError after a forward pass that never called the module of a chosen parameter.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rule: Rule) -> None:
        super().__init__(model, names, rule)
        of = {id(parameter): name for name, parameter in self.parameters.items()}
        self._owners: dict[nn.Module, dict[str, str]] = {}
        for module in model.modules():
            own = module._parameters.items()
            named = {key: of[id(p)] for key, p in own if p is not None and id(p) in of}
            if named:
                self._owners[module] = named
        routed = any("experts" in name for name in names)
        self.together = not routed and all(map(self._keeps_rows, self._owners))
        self._signs: tuple[float, ...] = ()
        self._rows = 0
        self._called: set[str] = set()

    def __enter__(self) -> Perturbed:
        self._handles, self._forwards = [], {}
        for module, named in self._owners.items():
            if self.is_swapped(module):
                self._forwards[module] = vars(module).get("forward")  # accelerate sets one
                module.forward = partial(self._swapped, module, named, module.forward)
            elif isinstance(module, nn.Embedding):
                hook = partial(self._embedding, named)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            else:
                hook = partial(self._linear, named)
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for module, before in self._forwards.items():
            if before is None:
                del module.forward
            else:
                module.forward = before

    @contextmanager
    def signed(self, signs: tuple[float, ...], rows: int = 0) -> Iterator[None]:
        """See `Directed`."""
        self._signs, self._rows = signs, rows
        try:
            yield
        finally:
            self._signs = ()

    def check(self) -> None:
        """Raise InputError when a parameter had no part in the forward passes so far."""
        if idle := sorted(self.parameters.keys() - self._called):
            raise InputError(
                f"{idle[0]} is not read by a module of its own in a forward pass, so it cannot be "
                "perturbed; leave it out of the parameters"
            )

    def is_swapped(self, module: nn.Module) -> bool:
        """See `Directed`: what no formula covers, and matrices under whole directions."""
        if isinstance(module, nn.Embedding):
            return False
        return module in self._owners and not (_is_linear(module) and self._all_thin(module))

    def _all_thin(self, module: nn.Module) -> bool:
        return self.rule.direction == "lowrank" or "weight" not in self._owners[module]

    def _keeps_rows(self, module: nn.Module) -> bool:
        plain = _is_linear(module) or isinstance(module, nn.Embedding)
        vectors = all(self.parameters[name].dim() == 1 for name in self._owners[module].values())
        return plain or (vectors and not any(module.children()))

    def _parts(self, count: int) -> list[tuple[float, slice]]:
        """Sign, times eps, and the rows of a flat output that have it."""
        eps = self.rule.eps
        if len(self._signs) == 1:
            return [(self._signs[0] * eps, slice(None))]
        half = count // 2
        return [(eps, slice(0, half)), (-eps, slice(half, count))]

    def _spread(self, value: Tensor) -> Tensor:
        """One value for all rows (position embeddings) made one for each."""
        if len(self._signs) < 2 or len(value) % self._rows == 0:
            return value
        if len(value) != 1:
            raise InputError(
                f"a module gives {len(value)} rows for a batch of {self._rows}; its parameters "
                "cannot be perturbed"
            )
        return value.expand(self._rows, *value.shape[1:])

    def _linear(
        self, named: dict[str, str], module: Any, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        self._called.update(named.values())
        if not self._signs:
            return output
        x, output = self._spread(inputs[0]), self._spread(output).contiguous()
        flat = output.view(-1, output.shape[-1])  # (N, out)
        if "weight" in named:
            z = self.direction(named["weight"])
            sides = (z.left, z.right) if type(module) is _conv1d() else (z.right, z.left)
            inner, outer = sides
            assert inner is not None
            assert outer is not None
            seen = x.reshape(-1, x.shape[-1]).to(inner.dtype) @ inner  # (N, r)
            for length, rows in self._parts(len(flat)):
                flat[rows].addmm_(seen[rows], outer.T, alpha=length * z.scale)
        if "bias" in named:
            z = self.direction(named["bias"]).dense()
            for length, rows in self._parts(len(flat)):
                flat[rows].add_(z, alpha=length)
        return output

    def _embedding(
        self,
        named: dict[str, str],
        module: Any,
        inputs: tuple[Any, ...],
        named_inputs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """A look-up is linear in its table, also where a subclass shifts ids or scales rows."""
        self._called.update(named.values())
        if not self._signs:
            return output
        z = self.direction(named["weight"])
        table = z.left if z.thin else z.whole
        assert table is not None
        with _given(module, {"weight": table}):
            seen = self._spread(module.forward(*inputs, **named_inputs))
        output = self._spread(output).contiguous()
        flat, seen = output.view(-1, output.shape[-1]), seen.reshape(-1, seen.shape[-1])
        for length, rows in self._parts(len(flat)):
            if z.thin:
                assert z.right is not None
                flat[rows].addmm_(seen[rows], z.right.T, alpha=length * z.scale)
            else:
                flat[rows].add_(seen[rows], alpha=length)
        return output

    def _swapped(
        self, module: nn.Module, named: dict[str, str], forward: Any, *args: Any, **named_args: Any
    ) -> Any:
        """The module's own forward with parameters moved by each sign."""
        self._called.update(named.values())
        if not self._signs:
            return forward(*args, **named_args)
        moves = {key: self.direction(name).dense() for key, name in named.items()}
        if len(self._signs) == 1:
            with _given(module, _moved(module, moves, self._signs[0] * self.rule.eps)):
                return forward(*args, **named_args)
        spread = [self._spread(one) if isinstance(one, Tensor) else one for one in args]
        parts = []
        for length, rows in self._parts(len(spread[0])):
            half = [one[rows] if isinstance(one, Tensor) else one for one in spread]
            with _given(module, _moved(module, moves, length)):
                parts.append(forward(*half, **named_args))
        return torch.cat(parts)


@contextmanager
def _given(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The module with these tensors in place of its own parameters."""
    table: dict[str, Any] = module._parameters
    kept = {key: table[key] for key in tensors}
    table.update(tensors)
    try:
        yield
    finally:
        table.update(kept)


def _moved(module: nn.Module, moves: dict[str, Tensor], length: float) -> dict[str, Tensor]:
    own: dict[str, Any] = module._parameters
    return {key: torch.add(own[key], z, alpha=length) for key, z in moves.items()}


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or type(module) is _conv1d()


@cache
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear, its weight (in, out)

    return Conv1D
