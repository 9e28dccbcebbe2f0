"""The arithmetic of `arithmetic.py` at work, block by block: plain sums, sums of chosen elements.

Apart from the settings, so that reading those loads no numerics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaloom.merge._stream import Block

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry
    from deltaloom.merge.arithmetic import Arithmetic


class Linear:
    """A plain weighted sum. Where the base drops out (the factors sum to 1) models are summed, so
    that one model at 1 is exact; elsewhere changes are, so that no change is exactly no change.
    """

    scans = 0
    ordered = False

    def __init__(self, factors: list[float]):
        self.factors = factors
        self.needs_base = abs(1.0 - sum(factors)) > 1e-9
        self.form: Literal["given", "values"] = "given" if self.needs_base else "values"
        self.equal = len(set(factors)) == 1 and factors[0] != 1.0

    def begin(self, tensor: TensorEntry, models: int) -> Linear:
        """See Rule; nothing is kept between blocks."""
        return self

    def write(self, block: Block) -> None:
        """See TensorRule."""
        if not self.needs_base:
            self._sum(block.models, self.factors, block.out)
            return
        plus, rest, factors = block.base, [], []
        for values, factor, change in zip(block.models, self.factors, block.given, strict=True):
            if factor == 1.0 and not change and plus is block.base:
                plus = values  # its change over the base, and the base, are the model itself
                continue
            rest.append(values if change else np.subtract(values, block.base, out=values))
            factors.append(factor)
        if rest:
            self._sum(rest, factors, block.out)
            np.add(plus, block.out, out=block.out)  # last, because changes are small beside it
        else:
            block.out[:] = plus

    def _sum(self, arrays: Sequence[np.ndarray], factors: list[float], out: np.ndarray) -> None:
        """out = the weighted sum of `arrays`, which are overwritten."""
        one_by_one = [1.0] * len(factors) if self.equal else factors
        for values, factor in zip(arrays, one_by_one, strict=True):
            if factor != 1.0:
                np.multiply(values, values.dtype.type(factor), out=values)
        total = arrays[0]
        for values in arrays[1:]:
            total = np.add(total, values, out=out)
        if self.equal:  # one pass for all, most merges weigh alike
            total = np.multiply(total, total.dtype.type(factors[0]), out=out)
        if total is not out:
            out[:] = total


class Selective:
    """Changes with some elements dropped, and perhaps a vote on signs."""

    form: Literal["changes"] = "changes"
    needs_base = True
    ordered = True

    def __init__(self, spec: Arithmetic, shares: list[float], seed: int):
        self.spec, self.shares, self.seed = spec, shares, seed

    def begin(self, tensor: TensorEntry, models: int) -> SelectiveTensor:
        """See Rule."""
        return SelectiveTensor(self, tensor, models)


class SelectiveTensor:
    """One tensor under `Selective`: thresholds by radix selection, or keys of the draws."""

    def __init__(self, rule: Selective, tensor: TensorEntry, models: int):
        from deltaloom.merge import _kernels

        self.kernels = _kernels  # starting the compiler takes half a second: only when needed
        self.spec, self.shares = rule.spec, rule.shares
        kept = max(1, int(self.spec.density * tensor.count))
        trims = self.spec.sparsify == "magnitude" and kept < tensor.count
        self.scans = 2 if trims else 0
        self.counts = [np.zeros(self.kernels.HIGH_BINS, np.int64) for _ in range(models * trims)]
        self.high = [0] * models
        self.rank = [kept] * models
        self.threshold = [0] * models
        self.equal = [0] * models
        self.keys = [_key(rule.seed, tensor.name, i) for i in range(models)]

    def scan(self, number: int, block: Block) -> None:
        """Scan 0 counts the upper 16 magnitude bits, scan 1 the lower 15 in the bin that matters"""
        for i, change in enumerate(block.models):
            bits = change.astype(np.float32, copy=False).view(np.uint32)
            if number == 0:
                self.kernels.count_high(bits, self.counts[i])
            else:
                self.kernels.count_low(bits, self.high[i], self.counts[i])

    def scanned(self, number: int) -> None:
        """Find the bin of the last element that stays, then its exact magnitude."""
        for i, counts in enumerate(self.counts):
            found, self.rank[i] = self.kernels.from_top(counts, self.rank[i])
            if number == 0:
                self.high[i] = found
                self.counts[i] = np.zeros(self.kernels.LOW_BINS, np.int64)
            else:
                self.threshold[i] = self.high[i] << self.kernels.LOW_BITS | found
                self.equal[i] = self.rank[i]  # how many of those at the threshold stay

    def write(self, block: Block) -> None:
        """Drop, then sum."""
        kind = block.out.dtype.type
        for i, change in enumerate(block.models):
            if self.scans:
                self._trim(i, change)
            elif self.spec.sparsify == "random":
                factor = kind(1.0 / self.spec.density if self.spec.rescale else 1.0)
                limit = np.uint64(round(self.spec.density * 2**32))
                self.kernels.drop(change, block.start, *self.keys[i], limit, factor)
        if self.spec.consensus:
            weights = np.array(self.shares, block.out.dtype)
            vote = partial(self.kernels.elect, block.base, block.models, weights)
            vote(kind(self.spec.scale), self.spec.normalize, block.out)
        else:
            factors = np.array([self.spec.scale * share for share in self.shares], block.out.dtype)
            self.kernels.add_combined(block.base, block.models, factors, block.out)

    def _trim(self, i: int, change: np.ndarray) -> None:
        single = change.astype(np.float32, copy=False)
        self.equal[i] = self.kernels.trim(single.view(np.uint32), self.threshold[i], self.equal[i])
        if single is not change:
            change[single == 0] = 0


def _key(seed: int, name: str, model: int) -> tuple[int, int]:
    """Two 32-bit key words for one tensor of one model."""
    text = f"{seed}\0{model}\0{name}".encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return word & 0xFFFFFFFF, word >> 32
