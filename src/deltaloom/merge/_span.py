"""Merges that are weighted sums of the sources, with weights that follow from inner products.

Every point that spherical interpolation, a mean on the sphere or model stock can reach lies in the
span of the k sources, so k x k inner products decide all: one scan, one write, no tensor in memory.
Inner products and sums are float64, in an order that does not depend on how a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaloom.merge._lanes import LANES
from deltaloom.merge._rule import Block, Rule, TensorRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry

Coefficients = Callable[[np.ndarray, str], np.ndarray]
"""(rows, k, k) inner products, float64, and the tensor's name -> (rows, k) weights."""


class Span(Rule):
    """Weighted sums of models (`form` "values") or of changes over the base ("changes").

    With `rows` every row (last axis) has inner products and weights of its own; a vector is a row.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        form: Literal["changes", "values"] = "values",
        *,
        rows: bool = False,
    ):
        self.coefficients = coefficients
        self.form = form
        self.needs_base = form == "changes"
        self.rows = rows

    def begin(self, tensor: TensorEntry, models: int) -> SpanTensor:
        """See Rule."""
        return SpanTensor(self, tensor, models)


class SpanTensor(TensorRule):
    """One tensor under `Span`."""

    scans = 1

    def __init__(self, rule: Span, tensor: TensorEntry, models: int):
        self.rule, self.name = rule, tensor.name
        by_row = rule.rows and len(tensor.shape) > 1
        *_, last = tensor.shape or (1,)
        self.columns = last if by_row else tensor.count
        self.gram = np.zeros((tensor.count // self.columns, models, models))
        self.pairs = [(i, j) for i in range(models) for j in range(i, models)]
        self.lanes = np.zeros((len(self.pairs), LANES))
        self.weights = np.zeros((0, models))
        self.seen_bits = False
        self.takes_bits = rule.form == "values" and not by_row
        # the products, and some of their size in finding the weights
        self.held = 4 * self.gram.nbytes + 8 * self.lanes.nbytes

    def scan(self, number: int, block: Block) -> None:
        """Add to the inner products."""
        from deltaloom.merge._span_kernels import add_inner

        for lanes, (i, j) in zip(self.lanes, self.pairs, strict=True):
            x, y, sums = block.models[i], block.models[j], self.gram[:, i, j]
            add_inner(x, y, block.start, self.columns, lanes, sums)

    def scanned(self, number: int) -> None:
        """Find the weights."""
        for lanes, (i, j) in zip(self.lanes, self.pairs, strict=True):
            if self.seen_bits:
                self.gram[0, i, j] = np.cumsum(lanes)[-1]  # first to last, as `add_inner` sums them
            self.gram[:, j, i] = self.gram[:, i, j]
        with np.errstate(all="ignore"):  # a NaN among the numbers reaches the whole output
            self.weights = np.ascontiguousarray(self.rule.coefficients(self.gram, self.name))

    def scan_bits(self, number: int, start: int, base: np.ndarray, models: np.ndarray) -> None:
        """See TensorRule."""
        from deltaloom.merge._native import gram_bfloat16

        gram_bfloat16(models, start, self.lanes)
        self.seen_bits = True

    def write_bits(self, base: np.ndarray, models: np.ndarray, out: np.ndarray) -> bool:
        """See TensorRule."""
        from deltaloom.merge._native import combine_bfloat16

        return combine_bfloat16(models, self.weights[0], out)

    def write(self, block: Block) -> None:
        """Sum."""
        from deltaloom.merge._span_kernels import combine

        base = block.base if self.rule.needs_base else block.base[:0]
        combine(base, block.models, self.weights, block.start, self.columns, block.out)


def between(gram: np.ndarray, t: float, nearly: float) -> np.ndarray:
    """Weights (rows, 2) at `t` on the arcs between the two vectors of gram (rows, 2, 2).

    Straight lines where |cos| > `nearly`; a vector of length zero counts as at a right angle.
    """
    lengths = np.sqrt(gram[:, 0, 0] * gram[:, 1, 1])
    cosine = np.clip(gram[:, 0, 1] / np.where(lengths == 0, 1, lengths), -1, 1)
    angle = np.arccos(cosine)
    weights = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], 1)
    weights /= np.sin(angle)[:, None]
    return np.where(np.abs(cosine)[:, None] > nearly, [1 - t, t], weights)
