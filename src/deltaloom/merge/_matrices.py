"""Merges of whole matrices: changes that are rotations and scalings, not lists of numbers.

The engine hands over one matrix of every source at a time, whole. Vectors, stacks, embeddings and
output layers have no singular directions that these papers use; their changes are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._sources import EMBEDDINGS, HEADS

if TYPE_CHECKING:
    from deltaloom.core.method import Sizes, Work
    from deltaloom.core.tensors import TensorEntry

Combine = Callable[[np.ndarray], np.ndarray]
"""Changes (k, rows, columns) -> the merged change (rows, columns), in their dtype."""


MATRICES = 27
"""Matrices held per thread beside one of every source: buffers of the engine, singular vectors and
LAPACK's own room (measured with three sources: 30 in all for TSV, 24 for Iso-C)."""


class Matrices(Rule):
    """base + scale * combine(changes) for matrices, base + scale * mean of changes for the rest."""

    def __init__(self, combine: Combine, scale: float):
        self.combine, self.scale = combine, scale

    def begin(self, tensor: TensorEntry, models: int) -> MatrixTensor:
        """See Rule."""
        return MatrixTensor(self, tensor)


class MatrixTensor(TensorRule):
    """One tensor under `Matrices`."""

    def __init__(self, rule: Matrices, tensor: TensorEntry):
        self.rule = rule
        self.shape = tensor.shape
        self.whole = len(tensor.shape) == 2 and not tensor.name.endswith(EMBEDDINGS + HEADS)
        self.unit = tensor.count if self.whole else 1
        self.spare = 4 * MATRICES if self.whole else 8

    def write(self, block: Block) -> None:
        """Merge the whole matrix, or average the block."""
        if self.whole:
            change = self.rule.combine(block.models.reshape(-1, *self.shape)).ravel()
        else:
            change = block.models.mean(axis=0)
        change *= change.dtype.type(self.rule.scale)
        np.copyto(block.out, block.base)
        np.add(block.base, change, out=block.out, where=change != 0)


def planned(blocks: Work, sizes: Sizes, threads: int | None) -> Work:
    """`blocks` with the memory of whole matrices in place of blocks.

    Per thread that is one matrix of every source and `MATRICES` more, 4 bytes an element. The
    largest is guessed: N parameters in matrices whose
    sides sum to s are as of squares of side 2 N / s, and feed-forward ones have twice the elements.
    """
    side = 2.0 * sizes.matmul_parameters / max(sizes.linear_sides, 1)
    elements = min(2.0 * side**2, float(sizes.matmul_parameters))
    matrices = 4.0 * elements * (sizes.deltas + MATRICES) * (threads or 2)
    return replace(blocks, memory_bytes=blocks.memory_bytes + matrices)
