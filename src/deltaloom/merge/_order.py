"""Exact order statistics of a tensor that is only seen in blocks: radix selection in two scans.

The first scan counts the upper 16 of the 31 magnitude bits of every float32 (of its 32 bits, where
signs matter), the second the lower ones of those that share the upper bits of a wanted element:
O(n) time, 128 kB a tensor, no sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HIGH_BINS = 1 << 16
LOW_BITS = 15
LOW_BINS = 1 << LOW_BITS


class OrderStatistics:
    """The elements of the given ranks by magnitude, 1 being the largest; equals count from the
    lowest flat index on.
    """

    def __init__(self, ranks: Sequence[int]):
        self.equal = list(ranks)
        """After two scans: per rank how many of the elements at its magnitude are counted."""
        self.totals = [0] * len(ranks)
        """After two scans: per rank how many elements have its magnitude."""
        self.bits = [0] * len(ranks)
        """After two scans: per rank the magnitude bits (31) of its element."""
        self._counts = {0: np.zeros(HIGH_BINS, np.int64)}

    @property
    def nbytes(self) -> int:
        """Bytes held at most: the bins of both scans, when the second's take the first's place."""
        return 8 * (HIGH_BINS + len(self.bits) * LOW_BINS)

    def count(self, number: int, bits: np.ndarray) -> None:
        """See one block of float32 as uint32 (n,) in scan 0 or 1."""
        from deltaloom.merge import _kernels as kernels  # starts the compiler

        if number == 0:
            kernels.count_high(bits, self._counts[0])
        else:
            for high, counts in self._counts.items():
                kernels.count_low(bits, high, counts)

    def count_changes(self, number: int, base: np.ndarray, model: np.ndarray) -> None:
        """See the changes of model (n,) over base (n,), bfloat16 as uint16."""
        from deltaloom.merge._native import count_bfloat16

        for high, counts in self._counts.items():
            count_bfloat16(base, model, high if number else None, counts)

    def counted(self, number: int) -> None:
        """Scan 0 has found the bins of the wanted elements, scan 1 their exact magnitudes."""
        if number == 0:
            for i, rank in enumerate(self.equal):
                self.bits[i], self.equal[i] = from_top(self._counts[0], rank)
                self.totals[i] = int(self._counts[0][self.bits[i]])
            self._counts = {high: np.zeros(LOW_BINS, np.int64) for high in self.bits}
        else:
            for i, high in enumerate(self.bits):
                low, self.equal[i] = from_top(self._counts[high], self.equal[i])
                self.bits[i] = high << LOW_BITS | low
                self.totals[i] = int(self._counts[high][low])
            self._counts = {}

    def values(self) -> np.ndarray:
        """The magnitudes themselves, float32, in the order of the ranks."""
        return np.array(self.bits, np.uint32).view(np.float32)


def from_top(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest (1 = largest) and the rank inside that bin."""
    total = counts[::-1].cumsum()
    i = int(np.searchsorted(total, rank))
    return counts.size - 1 - i, rank - int(total[i - 1] if i else 0)


class Quantiles:
    """The elements at the given places of the sorted tensor, 0 being the smallest; NaN is the
    largest. Of float64 the nearest float32 are sorted.
    """

    def __init__(self, places: Sequence[int]):
        self.left = list(places)
        self.values = np.zeros(len(places), np.float32)
        """After two scans: the elements."""
        self._high = [0] * len(places)
        self._counts = {0: np.zeros(1 << 16, np.int64)}

    @property
    def nbytes(self) -> int:
        """Bytes held at most: bins of both scans, and their sums."""
        return (8 << 16) * (2 + len(self.left))

    def count(self, number: int, values: np.ndarray) -> None:
        """See one block (n,) in scan 0 or 1."""
        keys = _rising(values.astype(np.float32, copy=False))
        high = keys >> np.uint32(16)
        if number == 0:
            self._counts[0] += np.bincount(high, minlength=1 << 16)
            return
        for wanted, counts in self._counts.items():
            counts += np.bincount(keys[high == wanted] & np.uint32(0xFFFF), minlength=1 << 16)

    def counted(self, number: int) -> None:
        """Scan 0 has found the bins of the wanted elements, scan 1 the elements."""
        found = []
        for i, place in enumerate(self.left):
            below = self._counts[self._high[i] if number else 0].cumsum()
            bin_ = int(np.searchsorted(below, place, side="right"))
            self.left[i] = place - int(below[bin_ - 1] if bin_ else 0)
            found.append(bin_)
        if number == 0:
            self._high = found
            self._counts = {high: np.zeros(1 << 16, np.int64) for high in found}
        else:
            keys = [high << 16 | low for high, low in zip(self._high, found, strict=True)]
            self.values = _numbers(np.array(keys, np.uint32))
            self._counts = {}


def _rising(values: np.ndarray) -> np.ndarray:
    """float32 (n,) as uint32 (n,) that rise with them."""
    bits = values.view(np.uint32)
    keys = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    keys[np.isnan(values)] = np.uint32(0xFFC00000)
    return keys


def _numbers(keys: np.ndarray) -> np.ndarray:
    """The other way."""
    bits = np.where(keys >> np.uint32(31), keys & np.uint32(0x7FFFFFFF), ~keys)
    return bits.astype(np.uint32).view(np.float32)
