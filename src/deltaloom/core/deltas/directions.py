"""Random directions of zeroth-order tuning: each is made again from its place in the run alone.

A direction z of a parameter has E[z z'] = 1, so that `g z` with g = (L(p + eps z) - L(p - eps z)) /
(2 eps) estimates the gradient (Spall 1992, SPSA; Malladi et al. 2023, definition 1). Its place is
(seed, step, number of the perturbation in the step, parameter's name); nothing else decides it, so
one tensor of a run can be made again without the others. Kinds:

- `lowrank`: z = U V' / sqrt(r) with standard normal U (m, r) and V (n, r), for parameters of two
  dimensions or more (their last one is n); others take a normal z. E[z z'] = 1 as
  E[U_ik U_jl] = 1 where i, k = j, l. (LOZO, Chen et al. 2024, leaves out the root.)
- `rademacher`: every element is 1 or -1 with equal probability (Spall's own choice).
- `gaussian`: every element is standard normal (Malladi et al.'s choice).

Numbers are drawn on the CPU in float32, whatever the parameter's device, and rounded to its type.
The same machine draws the same numbers; another may differ in the last digit of a normal one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["lowrank", "rademacher", "gaussian"]


@dataclass(frozen=True)
class Direction:
    """z of one parameter: held whole, or as two thin sides with z = scale * left @ right'."""

    shape: tuple[int, ...]
    whole: Tensor | None = None
    left: Tensor | None = None
    """(m, r), with n the parameter's last dimension and m the product of the others."""
    right: Tensor | None = None
    """(n, r)."""
    scale: float = 1.0

    @property
    def thin(self) -> bool:
        """Whether it is held as two sides."""
        return self.whole is None

    def dense(self) -> Tensor:
        """z in the parameter's shape, in the type it was drawn for."""
        if self.whole is not None:
            return self.whole
        assert self.left is not None
        assert self.right is not None
        return (self.scale * (self.left @ self.right.T)).reshape(self.shape)


@dataclass(frozen=True)
class Directions:
    """Draws directions of one kind."""

    kind: Kind
    rank: int
    seed: int

    def of(self, step: int, number: int, name: str, like: Tensor) -> Direction:
        """The direction of the parameter `name`, in the shape, type and place of `like`."""
        generator = torch.Generator()
        generator.manual_seed(place(self.seed, step, number, name))
        shape = tuple(like.shape)
        if self.kind == "rademacher":
            return Direction(shape, _signs(shape, generator).to(like))
        if self.kind == "gaussian" or len(shape) < 2:
            return Direction(shape, torch.randn(shape, generator=generator).to(like))
        columns = shape[-1]
        rows = math.prod(shape) // columns
        sides = torch.randn((rows + columns) * self.rank, generator=generator).to(like)
        left, right = sides[: rows * self.rank], sides[rows * self.rank :]
        return Direction(
            shape,
            None,
            left.view(rows, self.rank),
            right.view(columns, self.rank),
            self.rank**-0.5,
        )


def place(seed: int, *where: int | str) -> int:
    """63 bits for a generator, from a seed and a place."""
    text = " ".join(map(str, (seed, *where)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones with random signs: eight to a byte, 64 to a draw."""
    count = math.prod(shape)
    draws = torch.empty(-(-count // 64), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    signs = _table().index_select(0, draws.view(torch.uint8).int())  # (bytes, 8)
    return signs.view(-1)[:count].view(shape)


@cache
def _table() -> Tensor:
    """Byte -> its eight bits as 1.0 or -1.0."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits * 2.0 - 1.0
