"""Steps of zeroth-order tuning on one tensor at a time, and their replay from the run's scalars.

With q perturbations of a step, the gradient's estimate is G = sum_k g_k z_k / q (n-SPSA, Malladi et
al. 2023, section 2). The forms, in torch's own definitions of its optimizers:

- `sgd`: p -= lr G
- `momentum`: m = momentum m + G; p -= lr m
- `adam`: m = b1 m + (1 - b1) G; v = b2 v + (1 - b2) G^2; p -= lr m^ / (sqrt(v^) + 1e-8), where m^
  and v^ are m and v divided by 1 - b1^t and 1 - b2^t

A step on a 16-bit parameter is made in float32 and rounded up or down at random, with
probabilities that keep its expectation (stochastic rounding: Gupta et al. 2015), because steps of
MeZO's size are mostly below half the distance of two 16-bit numbers and would be lost. The random
bits are a hash of the element's place, so they are the same on any device and for any threads.

`gaussian` is the published procedure: weights are moved in place by eps z, -2 eps z and eps z, and
what rounding leaves of that is part of the run, so the replay moves them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from deltaloom.core.deltas.directions import Direction, Directions, Kind, place
from deltaloom.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

WIDE = (torch.float32, torch.float64)
"""Types in which a step is added as it is."""
BLOCK = 2**18
"""Elements whose change is held in float32 at once. Ours: 1 MiB stays in a core's cache."""
ADAM_EPS = 1e-8
HALF_NORMAL, HALF_UNIT = 2.0**-14, 2.0**-24
"""Below the first, float16 numbers are multiples of the second. (bfloat16's range is float32's.)"""
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 mantissa that a 16-bit type does not have."""


class Rule(Spec):
    """What decides a run's weights beside its start and its scalars."""

    seed: int
    """Seed of all directions and roundings."""
    direction: Kind
    """Kind of the directions."""
    rank: int
    """Rank of low-rank directions."""
    eps: float
    """Length of a perturbation."""
    update: Literal["sgd", "momentum", "adam"]
    """Form of the step."""
    momentum: float
    """Decay of the momentum, and Adam's first."""
    decay: float
    """Adam's decay of the squares."""

    @property
    def directions(self) -> Directions:
        """The directions it draws."""
        return Directions(self.direction, self.rank, self.seed)


@dataclass(frozen=True)
class Scalars:
    """What one step measured."""

    lr: float
    values: tuple[float, ...]
    """(q,) the g_k."""


@dataclass
class Descent:
    """Steps by a rule; keeps what momentum and Adam remember, in float32 per parameter."""

    rule: Rule
    memory: dict[str, list[Tensor]] = field(default_factory=dict)

    def step(
        self, number: int, name: str, tensor: Tensor, found: Scalars, drawn: Sequence[Direction]
    ) -> None:
        """Make step `number` (from 0) on the parameter `name`, in place; `drawn` has (q,) z."""
        weights = [value / len(found.values) for value in found.values]
        seed = place(self.rule.seed, number, name)
        if self.rule.update == "sgd":
            weights = [-found.lr * weight for weight in weights]
            _add_directions(tensor, drawn, weights, seed)
            return
        if name not in self.memory:
            self.memory[name] = self._start(tensor)
        memory = self.memory[name]
        factor, divisor = -found.lr, None
        if self.rule.update == "momentum":
            memory[0].mul_(self.rule.momentum)
            _add_directions(memory[0], drawn, weights, seed)
        else:
            first, second = self.rule.momentum, self.rule.decay
            estimate = torch.zeros_like(memory[0])
            _add_directions(estimate, drawn, weights, seed)
            memory[0].mul_(first).add_(estimate, alpha=1 - first)
            memory[1].mul_(second).addcmul_(estimate, estimate, value=1 - second)
            factor /= 1 - first ** (number + 1)
            divisor = math.sqrt(1 - second ** (number + 1))
        _add_blocks(tensor, seed, lambda rows: _moved(memory, rows, factor, divisor))

    def _start(self, tensor: Tensor) -> list[Tensor]:
        # float64 only where the tensor is: the oracles of the tests
        wide = tensor.dtype if tensor.dtype in WIDE else torch.float32
        count = 1 if self.rule.update == "momentum" else 2
        return [torch.zeros_like(tensor, dtype=wide) for _ in range(count)]


def replay(rule: Rule, name: str, tensor: Tensor, steps: Sequence[Scalars]) -> Any:
    """Make all `steps` again on one parameter, in place; returns what momentum or Adam remember."""
    descent, directions = Descent(rule), rule.directions
    with torch.no_grad():
        for number, found in enumerate(steps):
            drawn = [directions.of(number, k, name, tensor) for k in range(len(found.values))]
            if rule.direction == "gaussian":
                for one in drawn:
                    for share in (1, -2, 1):
                        move(tensor, one, share * rule.eps)
            descent.step(number, name, tensor, found, drawn)
    return descent.memory.get(name)


def move(tensor: Tensor, direction: Direction, length: float) -> None:
    """Add `length` z in place, rounded as the tensor's type does."""
    tensor.add_(direction.dense(), alpha=length)


def _moved(memory: list[Tensor], rows: slice, factor: float, divisor: float | None) -> Tensor:
    first = _rows(memory[0])[rows]
    if divisor is None:
        return factor * first
    return factor * first / (_rows(memory[1])[rows].sqrt() / divisor + ADAM_EPS)


def _add_directions(
    tensor: Tensor, drawn: Sequence[Direction], weights: Sequence[float], seed: int
) -> None:
    """`tensor` += sum of weight * z."""
    if drawn[0].thin:
        scaled = zip(drawn, weights, strict=True)
        left = torch.cat([_wide(one.left, tensor) * (one.scale * w) for one, w in scaled], 1)
        right = torch.cat([_wide(one.right, tensor) for one in drawn], 1)
        if tensor.dtype in WIDE:
            _rows(tensor).addmm_(left, right.T)
        else:
            _add_blocks(tensor, seed, lambda rows: left[rows] @ right.T)
    elif tensor.dtype in WIDE:
        for one, weight in zip(drawn, weights, strict=True):
            tensor.add_(one.dense().to(tensor.dtype), alpha=weight)
    else:
        pairs = [(_rows(one.dense()), w) for one, w in zip(drawn, weights, strict=True)]
        _add_blocks(tensor, seed, lambda rows: sum(w * z[rows].float() for z, w in pairs))


def _add_blocks(tensor: Tensor, seed: int, change: Any) -> None:
    """`tensor` += `change(rows)`, a block of rows at a time."""
    flat = _rows(tensor)  # (m, n)
    height = max(1, BLOCK // max(1, flat.shape[1]))
    for start in range(0, len(flat), height):
        rows = slice(start, start + height)
        block = flat[rows]
        if tensor.dtype in WIDE:
            block += change(rows)
        else:
            value = block.float() + change(rows)
            block.copy_(round_at_random(value, tensor.dtype, place(seed, start)))


def round_at_random(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Float32 `value` as `dtype`: one of its two neighbours, in expectation `value` itself.

    Values that `dtype` has stay as they are. Not covered: values beyond its largest.
    """
    noise = _hash(value.numel(), seed, value.device).view(value.shape)
    bits = DROPPED[dtype]
    low = (1 << bits) - 1
    # The float32 below in magnitude, or above when the dropped bits plus noise carry over.
    rounded = ((value.view(torch.int32) + (noise & low)) & ~low).view(torch.float32)
    if dtype == torch.float16:
        share = (noise & 0xFFFFFF).float() * 2.0**-24  # uniform in [0, 1)
        small = torch.floor(value / HALF_UNIT + share) * HALF_UNIT
        rounded = torch.where(value.abs() < HALF_NORMAL, small, rounded)
    return rounded.to(dtype)


def _hash(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) int32 of random bits: Wellons' `lowbias32` of the element's number."""
    x = torch.arange(count, dtype=torch.int32, device=device)
    x.bitwise_xor_(_signed(seed))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_((x >> shift) & ((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    """The low 32 bits as int32 has them."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _rows(tensor: Tensor) -> Tensor:
    """A view (m, n), n the last dimension; vectors become one row."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)


def _wide(side: Tensor | None, tensor: Tensor) -> Tensor:
    assert side is not None
    return side.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
