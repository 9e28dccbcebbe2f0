"""Tune a few elements of each weight, exchanging them while tuning (SpIEL).

Paper: Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models" (arXiv 2401.16405);
schedule, growth rules and seeds as in the authors' fork of PEFT.

W' = W + delta with k elements a weight, first at random. After `accumulate` updates of every
`reselect`, the floor(p k) elements of least |delta| are dropped and as many are grown from zero: by
accumulated gradient (AG), of the k candidates with the largest |gradient| in the phase's first
micro-batch those with the largest |sum of gradients|; by momentum approximation (MA), those with
the largest product of SM3's row and column covers. p is 1 at the first selection, then `replace` *
(1 - t / T). AG is tuned by AdamW whose grown elements start with the phase's mean gradient and mean
square, MA by SM3.

Differs: phases have exactly `accumulate` updates (the code's later ones have one more); sums and
squares are of whole updates' gradients, not of micro-batches', so that they do not depend on
`micro_batch` but for the candidates; candidates' gradients are not clipped, as in the code; the
products of MA are formed a strip at a time; nothing is exchanged after the last update. The paper
tries `weight_decay` of 1, 3, 10 and 30; the default here is 0.

Not covered: several processes; the fork's other criteria (`acc`, sampling); structured sparsity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import Count, train
from deltaloom.tune._sparse import SparseTuner, publish

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

LR = {"gradient": 1e-4, "momentum": 1e-3}


@final
class Spiel(SparseTuner):
    """SpIEL-AG and SpIEL-MA; the result is a sparse PEFT adapter folder."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; None takes 1e-4 for `gradient`, 1e-3 for `momentum` (inside the paper's
    sweeps: 1e-6 to 1e-4 and 4e-4 to 2e-3, for 7B and 13B models)."""
    growth: Literal["gradient", "momentum"] = "gradient"
    """What grown elements are chosen by: accumulated gradients (AG), or the momentum approximation
    (MA), which keeps no state per element (the paper finds AG ahead)."""
    reselect: Count = 20
    """Updates from one selection to the next (the authors' scripts: 20)."""
    accumulate: Count = 5
    """Updates that a selection collects evidence over (the authors' scripts: 5)."""
    replace: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Part of the elements that the second selection may replace (the authors' code: 0.2)."""
    decay: Literal["linear", "cosine"] = "linear"
    """How that part falls to zero at the last update (the authors' code: linear)."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Spiel:
        if self.accumulate > self.reselect:
            raise ValueError(
                f"accumulate = {self.accumulate} is more than reselect = {self.reselect}"
            )
        return self

    def work(self, sizes: Sizes) -> Work:
        """The base, and the elements with gradient and optimizer; no activations."""
        state = self.state_bytes(sizes)
        return Work(
            adapter_tokens=self.epochs * sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + state,
            disk_bytes=3 * state,
        )

    def replaced(self, step: int, total: int) -> float:
        """Part of the elements that the selection after update `step` of `total` may replace."""
        if step <= self.accumulate:
            return 1.0
        if self.decay == "cosine":
            return self.replace * (1 + math.cos(math.pi * step / total)) / 2
        return self.replace * (1 - step / total)

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder` and returns its Sparse Delta."""
        from deltaloom.tune._reselection import Reselection

        model = self.attach(base, seed=run.seed)
        companion = Reselection(model, self)
        settings = self.train_settings(self.lr or LR[self.growth], trainable="adapter")
        model = train(model, base, data, run, self, settings, evaluation, companion=companion)
        run.note(exchanged=companion.exchanged)
        return publish(model, base, run)
