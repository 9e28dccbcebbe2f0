"""mergekit's means of several models, rounded where it rounds: multislerp, model stock, karcher.

Norms and sums add in torch's order (`_compat_reduce.py`).
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.core.errors import WorkError
from deltaloom.merge._compat_functions import as_torch
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_points import RowTensor
from deltaloom.merge._compat_reduce import whole
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._rule import Block, TensorRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry


class CompatMultiSlerp(CompatRule):
    """The direction of a weighted sum of unit vectors, at the mean length."""

    in_torch = True

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
        return MultiSlerpTensor(self, tensor, models)


class MultiSlerpTensor(RowTensor):
    """One tensor under `CompatMultiSlerp`: lengths, the mean's, cosines, the tangent's length."""

    scans = 4

    def __init__(self, rule: CompatMultiSlerp, tensor: TensorEntry, models: int):
        super().__init__(rule, tensor)
        self.rule, self.name = rule, tensor.name
        self.spare = 16 * models + 16  # vectors, units, pulls and their products, and the mean

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
        pulls = np.empty_like(units)
        for i, unit in enumerate(units):
            pulls[i] = n.sub(unit, n.mul(mean, self.sums(("cosine", i))))
        return n.rows(n.mul(pulls, self.rule.weights[:, None]))

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
            turn = as_torch("cos", size, n)
            step = n.div(as_torch("sin", size, n), size)
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
        self.spare = 4 * models + 16
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
    in_torch = True

    def __init__(self, numbers: Numbers, steps: int, tol: float):
        super().__init__(numbers)
        self.steps, self.tol = steps, tol

    def begin(self, tensor: TensorEntry, models: int) -> KarcherTensor:
        """See Rule."""
        return KarcherTensor(self, tensor, models)


class KarcherTensor(TensorRule):
    """One tensor under `CompatKarcher`."""

    def __init__(self, rule: CompatKarcher, tensor: TensorEntry, models: int):
        self.rule, self.numbers = rule, rule.numbers
        self.unit = tensor.count
        self.spare = 4 * models + 40  # units, the mean, a tangent's steps, torch's copies

    def _length(self, vector: np.ndarray) -> Any:
        """In float32, or float64 where the format is."""
        return np.sqrt(whole(vector, squares=True))

    def _tangent(self, mean: np.ndarray, units: list[np.ndarray], share: float) -> np.ndarray:
        n = self.numbers
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip(as_torch("dot", mean, n, unit), -1, 1)
            angle = as_torch("acos", [cosine], n)
            if angle[0] < self.rule.tol:
                continue
            stretch = n.div(angle, as_torch("sin", angle, n))
            pull = n.sub(unit, n.mul(mean, cosine))
            tangent = n.add(tangent, n.mul(pull, n.mul(stretch, n.factor(share))))
        return tangent

    def write(self, block: Block) -> None:
        """Iterate."""
        n, tol = self.numbers, self.rule.tol
        wide = Numbers(np.dtype(n.work).name)
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
            turn, step = (n.scalar(as_torch(f, size, wide)) for f in ("cos", "sin"))
            mean = n.add(n.mul(mean, turn), n.mul(n.div(tangent, size), step))
            if float(length := self._length(mean)) > tol:
                mean = n.div(mean, length)
        scale = n.work(0)
        for length in lengths:
            scale = scale + n.factor(share) * length
        block.out[:] = n.mul(mean, n.scalar(scale))  # the factor's own format is the models' here
