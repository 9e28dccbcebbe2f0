"""mergekit's points between models, rounded where it rounds: slerp, nuslerp, nearswap.

Norms and sums add in torch's order (`_compat_reduce.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.merge._compat_functions import as_torch
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_reduce import STEP, WIDTH, Reduction, down, whole
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._rule import Block, ElementRule, TensorRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry


PIECE = 1 << 20
"""Elements that slerp sums at a time."""


class RowTensor(TensorRule):
    """One tensor as a matrix (rows, columns) of vectors, or as one vector; sums over each."""

    def __init__(self, rule: CompatRule, tensor: TensorEntry, *, by_row: bool = False):
        self.numbers, self.count = rule.numbers, tensor.count
        self.by_row, self.columns = False, tensor.count
        if by_row and len(tensor.shape) > 1:
            self.by_row, self.columns = True, tensor.shape[-1]
        self.unit = self.columns if self.by_row else STEP
        self.lanes = 1 if self.numbers.name == "float16" else WIDTH
        self._found: dict[Any, Reduction] = {}

    def add(self, key: Any, values: np.ndarray, start: int, *, squares: bool = False) -> None:
        """Add to the sums `key` of the vectors, or of their squares."""
        if key not in self._found:
            kind, lanes = self.numbers.work, self.lanes
            self._found[key] = Reduction(
                self.columns, self.count, kind, squares=squares, lanes=lanes
            )
        self._found[key].add(values, start)

    def sums(self, key: Any) -> np.ndarray:
        """The finished sums (rows,) as numbers of the format."""
        return self.numbers.round(self._found[key].sums.copy())

    def norms(self, key: Any) -> np.ndarray:
        """The lengths (rows,) of vectors whose squares are summed under `key`."""
        return self.numbers.round(np.sqrt(self._found[key].sums))

    def view(self, values: np.ndarray) -> np.ndarray:
        """A block (n,) as (rows seen, columns seen)."""
        return values.reshape(-1, self.columns if self.by_row else values.size)

    def at(self, each: np.ndarray, block: Block) -> np.ndarray:
        """Numbers (rows,) beside a block: (rows seen, 1)."""
        if not self.by_row:
            return each[:1, None]
        row = block.start // self.columns
        return each[row : row + block.out.size // self.columns, None]


class CompatSlerp(CompatRule):
    """On the arc between two models, coefficients and sum in float32 whatever the format."""

    needs_base = False
    in_torch = True

    def __init__(self, numbers: Numbers, t: float):
        super().__init__(numbers)
        self.t = numbers.work(t)

    def begin(self, tensor: TensorEntry, models: int) -> SlerpTensor:
        """See Rule."""
        return SlerpTensor(self, tensor)


class SlerpTensor(RowTensor):
    """One tensor under `CompatSlerp`: lengths, then the cosine, in pieces of a million."""

    scans = 2

    def __init__(self, rule: CompatSlerp, tensor: TensorEntry):
        super().__init__(rule, tensor)
        self.columns, self.lanes = min(PIECE, max(tensor.count, 1)), WIDTH
        self.t, self.factors = rule.t, (rule.t, rule.t)
        self.lengths: list[Any] = []

    def scan(self, number: int, block: Block) -> None:
        """Squares, then products."""
        models = self.numbers.read(block.models)
        if number == 0:
            for i, one in enumerate(models):
                self.add(i, one, block.start, squares=True)
            return
        for one, length in zip(models, self.lengths, strict=True):
            np.divide(one, length, out=one)
        first, second = models
        self.add("cosine", np.multiply(first, second, out=first), block.start)

    def scanned(self, number: int) -> None:
        """Find the coefficients."""
        kind, t = self.numbers.work, self.t
        if number == 0:
            for i in (0, 1):
                length = np.sqrt(whole(np.sqrt(self._found[i].sums), squares=True))
                self.lengths.append(length if length > 1e-8 else kind(1))
            return
        cosine = np.clip(whole(self._found["cosine"].sums), kind(-1), kind(1))
        if abs(cosine) > 0.9995:
            self.factors = (1 - t, t)
            return
        wide = Numbers(np.dtype(kind).name)
        angle = as_torch("acos", cosine, wide)[()]
        left, right, side = as_torch("sin", [(1 - t) * angle, t * angle, angle], wide)
        self.factors = (left / side, right / side)

    def write(self, block: Block) -> None:
        """Sum."""
        first, second = self.numbers.read(block.models)
        np.multiply(first, self.factors[0], out=first)
        np.multiply(second, self.factors[1], out=second)
        self.numbers.round(np.add(first, second, out=block.out))


class CompatNearSwap(CompatRule, ElementRule):
    """The first model, moved towards the second by at most t."""

    needs_base = False
    spare = 24

    def __init__(self, numbers: Numbers, t: float):
        super().__init__(numbers)
        self.t = t

    def write(self, block: Block) -> None:
        """See TensorRule."""
        n = self.numbers
        first, second = n.read(block.models)
        apart = np.maximum(np.abs(n.sub(first, second)), n.scalar(1e-6))
        share = n.mul(n.div(n.work(1), apart), n.factor(self.t))
        share = np.clip(share, 0, 1)
        left = n.mul(n.sub(n.work(1), share), first)
        block.out[:] = n.add(n.mul(share, second), left)


class CompatNuSlerp(CompatRule):
    """On the arc between two models or changes: by tensor, by row, or along the first axis."""

    in_torch = True

    def __init__(self, numbers: Numbers, t: float, *, changes: bool, by_row: bool, turned: bool):
        super().__init__(numbers)
        self.t, self.needs_base, self.by_row, self.turned = t, changes, by_row, turned

    def begin(self, tensor: TensorEntry, models: int) -> NuSlerpTensor:
        """See Rule."""
        return NuSlerpTensor(self, tensor)


class NuSlerpTensor(RowTensor):
    """One tensor under `CompatNuSlerp`: lengths, then cosines, then the sum."""

    scans = 2
    spare = 40

    def __init__(self, rule: CompatNuSlerp, tensor: TensorEntry):
        super().__init__(rule, tensor, by_row=rule.by_row)
        self.rule = rule
        self.shape = tensor.shape
        self.turned = rule.turned and len(self.shape) > 1
        if self.turned:  # vectors along the first axis: the whole tensor at once, axes swapped
            self.unit, self.columns, self.by_row = tensor.count, tensor.shape[0], True

    def view(self, values: np.ndarray) -> np.ndarray:
        """See RowTensor."""
        if not self.turned:
            return super().view(values)
        return np.ascontiguousarray(values.reshape(self.shape).swapaxes(0, -1)).reshape(
            -1, self.columns
        )

    def add(self, key: Any, values: np.ndarray, start: int, *, squares: bool = False) -> None:
        """See RowTensor; along the first axis torch adds element after element."""
        if not self.turned:
            return super().add(key, values, start, squares=squares)
        self._found[key] = Reduction(self.columns, self.count, self.numbers.work, squares=squares)
        self._found[key].sums[:] = down(values * values if squares else values, plain=squares)
        return None

    def _ends(self, block: Block) -> list[np.ndarray]:
        n = self.numbers
        models = n.read(block.models)
        if self.rule.needs_base:
            base = n.read(block.base)
            return [self.view(n.sub(one, base)) for one in models]
        return [self.view(one) for one in models]

    def scan(self, number: int, block: Block) -> None:
        """Lengths, then cosines."""
        ends = self._ends(block)
        if number == 0:
            for i, end in enumerate(ends):
                self.add(i, end, block.start, squares=True)
            return
        n, least = self.numbers, self.numbers.scalar(1e-7)
        units = [
            n.div(end, self.at(np.maximum(self.norms(i), least), block))
            for i, end in enumerate(ends)
        ]
        self.add("cosine", n.mul(*units), block.start)

    def scanned(self, number: int) -> None:
        """See TensorRule."""

    def write(self, block: Block) -> None:
        """Sum."""
        n, t = self.numbers, self.rule.t
        first, second = self._ends(block)
        cosine = np.clip(self.sums("cosine"), -1, 1)
        straight = n.sub(n.work(1), n.mul(cosine, cosine)) <= 1e-16
        angle = as_torch("acos", np.where(straight, 0, cosine), n)
        left, right = (as_torch("sin", n.mul(angle, n.factor(one)), n) for one in (1 - t, t))
        whole = as_torch("sin", angle, n)
        bent = n.add(n.mul(self.at(left, block), first), n.mul(self.at(right, block), second))
        bent = n.div(bent, self.at(whole, block))
        line = n.add(n.mul(first, n.factor(1 - t)), n.mul(second, n.factor(t)))
        merged = np.where(self.at(straight, block), line, bent)
        if self.turned:
            shape = (self.shape[-1], *self.shape[1:-1], self.shape[0])
            merged = merged.reshape(shape).swapaxes(0, -1)
        block.out[:] = merged.ravel()
        if self.rule.needs_base:
            block.out[:] = n.add(n.read(block.base), block.out)
