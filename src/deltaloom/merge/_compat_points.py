"""mergekit's points between models, rounded where it rounds: the spherical ones, stock, nearswap.

Norms and sums add in torch's order (`_compat_reduce.py`); karcher's inner products, which are a
BLAS's, are exact and rounded once.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.core.errors import WorkError
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_reduce import STEP, Reduction, down, whole
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._rule import Block, ElementRule, TensorRule
from deltaloom.merge._span import LANES, add_inner

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry


PIECE = 1 << 20
"""Elements that slerp sums at a time."""


class RowTensor(TensorRule):
    """One tensor as a matrix (rows, columns) of vectors, or as one vector; sums over each."""

    def __init__(self, rule: CompatRule, tensor: TensorEntry, *, by_row: bool = False):
        self.numbers, self.count = rule.numbers, tensor.count
        self.by_row = by_row and len(tensor.shape) > 1
        self.columns = tensor.shape[-1] if self.by_row else tensor.count
        self.unit = self.columns if self.by_row else STEP
        self._found: dict[Any, Reduction] = {}

    def add(self, key: Any, values: np.ndarray, start: int, *, squares: bool = False) -> None:
        """Add to the sums `key` of the vectors, or of their squares."""
        if key not in self._found:
            kind = self.numbers.work
            self._found[key] = Reduction(self.columns, self.count, kind, squares=squares)
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
        self.columns = min(PIECE, max(tensor.count, 1))
        self.t, self.factors = rule.t, (rule.t, rule.t)
        self.lengths: list[Any] = []

    def scan(self, number: int, block: Block) -> None:
        """Squares, then products."""
        models = self.numbers.read(block.models)
        if number == 0:
            for i, one in enumerate(models):
                self.add(i, one, block.start, squares=True)
            return
        units = [one / length for one, length in zip(models, self.lengths, strict=True)]
        self.add("cosine", units[0] * units[1], block.start)

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
        angle = kind(np.arccos(np.float64(cosine)))
        parts = [kind(np.sin(np.float64(a))) for a in ((1 - t) * angle, t * angle)]
        side = kind(np.sin(np.float64(angle)))
        self.factors = (parts[0] / side, parts[1] / side)

    def write(self, block: Block) -> None:
        """Sum."""
        first, second = self.numbers.read(block.models)
        np.multiply(first, self.factors[0], out=first)
        np.multiply(second, self.factors[1], out=second)
        self.numbers.round(np.add(first, second, out=block.out))


class CompatNearSwap(CompatRule, ElementRule):
    """The first model, moved towards the second by at most t."""

    needs_base = False

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

    def __init__(self, numbers: Numbers, t: float, *, changes: bool, by_row: bool, turned: bool):
        super().__init__(numbers)
        self.t, self.needs_base, self.by_row, self.turned = t, changes, by_row, turned

    def begin(self, tensor: TensorEntry, models: int) -> NuSlerpTensor:
        """See Rule."""
        return NuSlerpTensor(self, tensor)


class NuSlerpTensor(RowTensor):
    """One tensor under `CompatNuSlerp`: lengths, then cosines, then the sum."""

    scans = 2

    def __init__(self, rule: CompatNuSlerp, tensor: TensorEntry):
        super().__init__(rule, tensor, by_row=rule.by_row)
        self.rule = rule
        self.shape = tensor.shape
        self.turned = rule.turned and len(tensor.shape) > 1
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
        angle = n.of(np.arccos(np.where(straight, 0, cosine).astype(np.float64)))
        left, right = (
            n.of(np.sin(n.mul(angle, n.factor(one)).astype(np.float64))) for one in (1 - t, t)
        )
        whole = n.of(np.sin(angle.astype(np.float64)))
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


class CompatMultiSlerp(CompatRule):
    """The direction of a weighted sum of unit vectors, at the mean length."""

    def __init__(
        self,
        numbers: Numbers,
        weights: list[float],
        *,
        changes: bool,
        normalize: bool,
        least: float,
    ):
        super().__init__(numbers)
        self.needs_base = changes
        each = np.array([numbers.scalar(weight) for weight in weights], numbers.work)
        self.weights = numbers.div(each, numbers.total(list(each))) if normalize else each
        self.least = numbers.scalar(least)

    def begin(self, tensor: TensorEntry, models: int) -> MultiSlerpTensor:
        """See Rule."""
        return MultiSlerpTensor(self, tensor)


class MultiSlerpTensor(RowTensor):
    """One tensor under `CompatMultiSlerp`: lengths, the mean's, cosines, the tangent's length."""

    scans = 4

    def __init__(self, rule: CompatMultiSlerp, tensor: TensorEntry):
        super().__init__(rule, tensor)
        self.rule, self.name = rule, tensor.name

    def _vectors(self, block: Block) -> np.ndarray:
        n = self.numbers
        models = n.read(block.models)
        return n.sub(models, n.read(block.base)) if self.rule.needs_base else models

    def _lengths(self) -> np.ndarray:
        return np.concatenate([self.norms(i) for i in range(self.rule.weights.size)])

    def _units(self, vectors: np.ndarray) -> np.ndarray:
        n = self.numbers
        return n.div(vectors, n.add(self._lengths(), self.rule.least)[:, None])

    def _mean(self, units: np.ndarray) -> np.ndarray:
        n = self.numbers
        mean = n.rows(n.mul(units, self.rule.weights[:, None]))
        return n.div(mean, self.norms("mean")) if "mean" in self._found else mean

    def _tangent(self, units: np.ndarray, mean: np.ndarray) -> np.ndarray:
        n = self.numbers
        pulls = [n.sub(unit, n.mul(mean, self.sums(("cosine", i)))) for i, unit in enumerate(units)]
        return n.rows(n.mul(np.stack(pulls), self.rule.weights[:, None]))

    def scan(self, number: int, block: Block) -> None:
        """See the class."""
        vectors, start = self._vectors(block), block.start
        if number == 0:
            for i, one in enumerate(vectors):
                self.add(i, one, start, squares=True)
            return
        units = self._units(vectors)
        if number == 1:
            n = self.numbers
            mean = n.rows(n.mul(units, self.rule.weights[:, None]))
            self.add("mean", mean, start, squares=True)
            return
        mean = self._mean(units)
        if number == 2:
            for i, unit in enumerate(units):
                self.add(("cosine", i), self.numbers.mul(unit, mean), start)
            return
        tangent = self._tangent(units, mean)
        self.add("tangent", tangent, start, squares=True)

    def scanned(self, number: int) -> None:
        """Where the directions cancel there is a line between two models, and else no mean."""
        if number == 1 and self.norms("mean")[0] < 1e-8:
            if self.rule.weights.size != 2:
                raise WorkError(
                    f"tensor {self.name!r}: the directions of the models cancel at these weights, "
                    "so they have no mean; choose other weights"
                )
            self.scans = 2

    def write(self, block: Block) -> None:
        """Sum."""
        n = self.numbers
        vectors = self._vectors(block)
        if self.scans == 2:
            merged = n.add(*n.mul(vectors, self.rule.weights[:, None]))
        else:
            units = self._units(vectors)
            mean = self._mean(units)
            size = n.add(self.norms("tangent"), self.rule.least)
            turn = n.of(np.cos(size.astype(np.float64)))
            step = n.div(n.of(np.sin(size.astype(np.float64))), size)
            merged = n.add(n.mul(mean, turn), n.mul(self._tangent(units, mean), step))
            merged = n.mul(merged, n.total(list(n.mul(self._lengths(), self.rule.weights))))
        block.out[:] = n.add(merged, n.read(block.base)) if self.rule.needs_base else merged


class CompatStock(CompatRule):
    """Between the base and the models' mean, as far as the angle between their changes says."""

    def __init__(self, numbers: Numbers, *, by_row: bool):
        super().__init__(numbers)
        self.by_row = by_row

    def begin(self, tensor: TensorEntry, models: int) -> StockTensor:
        """See Rule."""
        return StockTensor(self, tensor, models)


class StockTensor(RowTensor):
    """One tensor under `CompatStock`."""

    scans = 1

    def __init__(self, rule: CompatStock, tensor: TensorEntry, models: int):
        super().__init__(rule, tensor, by_row=rule.by_row)
        self.models, self.pairs = models, list(combinations(range(models), 2))
        self.t = np.zeros(1)

    def scan(self, number: int, block: Block) -> None:
        """Lengths and inner products of the changes."""
        n = self.numbers
        changes = n.sub(n.read(block.models), n.read(block.base))
        for i, one in enumerate(changes):
            self.add(i, one, block.start, squares=True)
        for i, j in self.pairs:
            self.add((i, j), n.mul(changes[i], changes[j]), block.start)

    def scanned(self, number: int) -> None:
        """Find the share of the mean."""
        n = self.numbers
        cosines = []
        for pair in self.pairs:
            sizes = np.maximum(n.mul(*(self.norms(i) for i in pair)), n.scalar(1e-6))
            cosines.append(np.clip(n.div(self.sums(pair), sizes), -1, 1))
        total = np.sum(np.stack(cosines), axis=0, dtype=n.work)
        cosine = n.round(total / n.work(len(cosines)))
        below = n.add(n.mul(cosine, n.factor(self.models - 1)), n.work(1))
        lost = np.abs(below) < 1e-6
        t = n.div(n.mul(cosine, n.factor(self.models)), np.where(lost, n.work(1), below))
        self.t = np.where(lost, n.work(0), t)

    def write(self, block: Block) -> None:
        """Sum."""
        n = self.numbers
        models, base = n.read(block.models), self.view(n.read(block.base))
        mean = n.work(0)
        for one in models:
            mean = n.add(mean, one)
        mean = self.view(n.div(mean, n.factor(self.models)))
        t = self.at(self.t, block)
        merged = n.add(n.mul(t, mean), n.mul(n.sub(n.work(1), t), base))
        block.out[:] = merged.ravel()


class CompatKarcher(CompatRule):
    """The mean on the sphere of equal models; every tensor is held whole."""

    needs_base = False

    def __init__(self, numbers: Numbers, steps: int, tol: float):
        super().__init__(numbers)
        self.steps, self.tol = steps, tol

    def begin(self, tensor: TensorEntry, models: int) -> KarcherTensor:
        """See Rule."""
        return KarcherTensor(self, tensor)


class KarcherTensor(TensorRule):
    """One tensor under `CompatKarcher`."""

    def __init__(self, rule: CompatKarcher, tensor: TensorEntry):
        self.rule, self.numbers = rule, rule.numbers
        self.unit = tensor.count

    def _inner(self, left: np.ndarray, right: np.ndarray) -> np.float64:
        sums = np.zeros(1)
        add_inner(left, right, 0, left.size, np.zeros(LANES), sums)
        return sums[0]

    def _length(self, vector: np.ndarray) -> Any:
        """In float32, or float64 where the format is."""
        return np.sqrt(whole(vector, squares=True))

    def _tangent(self, mean: np.ndarray, units: list[np.ndarray], share: float) -> np.ndarray:
        n = self.numbers
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip(n.scalar(self._inner(mean, unit)), -1, 1)
            angle = n.scalar(np.arccos(np.float64(cosine)))
            if angle < self.rule.tol:
                continue
            stretch = n.div(np.array([angle]), n.scalar(np.sin(np.float64(angle))))
            pull = n.sub(unit, n.mul(mean, cosine))
            tangent = n.add(tangent, n.mul(pull, n.mul(stretch, n.factor(share))))
        return tangent

    def write(self, block: Block) -> None:
        """Iterate."""
        n, tol = self.numbers, self.rule.tol
        models = n.read(block.models)
        lengths = [self._length(one) for one in models]
        units = [
            n.div(one, length)
            for one, length in zip(models, lengths, strict=True)
            if float(length) > tol
        ]
        if len(models) == 1 or not units:
            block.out[:] = models[0] if len(models) == 1 else 0
            return
        share = 1.0 / len(models)
        own = share / sum([share] * len(units))
        mean = np.zeros_like(units[0])
        for unit in units:
            mean = n.add(mean, n.mul(unit, n.factor(own)))
        size = self._length(mean)
        mean = units[0] if float(size) < tol else n.div(mean, size)
        for _ in range(self.rule.steps):
            tangent = self._tangent(mean, units, own)
            size = self._length(tangent)
            if float(size) < tol:
                break
            turn, step = (n.scalar(f(np.float64(size))) for f in (np.cos, np.sin))
            mean = n.add(n.mul(mean, turn), n.mul(n.div(tangent, size), step))
            if float(length := self._length(mean)) > tol:
                mean = n.div(mean, length)
        scale = n.work(0)
        for length in lengths:
            scale = scale + n.factor(share) * length
        block.out[:] = n.mul(mean, n.scalar(scale))  # the factor's own format is the models' here
