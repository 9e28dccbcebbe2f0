"""Take the second model's weights where they matter: large changes in rows that changed shape.

Paper: none; Arcee Fusion of Arcee AI (https://arcee.ai), as mergekit documents it.

Formula: importance = |b - a| KL(softmax(b_row) + e || softmax(a_row) + e), e = 1e-8, a row being
the last axis; theta = b where importance >= median + 1.5 (q3 - q1) of the tensor's, else a.

Differs: quartiles are the exact elements floor(q (n - 1)) of the sorted importances, found by radix
selection in two scans, where mergekit sorts a random sample of a million from larger tensors. The
divergence is in float64; mergekit takes it in the models' dtype, and in bfloat16 rounding turns
many choices (`bench/parity_mergekit.py`). Weights come through to the bit. One delta is merged with
the base as a.

Not covered: other thresholds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, final

from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._streaming import Streaming, two_ends

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.tensors import TensorEntry


@final
class ArceeFusion(Streaming):
    """Swaps in the second model's most important weights."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """The two models; the base is the first when there is one delta."""
        return two_ends(base, deltas, "arcee_fusion")

    def rule(self, models: int, seed: int = 0) -> FusionRule:
        """See Streaming."""
        return FusionRule()


class FusionRule(Rule):
    """a or b by importance."""

    form = "values"
    needs_base = False

    def begin(self, tensor: TensorEntry, models: int) -> FusionTensor:
        """See Rule."""
        return FusionTensor(tensor)


class FusionTensor(TensorRule):
    """One tensor: scan 0 also finds the divergence of every row, which is kept."""

    scans = 2

    def __init__(self, tensor: TensorEntry):
        import numpy as np

        from deltaloom.merge._order import OrderStatistics

        count = tensor.count
        self.unit = tensor.shape[-1] if tensor.shape else 1
        self.divergence = np.zeros((count // self.unit, 1), np.float32)
        self.order = OrderStatistics([count - int(q * (count - 1)) for q in (0.25, 0.5, 0.75)])
        self.threshold = np.float32(0)
        self.spare = 24
        self.held = self.divergence.nbytes + self.order.nbytes

    def scan(self, number: int, block: Block) -> None:
        """Count importances by their bits."""
        import numpy as np

        from deltaloom.merge._softmax import divergences

        if number == 0:
            first, second = block.models
            row = block.start // self.unit
            rows = self.divergence[row : row + first.size // self.unit, 0]
            divergences(second, first, self.unit, rows)
        self.order.count(number, self._importance(block).view(np.uint32))

    def scanned(self, number: int) -> None:
        """After scan 1 the quartiles are known."""
        self.order.counted(number)
        if number == 1:
            low, median, high = self.order.values()
            self.threshold = median + 1.5 * (high - low)

    def write(self, block: Block) -> None:
        """a, and b where it is important; a NaN is."""
        import numpy as np

        first, second = block.models
        block.out[:] = first
        np.copyto(block.out, second, where=~(self._importance(block) < self.threshold))

    def _importance(self, block: Block) -> np.ndarray:
        """(n,) float32."""
        import numpy as np

        first, second = block.models
        change = np.abs(second - first).astype(np.float32, copy=False).reshape(-1, self.unit)
        row = block.start // self.unit
        return (change * self.divergence[row : row + len(change)]).ravel()
