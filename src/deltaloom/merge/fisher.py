"""Fisher merging: each weight averaged by how much each model's predictions depend on it.

Paper: Merging Models with Fisher-Weighted Averaging (Matena & Raffel, NeurIPS 2022);
arXiv 2111.09832.

Formula: theta = sum_i lambda_i F_i theta_i / sum_i lambda_i F_i per weight, with F_i the diagonal
of model i's Fisher information on its own data: the mean over its rows of the squared gradient of a
row's log-likelihood, log p(y | x) summed over the response's tokens.

Differs: a language model's labels cannot be summed over as the paper sums over a classifier's. With
labels=model every response token's label is drawn once from the model's own prediction, the
response before it being the data's: an unbiased estimate of the Fisher information at those
contexts. With labels=data it is the empirical Fisher, which is another quantity. Each F_i is
raised to at least `floor`, as in the authors' code, there only for the first model of the list;
where no model's gradient is above it the weights are averaged. Gradients are exact per row, squared
and summed in float32, in one backward pass a batch.

Not covered: a grid search for the lambda_i (the paper's, on validation data); experts behind a
router, whose weights are averaged; Fishers kept from an earlier merge. Statistics take one float32
per parameter, for one model at a time in memory and for all on disk.
`memory` bounds the merge that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes, Work
from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._streaming import shares
from deltaloom.merge._with_data import Specialist, Statistics, WithData

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.core.tensors import TensorEntry


@final
class Fisher(WithData):
    """Averages weights by their models' diagonal Fisher information."""

    weights: list[float] | None = Field(None)
    """One factor lambda per delta, in their order; all equal when not given (the paper searches
    for them on validation data)."""
    labels: Literal["model", "data"] = "model"
    """Whose labels the gradients are of: drawn from the model's predictions (the Fisher
    information, the paper's), or the data's (the empirical Fisher)."""
    floor: float = Field(1e-6, gt=0)
    """Least Fisher information of a weight, before `normalize` (the authors' code)."""
    normalize: bool = True
    """Divide each model's Fisher information by its length over all weights, so that no model
    counts more for having longer rows or higher losses (the authors' code)."""

    def work(self, sizes: Sizes) -> Work:
        """Forward and backward of every row; one model and its statistics are held at a time."""
        fishers = 4.0 * sizes.parameters
        return Work(
            full_tokens=sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + fishers,
            disk_bytes=sizes.weight_bytes + sizes.deltas * fishers,
        )

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """See WithData; raises InputError also for weights that are not one above 0 per delta."""
        if min(shares(self.weights, len(deltas), normalize=False)) <= 0:
            raise InputError(f"weights = {self.weights}: each must be above 0")
        return super().merge(base, deltas, run, data=data)

    def statistics(self, specialist: Specialist, seed: int, run: Run) -> Statistics:
        """The diagonal of the Fisher information, by tensor, and its length."""
        import torch

        from deltaloom.engine.forward import device_of
        from deltaloom.engine.gradients import mean_squares, sampled_loss, summed_loss
        from deltaloom.engine.meter import count_training

        model, rows = specialist.model, specialist.rows
        wanted = [name for name in dict.fromkeys(specialist.names.values()) if _own(name)]
        dice = torch.Generator(device_of(model)).manual_seed(seed)
        loss = sampled_loss(dice) if self.labels == "model" else summed_loss
        found = mean_squares(
            model, rows, specialist.pad_id, wanted, loss=loss, on_batch=specialist.advance
        )
        count_training(run, model, sum(len(row.input_ids) for row in rows))
        length = sum(float(one.double().square().sum()) for one in found.values()) ** 0.5
        known = specialist.names.items()
        tensors = {name: found[own].clone() for name, own in known if own in found}
        return Statistics(tensors, {"length": length})

    def rule(self, files: Sequence[Path]) -> FisherMean:
        """See WithData."""
        return FisherMean(files, self)


def _own(name: str) -> bool:
    # Of a routed expert there is no gradient per row.
    return "experts" not in name


class FisherMean(Rule):
    """base + the mean change, weighted weight by weight."""

    def __init__(self, files: Sequence[Path], settings: Fisher):
        import json

        from deltaloom.core.tensors import TensorFolder

        self.fishers = [TensorFolder(file) for file in files]
        self.floor = settings.floor
        lengths = [json.loads(folder.metadata["about"])["length"] for folder in self.fishers]
        parts = shares(settings.weights, len(files), normalize=True)
        self.shares = parts
        self.factors = [
            part / (length if settings.normalize and length else 1.0)
            for part, length in zip(parts, lengths, strict=True)
        ]

    def begin(self, tensor: TensorEntry, models: int) -> FisherTensor:
        """See Rule."""
        return FisherTensor(self, tensor, models)


class FisherTensor(TensorRule):
    """One tensor under `FisherMean`."""

    def __init__(self, rule: FisherMean, tensor: TensorEntry, models: int):
        self.rule, self.name = rule, tensor.name
        self.known = all(tensor.name in folder for folder in rule.fishers)
        self.spare = 12 * models + 16

    def write(self, block: Block) -> None:
        """Weigh and sum."""
        import numpy as np

        if not self.known:
            weights = [block.out.dtype.type(share) for share in self.rule.shares]
        else:
            own = np.stack([self._weight(i, block) for i in range(len(block.models))])  # (k, n)
            weights = own / own.sum(axis=0)
        for change, weight in zip(block.models, weights, strict=True):
            change *= weight
        np.add(block.base, block.models.sum(axis=0), out=block.out)

    def _weight(self, model: int, block: Block) -> np.ndarray:
        """lambda F of one model, (n,)."""
        import numpy as np

        folder = self.rule.fishers[model]
        kind = np.float64 if folder[self.name].dtype == "F64" else np.float32
        stop = block.start + block.out.size
        fisher = folder.raw(self.name, block.start, stop).view(kind).astype(block.out.dtype)
        return np.maximum(fisher, self.rule.floor) * self.rule.factors[model]
