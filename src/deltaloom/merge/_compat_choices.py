"""mergekit's choices of elements, rounded where it rounds: SCE, Arcee Fusion, RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_points import RowTensor
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._order import OrderStatistics
from deltaloom.merge._rule import Block, ElementRule, TensorRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry


def _changes(numbers: Numbers, block: Block) -> np.ndarray:
    return numbers.sub(numbers.read(block.models), numbers.read(block.base))


class CompatSce(CompatRule):
    """Changes by variance, energy and sign."""

    def __init__(self, numbers: Numbers, density: float):
        super().__init__(numbers)
        self.density = density

    def begin(self, tensor: TensorEntry, models: int) -> SceTensor:
        """See Rule."""
        return SceTensor(self, tensor, models)


class SceTensor(RowTensor):
    """One tensor under `CompatSce`: two scans choose by variance, one sums energies."""

    def __init__(self, rule: CompatSce, tensor: TensorEntry, models: int):
        super().__init__(rule, tensor)
        self.density, self.models = rule.density, models
        self.order = OrderStatistics([1]) if 0 < rule.density < 1 else None
        self.scans = 1 if self.order is None else 3
        self.varied = self.left = 0
        self.weights = np.zeros(models)

    def scan(self, number: int, block: Block) -> None:
        """Count variances by their bits twice, then add up energies."""
        n = self.numbers
        changes = _changes(n, block)
        if self.order is not None and number < 2:
            varied = self._variance(changes)
            self.varied += int(np.count_nonzero(varied)) if number == 0 else 0
            self.order.count(number, varied.view(np.uint32))
            return
        for i, one in enumerate(self._selected(changes)):
            self.add(i, n.mul(one, one), block.start)

    def scanned(self, number: int) -> None:
        """See TensorRule."""
        n = self.numbers
        if self.order is not None and number < 2:
            if number == 0:
                kept = int(np.float32(self.varied) * np.float32(self.density))
                self.order.equal = [kept]
            if self.order.equal[0]:
                self.order.counted(number)
        else:
            sums = np.concatenate([self._found[i].sums for i in range(self.models)])
            energy = n.div(sums, n.factor(self.count))
            total = n.total(list(energy))
            if abs(total) < 1e-6:
                energy, total = np.ones_like(energy), n.factor(self.models)
            self.weights = n.div(energy, total)
        self.left = self.order.equal[0] if self.order is not None else 0

    def _variance(self, changes: np.ndarray) -> np.ndarray:
        """The variance (n,) over the models, float32 for its bits; updated model by model, as
        torch does, in float32 for the small formats and in float64 else.
        """
        wide = np.float32 if self.numbers.kind else np.float64
        mean = np.zeros(changes.shape[1], wide)
        squares = np.zeros_like(mean)
        for i, one in enumerate(changes):
            apart = one.astype(wide) - mean
            mean += apart / wide(i + 1)
            squares += apart * (one - mean)
        return self.numbers.of(squares / wide(len(changes))).astype(np.float32, copy=False)

    def _selected(self, changes: np.ndarray) -> np.ndarray:
        from deltaloom.merge._kernels import trim

        if self.order is None:
            return changes if self.density >= 1 else np.zeros_like(changes)
        if not self.order.equal[0]:
            return np.zeros_like(changes)
        bits = self._variance(changes).view(np.uint32)
        self.left = trim(bits, self.order.bits[0], self.left)
        changes[:, bits == 0] = 0
        return changes

    def write(self, block: Block) -> None:
        """Select again, elect signs, and take the weighted mean of those that agree."""
        n = self.numbers
        changes = self._selected(_changes(n, block))
        positive = n.rows(changes) >= 0
        agrees = np.where(positive, changes > 0, changes < 0)
        shares = np.where(agrees, self.weights[:, None], n.work(0))
        merged = n.rows(n.mul(changes, shares))
        mass = np.maximum(n.rows(shares), n.scalar(1e-6))
        block.out[:] = n.add(n.read(block.base), n.div(merged, mass))


class CompatFusion(CompatRule):
    """The first model, and the second's change where it is important; ends in float32."""

    needs_base = False

    def begin(self, tensor: TensorEntry, models: int) -> FusionTensor:
        """See Rule."""
        return FusionTensor(self, tensor)


class FusionTensor(TensorRule):
    """One tensor under `CompatFusion`: two scans find the quartiles of the importance."""

    scans = 2

    def __init__(self, rule: CompatFusion, tensor: TensorEntry):
        self.numbers, count = rule.numbers, tensor.count
        self.unit = tensor.shape[-1] if tensor.shape else 1
        self.order = OrderStatistics([count - int(q * (count - 1)) for q in (0.25, 0.5, 0.75)])
        self.threshold = self.numbers.work(0)

    def _importance(self, block: Block) -> np.ndarray:
        n = self.numbers
        first, second = (one.reshape(-1, self.unit) for one in n.read(block.models))
        p, q = (n.add(self._softmax(one), n.scalar(1e-8)) for one in (second, first))
        with np.errstate(all="ignore"):  # float16 has no 1e-8, so that p / q may be 0 / 0
            logs = n.of(np.log(n.div(p, q).astype(np.float64)))
        apart = n.mul(p, logs).sum(axis=-1, keepdims=True, dtype=np.float64)
        return n.mul(np.abs(n.sub(second, first)), n.of(apart)).ravel()

    def _softmax(self, rows: np.ndarray) -> np.ndarray:
        powers = np.exp((rows - rows.max(axis=-1, keepdims=True)).astype(np.float64))
        return self.numbers.of(powers / powers.sum(axis=-1, keepdims=True))

    def scan(self, number: int, block: Block) -> None:
        """Count importances by their bits, signs included."""
        self.order.count(number, _rising(self._importance(block)))

    def scanned(self, number: int) -> None:
        """After scan 1 the quartiles are known."""
        self.order.counted(number)
        if number == 1:
            n = self.numbers
            low, median, high = (n.work(one) for one in _numbers(self.order.bits))
            apart = n.sub(np.array([high]), low)
            self.threshold = n.add(n.mul(apart, n.factor(1.5)), median)[0]

    def write(self, block: Block) -> None:
        """The first, and the change where it is important."""
        n = self.numbers
        chosen = self._importance(block) >= self.threshold
        first, second = block.models
        np.add(first, n.sub(second, first) * chosen, out=block.out)


def _rising(values: np.ndarray) -> np.ndarray:
    """Numbers as 31 bits that rise with them: the last bit of a float32 is given up for its sign.

    Importances are hardly negative, and then tiny: rounding can put a divergence below zero.
    """
    bits = values.astype(np.float32).view(np.uint32)
    half = (bits & np.uint32(0x7FFFFFFF)) >> np.uint32(1)
    return np.where(bits >> np.uint32(31), np.uint32(0x3FFFFFFF) - half, half + np.uint32(1 << 30))


def _numbers(bits: list[int]) -> np.ndarray:
    """The other way."""
    rising = np.array(bits, np.uint32)
    negative = rising < np.uint32(1 << 30)
    size = np.where(negative, np.uint32(0x3FFFFFFF) - rising, rising - np.uint32(1 << 30))
    found = (size << np.uint32(1)).astype(np.uint32).view(np.float32)
    return np.where(negative, -found, found)


class CompatRam(CompatRule, ElementRule):
    """Changes that one model makes alone, and the mean of those that several make."""

    def __init__(self, numbers: Numbers, least: float):
        super().__init__(numbers)
        self.least = numbers.scalar(least)

    def write(self, block: Block) -> None:
        """See TensorRule."""
        n = self.numbers
        changes, counts = _moved(n, block, self.least)
        shares = n.div(changes, np.maximum(counts, 1).astype(n.work))
        block.out[:] = n.add(n.read(block.base), n.rows(shares))


def _moved(n: Numbers, block: Block, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Changes (k, n) longer than `least`, others 0; and how many models have one (n,)."""
    changes = _changes(n, block)
    moved = np.abs(changes) > least
    changes[~moved] = 0
    return changes, moved.sum(axis=0)


class CompatRamPlus(CompatRule):
    """As `CompatRam`, what a model changes alone amplified by how much it shares."""

    def __init__(self, numbers: Numbers, least: float, rate: float, most: float):
        super().__init__(numbers)
        self.least, self.given = numbers.scalar(least), least
        self.rate, self.most = rate, most

    def begin(self, tensor: TensorEntry, models: int) -> RamPlusTensor:
        """See Rule."""
        return RamPlusTensor(self, models)


class RamPlusTensor(TensorRule):
    """One tensor under `CompatRamPlus`: one scan counts."""

    scans = 1

    def __init__(self, rule: CompatRamPlus, models: int):
        self.rule, self.numbers = rule, rule.numbers
        self.shared, self.alone = np.zeros((2, models), np.int64)
        self.factors = np.ones((models, 1), rule.numbers.work)

    def scan(self, number: int, block: Block) -> None:
        """Count changes that others make too, and those that they do not."""
        changes, counts = _moved(self.numbers, block, self.rule.least)
        moved = changes != 0
        self.shared += (moved & (counts > 1)).sum(axis=1)
        self.alone += (moved & (counts == 1)).sum(axis=1)

    def scanned(self, number: int) -> None:
        """Find the factors, in float32."""
        kind, rule = self.numbers.work, self.rule
        single = np.float32
        alone = np.maximum(self.alone.astype(single), single(rule.given))
        ratio = np.clip(self.shared.astype(single) / alone, 0, single(rule.most))
        self.factors = (single(1) + single(rule.rate) * ratio).astype(kind)[:, None]

    def write(self, block: Block) -> None:
        """Sum in float32, with the format's rounding of the shared part only."""
        n = self.numbers
        changes, counts = _moved(n, block, self.rule.least)
        shared = n.div(changes, np.maximum(counts, 1).astype(n.work))
        parts = np.where(counts == 1, changes * self.factors, shared)
        out = block.out
        out[:] = 0
        for part in parts:
            out += part
        np.add(n.read(block.base), out, out=out)
