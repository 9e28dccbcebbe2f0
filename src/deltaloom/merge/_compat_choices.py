"""mergekit's choices of elements, rounded where it rounds: SCE, Arcee Fusion, RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaloom.merge._compat_functions import as_torch
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_points import RowTensor
from deltaloom.merge._compat_reduce import Reduction
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._order import OrderStatistics, Quantiles
from deltaloom.merge._rule import Block, TensorRule

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
        self.spare = max(4 * models + 48, 15 * models + 16)  # variances are float64
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
    in_torch = True

    def begin(self, tensor: TensorEntry, models: int) -> FusionTensor:
        """See Rule."""
        return FusionTensor(self, tensor)


class FusionTensor(TensorRule):
    """One tensor under `CompatFusion`: scan 0 keeps the divergence of every row, and two scans find
    the quartiles of the importance.
    """

    scans = 2
    spare = 32

    def __init__(self, rule: CompatFusion, tensor: TensorEntry):
        self.numbers, count = rule.numbers, tensor.count
        self.unit = tensor.shape[-1] if tensor.shape else 1
        self.quartiles = Quantiles([int(q * (count - 1)) for q in (0.25, 0.5, 0.75)])
        self.divergence = np.zeros((count // self.unit, 1), self.numbers.work)
        self.held = self.quartiles.nbytes + self.divergence.nbytes
        self.threshold = self.numbers.work(0)

    def _diverge(self, block: Block) -> np.ndarray:
        """The divergence (rows,) of the second's rows, as logits, from the first's."""
        n = self.numbers
        p, q = (
            n.add(as_torch("softmax", one.reshape(-1, self.unit), n, dim=-1), n.scalar(1e-8))
            for one in block.models[::-1]
        )
        logs = as_torch("log", n.div(p, q), n)  # float16 has no 1e-8: p / q may be 0 / 0 there
        sums = Reduction(self.unit, logs.size, n.work)
        sums.add(n.mul(p, logs), 0)
        return n.round(sums.sums)

    def _importance(self, block: Block) -> np.ndarray:
        n, row = self.numbers, block.start // self.unit
        first, second = block.models
        apart = np.abs(n.sub(second, first)).reshape(-1, self.unit)
        return n.mul(apart, self.divergence[row : row + len(apart)]).ravel()

    def scan(self, number: int, block: Block) -> None:
        """Count importances."""
        self.numbers.read(block.models)
        if number == 0:
            row = block.start // self.unit
            self.divergence[row : row + block.out.size // self.unit, 0] = self._diverge(block)
        self.quartiles.count(number, self._importance(block))

    def scanned(self, number: int) -> None:
        """After scan 1 the quartiles are known."""
        self.quartiles.counted(number)
        if number == 1:
            n = self.numbers
            low, median, high = (n.work(one) for one in self.quartiles.values)
            apart = n.sub(np.array([high]), low)
            self.threshold = n.add(n.mul(apart, n.factor(1.5)), median)[0]

    def write(self, block: Block) -> None:
        """The first, and the change where it is important."""
        n = self.numbers
        first, second = n.read(block.models)
        chosen = self._importance(block) >= self.threshold
        np.add(first, n.sub(second, first) * chosen, out=block.out)


class CompatRam(CompatRule):
    """Changes that one model makes alone, and the mean of those that several make."""

    def __init__(self, numbers: Numbers, least: float):
        super().__init__(numbers)
        self.least = numbers.scalar(least)

    def begin(self, tensor: TensorEntry, models: int) -> RamTensor:
        """See Rule."""
        return RamTensor(self, models)


class RamTensor(TensorRule):
    """One tensor under `CompatRam`."""

    def __init__(self, rule: CompatRam, models: int):
        self.numbers, self.least = rule.numbers, rule.least
        self.spare = 9 * models + 28

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
        self.spare = 16 * models + 24
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
