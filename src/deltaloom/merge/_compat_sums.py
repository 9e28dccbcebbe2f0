"""mergekit's weighted sums, rounded where it rounds: linear, passthrough and task arithmetic's kin.

Changes are taken, sparsified (`_compat_parts.py`), weighed, summed, divided and added to the base
in the models' own format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_parts import Choice, part_of
from deltaloom.merge._rule import Block, ElementRule, Rule, TensorRule
from deltaloom.merge._rules import _key

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry


class CompatRule(Rule):
    """A rule in the arithmetic of one number format; it takes the models as they are."""

    form = "values"
    keeps_base = False
    in_torch = False
    """Whether some of its functions are torch's (`_compat_functions.py`)."""

    def __init__(self, numbers: Numbers):
        self.numbers = numbers

    def width(self, tensor: TensorEntry) -> type[np.floating]:
        """See Rule."""
        return self.numbers.work


class CompatScale(CompatRule, ElementRule):
    """One model, perhaps times a factor."""

    needs_base = False

    def __init__(self, numbers: Numbers, scale: float | None):
        super().__init__(numbers)
        self.scale = scale

    def write(self, block: Block) -> None:
        """See TensorRule."""
        block.out[:] = self.numbers.read(block.models[0])
        if self.scale not in (None, 1.0):
            block.out *= self.numbers.factor(self.scale)
            self.numbers.round(block.out)


class CompatLinear(CompatRule, ElementRule):
    """A weighted sum in float32, first to last, divided at the end, then rounded."""

    needs_base = False

    def __init__(self, numbers: Numbers, weights: list[float], normalize: bool):
        super().__init__(numbers)
        self.weights = np.array(weights, numbers.work)
        wide = Numbers("float64" if numbers.name == "float64" else "float32")
        self.divisor = wide.total(list(self.weights)) if normalize else numbers.work(1)

    def write(self, block: Block) -> None:
        """See TensorRule."""
        from deltaloom.merge._compat_kernels import add_weighted

        n = self.numbers
        add_weighted(n.read(block.models), self.weights, self.divisor, n.kind, block.out)


class CompatChanges(CompatRule):
    """The base plus a weighted sum of sparsified changes, perhaps of those that agree in sign."""

    def __init__(
        self,
        numbers: Numbers,
        choices: list[Choice],
        weights: list[float],
        *,
        scale: float,
        consensus: bool,
        normalize: bool,
        seed: int,
    ):
        super().__init__(numbers)
        self.choices, self.seed = choices, seed
        self.weights = np.array([numbers.scalar(weight) for weight in weights], numbers.work)
        divisor = numbers.total(list(self.weights))
        self.divisor = numbers.work(1) if abs(divisor) < 1e-8 else divisor
        self.scale = numbers.factor(scale)
        self.consensus, self.normalize = consensus, normalize

    def begin(self, tensor: TensorEntry, models: int) -> ChangesTensor:
        """See Rule."""
        return ChangesTensor(self, tensor)


class ChangesTensor(TensorRule):
    """One tensor under `CompatChanges`."""

    def __init__(self, rule: CompatChanges, tensor: TensorEntry):
        from deltaloom.merge import _compat_kernels as kernels

        self.rule, self.kernels = rule, kernels
        self.parts = [
            part_of(choice, rule.numbers, tensor, _key(rule.seed, tensor.name, i))
            for i, choice in enumerate(rule.choices)
        ]
        self.scans = max((part.scans for part in self.parts), default=0)
        self.unit = math.lcm(*(part.unit for part in self.parts))
        self.held = sum(part.held for part in self.parts)

    def _changes(self, block: Block) -> None:
        numbers = self.rule.numbers
        self.kernels.differ(block.models, block.base, numbers.finer, numbers.kind)

    def scan(self, number: int, block: Block) -> None:
        """Let every part that still scans see its change."""
        self._changes(block)
        for part, change in zip(self.parts, block.models, strict=True):
            if number < part.scans:
                part.scan(number, block.start, change, block.out)

    def scanned(self, number: int) -> None:
        """See TensorRule."""
        for part in self.parts:
            if number < part.scans:
                part.scanned(number)

    def write(self, block: Block) -> None:
        """Sparsify each change, then combine them."""
        rule = self.rule
        self._changes(block)
        for part, change in zip(self.parts, block.models, strict=True):
            part.write(block.start, change)
        self.kernels.join(
            block.base,
            block.models,
            rule.weights,
            rule.divisor,
            rule.scale,
            rule.consensus,
            rule.normalize,
            rule.numbers.kind,
            block.out,
        )
