"""The arithmetic of `arithmetic.py` at work, block by block: plain sums, sums of chosen elements.

Apart from the settings, so that reading those loads no numerics.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from deltaloom.merge._rule import Block, ElementRule, Form, Rule, TensorRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry
    from deltaloom.merge.arithmetic import Arithmetic


class Linear(ElementRule):
    """A plain weighted sum. Where the base drops out (the factors sum to 1) models are summed, so
    that one model at 1 is exact; elsewhere changes are, so that no change is exactly no change.
    """

    takes_bits = True

    def __init__(self, factors: list[float]):
        self.needs_base = abs(1.0 - sum(factors)) > 1e-9
        self.form: Form = "given" if self.needs_base else "values"
        equal = len(set(factors)) == 1  # one product for all: as most merges weigh, and nearer
        self.each = [1.0] * len(factors) if equal else factors
        self.common = factors[0] if equal else 1.0

    def write(self, block: Block) -> None:
        """See TensorRule."""
        from deltaloom.merge._native import add_models

        # where the base drops out nothing is taken off the models either
        given = block.given if self.needs_base else [True] * len(block.models)
        plus = block.base if self.needs_base else None
        add_models(plus, block.base, block.models, given, self.each, self.common, block.out)

    def write_bits(self, base: np.ndarray, models: np.ndarray, out: np.ndarray) -> bool:
        """See TensorRule."""
        from deltaloom.merge._native import add_bfloat16

        return add_bfloat16(base if self.needs_base else None, models, self.each, self.common, out)


class Selective(Rule):
    """Changes with some elements dropped, and perhaps a vote on signs."""

    def __init__(self, spec: Arithmetic, shares: list[float], seed: int):
        self.spec, self.shares, self.seed = spec, shares, seed

    def begin(self, tensor: TensorEntry, models: int) -> SelectiveTensor:
        """See Rule."""
        return SelectiveTensor(self, tensor, models)


class SelectiveTensor(TensorRule):
    """One tensor under `Selective`: thresholds by radix selection, or keys of the draws."""

    def __init__(self, rule: Selective, tensor: TensorEntry, models: int):
        from deltaloom.merge._order import OrderStatistics

        self.spec, self.shares = rule.spec, rule.shares
        self.takes_bits = self.spec.consensus and self.spec.sparsify in ("none", "magnitude")
        kept = max(1, int(self.spec.density * tensor.count))
        self.orders: list[OrderStatistics] = []
        if self.spec.sparsify in ("magnitude", "middle") and kept < tensor.count:
            gamma = self.spec.gamma if self.spec.sparsify == "middle" else 0.0
            top = min(int(gamma * tensor.count), tensor.count - kept)
            ranks = [top + kept, top] if top else [kept]
            self.orders = [OrderStatistics(ranks) for _ in range(models)]
            self.held = sum(order.nbytes for order in self.orders)
            self.scans = 2
        if self.spec.sparsify == "ranked":
            self.spare = 40  # magnitudes, their order, the chances, and the same again in flight
            self.unit = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.count
        self.keys = [_key(rule.seed, tensor.name, i) for i in range(models)]

    @cached_property
    def kernels(self) -> ModuleType:
        """The compiled loops; starting the compiler takes half a second."""
        from deltaloom.merge import _kernels

        return _kernels

    def scan(self, number: int, block: Block) -> None:
        """See OrderStatistics."""
        for order, change in zip(self.orders, block.models, strict=True):
            order.count(number, change.astype(np.float32, copy=False).view(np.uint32))

    def scan_bits(self, number: int, start: int, base: np.ndarray, models: np.ndarray) -> None:
        """See OrderStatistics."""
        for order, model in zip(self.orders, models, strict=True):
            order.count_changes(number, base, model)

    def scanned(self, number: int) -> None:
        """See OrderStatistics."""
        for order in self.orders:
            order.counted(number)

    def write(self, block: Block) -> None:
        """Drop, then sum."""
        kind = block.out.dtype.type
        for i, change in enumerate(block.models):
            if self.orders:
                self._trim(i, change)
            elif self.spec.sparsify == "random":
                factor = kind(1.0 / self.spec.density if self.spec.rescale else 1.0)
                limit = np.uint64(round(self.spec.density * 2**32))
                self.kernels.drop(change, block.start, *self.keys[i], limit, factor)
            elif self.spec.sparsify == "ranked" and self.spec.density < 1:
                chances = self._chances(change)
                drop = self.kernels.drop_each
                drop(change, chances, self.spec.rescale, block.start, *self.keys[i])
        if self.spec.consensus:
            weights = np.array(self.shares, block.out.dtype)
            vote = partial(self.kernels.elect, block.base, block.models, weights)
            vote(kind(self.spec.scale), self.spec.normalize, block.out)
        else:
            factors = np.array([self.spec.scale * share for share in self.shares], block.out.dtype)
            self.kernels.add_combined(block.base, block.models, factors, block.out)

    def write_bits(self, base: np.ndarray, models: np.ndarray, out: np.ndarray) -> bool:
        """Trim, and sum what agrees."""
        from deltaloom.merge._native import elect_bfloat16

        whole = [(0, base.size)] * len(models)  # where all stay: those of no size too
        kept = [(order.bits[0], order.equal[0]) for order in self.orders] or whole
        limits, equals = np.array(kept, np.int64).T.copy()
        weights, spec = np.array(self.shares, np.float32), self.spec
        found = elect_bfloat16(
            base, models, limits, equals, weights, spec.scale, spec.normalize, out
        )
        for order, left in zip(self.orders, equals, strict=False):
            order.equal[0] = int(left)
        return found

    def _trim(self, i: int, change: np.ndarray) -> None:
        single = change.astype(np.float32, copy=False)
        bits, order = single.view(np.uint32), self.orders[i]
        order.equal[0] = self.kernels.trim(bits, order.bits[0], order.equal[0])
        if len(order.bits) == 2:
            order.equal[1] = self.kernels.behead(bits, order.bits[1], order.equal[1])
        if single is not change:
            change[single == 0] = 0

    def _chances(self, change: np.ndarray) -> np.ndarray:
        """The chance (n,) of every element to stay, rising evenly with its rank in its row."""
        rows = np.abs(change).reshape(-1, self.unit)  # (rows, columns)
        order = rows.argsort(axis=1, kind="stable")
        chances = np.empty(rows.shape)
        low, high = self.spec.density - self.spec.epsilon, self.spec.density + self.spec.epsilon
        steps = np.linspace(low, high, self.unit) if self.unit > 1 else [self.spec.density]
        np.put_along_axis(chances, order, np.broadcast_to(steps, rows.shape), axis=1)
        return chances.ravel()


def _key(seed: int, name: str, model: int) -> tuple[int, int]:
    """Two 32-bit key words for one tensor of one model."""
    text = f"{seed}\0{model}\0{name}".encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return word & 0xFFFFFFFF, word >> 32
