"""The buffers of one thread of a merge."""

from __future__ import annotations

import numpy as np

from deltaloom.merge._rule import Block


class Workspace:
    """The buffers of one thread, for `models` sources, as wide as the widest block so far."""

    def __init__(self, models: int):
        self.models = models
        self.raw = self.floats = np.empty(0, np.uint8)

    def fit(self, n: int, dtype: np.dtype) -> None:
        """Make room for blocks of up to n elements. While a block is in use its memory stays, so
        that of the widest comes first.
        """
        # the old goes before the new comes
        if self.raw.size < 8 * n:
            self.raw = np.empty(0, np.uint8)
            self.raw = np.empty(8 * n, np.uint8)
        wanted = (self.models + 2) * n * dtype.itemsize
        if self.floats.size < wanted:
            self.floats = np.empty(0, np.uint8)
            self.floats = np.empty(wanted, np.uint8)

    def block(self, start: int, n: int, dtype: np.dtype) -> Block:
        """Views for n elements; what they hold is left over."""
        k = self.models
        flat = self.floats[: (k + 2) * n * dtype.itemsize].view(dtype)
        # cut so that `models` is contiguous for every n: one compiled form of each kernel
        models = flat[: k * n].reshape(k, n)
        base, out = flat[k * n : (k + 1) * n], flat[(k + 1) * n : (k + 2) * n]
        return Block(start, base, models, out)
