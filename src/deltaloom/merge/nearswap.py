"""Move the first model towards the second by at most `t` per weight.

Paper: none; the method of the model QuartetAnemoi-70B-t0.0001 (alchemonaut, Hugging Face, 2024).

Formula: theta = w b + (1 - w) a with w = min(1, t / |b - a|), which is a + clip(b - a, -t, t).

Differs: computed in the second form, in float32 (float64 where the base is) and rounded once; where
the models are within t the second comes through to the bit. mergekit takes differences below 1e-6
as 1e-6, which matters for a smaller t only.

Not covered: a `t` that differs by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from pydantic import Field

from deltaloom.merge._rule import Block, ElementRule
from deltaloom.merge._streaming import Streaming, two_ends


@final
class NearSwap(Streaming):
    """Swaps in the second model's weights where they are near the first's."""

    t: float = Field(1e-4, gt=0)
    """Largest change of a weight (that of the model that the method is from)."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """The two models; the base is the first when there is one delta."""
        return two_ends(base, deltas, "nearswap")

    def rule(self, models: int, seed: int = 0) -> NearSwapRule:
        """See Streaming."""
        return NearSwapRule(self.t)


class NearSwapRule(ElementRule):
    """a + clip(b - a, -t, t)."""

    form = "values"
    needs_base = False

    def __init__(self, t: float):
        self.t = t

    def write(self, block: Block) -> None:
        """See TensorRule."""
        import numpy as np

        first, second = block.models
        np.subtract(second, first, out=block.out)
        near = np.abs(block.out) <= self.t
        np.clip(block.out, -self.t, self.t, out=block.out)
        np.add(first, block.out, out=block.out)
        np.copyto(block.out, second, where=near)
