"""Select what varies between the models, weigh models by their energy, erase minority signs.

Paper: FuseChat: Knowledge Fusion of Chat Models (Wan et al., 2024), SCE; arXiv 2408.07990.

Formula: per tensor keep the `density` part of the elements whose variance over the changes tau_i is
not 0, by largest variance; w_i = mean(tau_i^2) over what is kept, divided by their sum; theta =
theta_0 + sum_i w_i tau_i / sum_i w_i, both sums over the models whose sign is that of sum_i tau_i.

Differs: float32 (float64 where the base is) and rounded once, energies and variances in float64,
these compared in float32; equal variances count from the lowest flat index on, selected by radix
and not by sorting. Weights are uniform only when all changes are zero; mergekit makes them so
whenever the energies sum to less than 1e-6, that is for k changes of 1e-3 / sqrt(k) and smaller.

Not covered: weights given by hand, settings that differ by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._streaming import Streaming

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.tensors import TensorEntry


@final
class Sce(Streaming):
    """Merges changes by variance, energy and sign."""

    density: float = Field(1.0, gt=0, le=1)
    """Part of each tensor's elements that is kept, by variance over the models (mergekit's
    `select_topk`, and its default)."""

    def rule(self, models: int, seed: int = 0) -> SceRule:
        """See Streaming."""
        if models < 1 + (self.density < 1):
            raise InputError(
                "sce with a density below 1 chooses by the variance between models: give two "
                "deltas or more"
                if models
                else "nothing to merge: give at least one delta"
            )
        return SceRule(self.density)


class SceRule(Rule):
    """Changes over the base, by variance, energy and sign."""

    def __init__(self, density: float):
        self.density = density

    def begin(self, tensor: TensorEntry, models: int) -> SceTensor:
        """See Rule."""
        return SceTensor(self.density, tensor, models)


class SceTensor(TensorRule):
    """One tensor: two scans find the least variance that is kept, one sums energies, then sums."""

    def __init__(self, density: float, tensor: TensorEntry, models: int):
        import numpy as np

        from deltaloom.merge._lanes import LANES
        from deltaloom.merge._order import OrderStatistics

        self.density, self.count = density, tensor.count
        self.order = OrderStatistics([1]) if density < 1 else None
        self.scans = 1 if self.order is None else 3
        self.spare = 48 + (8 * models if self.order else 0)  # variances are float64
        self.held = self.order.nbytes if self.order else 0
        self.varied = 0
        self.left = 0
        self.lanes = np.zeros((models, LANES))
        self.energy = np.zeros((models, 1))

    def scan(self, number: int, block: Block) -> None:
        """Count variances by bits twice, then add up energies."""
        import numpy as np

        from deltaloom.merge._span_kernels import add_inner

        if number < self.scans - 1 and self.order is not None:
            variance = _variance(block.models)
            self.varied += int(np.count_nonzero(variance)) if number == 0 else 0
            self.order.count(number, variance.view(np.uint32))
            return
        self._select(block)
        for change, lanes, energy in zip(block.models, self.lanes, self.energy, strict=True):
            add_inner(change, change, block.start, self.count, lanes, energy)

    def scanned(self, number: int) -> None:
        """The number to keep is known after scan 0, the least variance among them after scan 1."""
        if number < self.scans - 1 and self.order is not None:
            if number == 0:
                self.order.equal = [int(self.varied * self.density)]
            self.order.counted(number)
        self.left = self.order.equal[0] if self.order is not None else 0

    def _select(self, block: Block) -> None:
        """Zero the changes that are not kept."""
        import numpy as np

        from deltaloom.merge import _kernels as kernels

        if self.order is None:
            return
        bits = _variance(block.models).view(np.uint32)
        self.left = kernels.trim(bits, self.order.bits[0], self.left)
        block.models[:, bits == 0] = 0

    def write(self, block: Block) -> None:
        """Select again, elect signs, and take the weighted mean of those that agree."""
        import numpy as np

        self._select(block)
        energy = self.energy[:, 0]
        total = energy.sum()
        weights = (energy / total if total else energy + 1 / energy.size).astype(block.out.dtype)
        positive = block.models.sum(0) >= 0
        block.out[:] = 0
        mass = np.zeros_like(block.out)
        for change, weight in zip(block.models, weights, strict=True):
            # a NaN counts as agreeing, so that it reaches the output
            agrees = np.where(positive, change > 0, change < 0) | np.isnan(change)
            mass += weight * agrees
            block.out += weight * np.where(agrees, change, 0)
        np.divide(block.out, mass, out=block.out, where=mass != 0)
        np.copyto(block.out, block.base + block.out, where=block.out != 0)
        np.copyto(block.out, block.base, where=mass == 0)


def _variance(changes: np.ndarray) -> np.ndarray:
    """The population variance (n,) of changes (k, n) over the models, float32."""
    import numpy as np

    return changes.var(axis=0, dtype=np.float64).astype(np.float32)
