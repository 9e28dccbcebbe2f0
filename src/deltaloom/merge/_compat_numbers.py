"""Arithmetic in a model's own number format, step by step, as mergekit's tensors have it.

torch computes each step on bfloat16 and float16 in float32 and rounds its result to the format;
sums are float32 until their end. Here the numbers stay float32 and are rounded to the format's
values at the same places, to nearest even: bit for bit the same, at the cost of a pass in cache.
float32 and float64 models need no such rounding; their arrays are of their own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = {"bfloat16": 1, "float16": 2, "float32": 0, "float64": 0}
CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Names of the formats by their codes in files."""
ORDER = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Numbers:
    """One number format: `name` as torch has it, and whether inputs may be finer than it."""

    name: str
    finer: bool = False
    """Whether an input's own type holds values that the format does not, so that reading rounds."""

    @property
    def kind(self) -> int:
        """0 for none, 1 to round to bfloat16, 2 to float16."""
        return KINDS[self.name]

    @property
    def work(self) -> Any:
        """The numpy type that holds the numbers."""
        return np.float64 if self.name == "float64" else np.float32

    def round(self, values: np.ndarray) -> np.ndarray:
        """`values`, contiguous, of type `work`, rounded in place to the format."""
        if self.kind:
            from deltaloom.merge._compat_kernels import coarsen

            coarsen(values.reshape(-1), self.kind)
        return values

    def scalar(self, value: float | np.ndarray) -> Any:
        """A setting, or an array (), as a number of the format (through float32, as torch does)."""
        return self.round(np.array([value], self.work))[0]

    def of(self, values: np.ndarray) -> np.ndarray:
        """float64 `values` as numbers of the format, in a new array."""
        return self.round(values.astype(self.work))

    def add(self, left: Any, right: Any) -> np.ndarray:
        """left + right, rounded; one of them is an array."""
        return self.round(np.add(left, right))

    def sub(self, left: Any, right: Any) -> np.ndarray:
        """left - right, rounded."""
        return self.round(np.subtract(left, right))

    def mul(self, left: Any, right: Any) -> np.ndarray:
        """left * right, rounded."""
        with np.errstate(all="ignore"):  # what is too large is infinite, as in torch
            return self.round(np.multiply(left, right))

    def div(self, left: Any, right: Any) -> np.ndarray:
        """left / right, rounded."""
        with np.errstate(all="ignore"):
            return self.round(np.divide(left, right))

    def factor(self, value: float) -> Any:
        """A setting as a factor of a tensor: it enters a step unrounded, in float32."""
        return self.work(value)

    def read(self, values: np.ndarray) -> np.ndarray:
        """Inputs as mergekit loads them."""
        return self.round(values) if self.finer else values

    def total(self, values: Sequence[Any]) -> Any:
        """The sum of one number per model, added in torch's order and rounded once."""
        lanes = [self.work(0)] * 4
        whole = len(values) // 4 * 4
        for i in range(whole):  # four sums side by side, and what is left goes to the first
            lanes[i % 4] = lanes[i % 4] + values[i]
        for value in values[whole:]:
            lanes[0] = lanes[0] + value
        return self.scalar(lanes[0] + lanes[1] + lanes[2] + lanes[3])

    def rows(self, values: np.ndarray) -> np.ndarray:
        """The sums (k, n) -> (n,) over models, first to last, rounded once."""
        out = np.zeros_like(values[0])
        for row in values:
            out += row
        return self.round(out)


def common(names: Sequence[str]) -> str:
    """The format that holds the values of all `names`, as torch promotes types."""
    found = set(names)
    if {"float16", "bfloat16"} <= found:
        found.add("float32")
    return max(found, key=ORDER.index)
