"""Exact order statistics of a tensor that is only seen in blocks: radix selection in two scans.

The first scan counts the upper 16 of the 31 magnitude bits of every float32, the second the lower
15 of those that share the upper bits of a wanted element: O(n) time, 128 kB a tensor, no sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaloom.merge import _kernels as kernels


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
        self._counts = {0: np.zeros(kernels.HIGH_BINS, np.int64)}

    @property
    def nbytes(self) -> int:
        """Bytes held at most: the bins of both scans, when the second's take the first's place."""
        return 8 * (kernels.HIGH_BINS + len(self.bits) * kernels.LOW_BINS)

    def count(self, number: int, bits: np.ndarray) -> None:
        """See one block of float32 as uint32 (n,) in scan 0 or 1."""
        if number == 0:
            kernels.count_high(bits, self._counts[0])
        else:
            for high, counts in self._counts.items():
                kernels.count_low(bits, high, counts)

    def counted(self, number: int) -> None:
        """Scan 0 has found the bins of the wanted elements, scan 1 their exact magnitudes."""
        if number == 0:
            for i, rank in enumerate(self.equal):
                self.bits[i], self.equal[i] = kernels.from_top(self._counts[0], rank)
                self.totals[i] = int(self._counts[0][self.bits[i]])
            self._counts = {high: np.zeros(kernels.LOW_BINS, np.int64) for high in self.bits}
        else:
            for i, high in enumerate(self.bits):
                low, self.equal[i] = kernels.from_top(self._counts[high], self.equal[i])
                self.bits[i] = high << kernels.LOW_BITS | low
                self.totals[i] = int(self._counts[high][low])
            self._counts = {}

    def values(self) -> np.ndarray:
        """The magnitudes themselves, float32, in the order of the ranks."""
        return np.array(self.bits, np.uint32).view(np.float32)
