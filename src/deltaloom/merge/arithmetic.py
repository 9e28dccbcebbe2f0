"""Task arithmetic and its family: weighted sums of changes, sparsified or not, by sign or not.

Paper: Editing Models with Task Arithmetic (Ilharco et al., ICLR 2023), section 2; TIES-Merging
(Yadav et al., NeurIPS 2023), section 3; Language Models are Super Mario (Yu et al., ICML 2024),
section 3; Model Breadcrumbs (Davari & Belilovsky, ECCV 2024); DELLA-Merging (Deep et al., 2024);
Model Soups (Wortsman et al., ICML 2022).

Formula: theta = theta_0 + scale * sum_i w_i s(tau_i) / z, with tau_i = theta_i - theta_0 per
tensor. s keeps everything; the `density` part of largest magnitude, or that below the top `gamma`
part; a random `density` part divided by `density`; or a random part with probabilities
density + epsilon (2 r - 1), r in [0, 1] the rank of the magnitude in its row, each divided by its
own. With `consensus` the sum runs, per element, over the changes whose sign is that of the weighted
sum of all. z is 1, or with `normalize` the weights that took part.

Differs: TIES trims per tensor, as mergekit does, where the paper trims per task vector; equal
magnitudes at a threshold count from the lowest flat index on, so exactly max(1, floor(density * n))
elements stay. Everything is float32 (float64 where the base is) and rounded once; magnitudes are
compared in float32. mergekit rounds changes and weights to the model's dtype in between, lets an
unstable sort choose among equal magnitudes, and rescales DARE and DELLA by a ratio of L1 norms
where this divides by the probability of each element, as the papers do. A row is the last axis, and
a vector is one row. DARE's and DELLA's draws are Philox4x32-10 in counter mode keyed by (seed,
tensor name, place in the list), so they depend on nothing else. A plain sum of adapters is an
adapter, its factors side by side, with nothing of the product ever made.

Not covered: densities or weights that differ by layer or by model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Survey
from deltaloom.merge._streaming import Streaming, shares

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.merge._rules import Linear, Selective

# Row -> what it is, where it comes from, and the fields whose defaults differ from the class's.
PRESETS = {
    "average": {
        "summary": "The mean of the models",
        "paper": "Model Soups (Wortsman et al., ICML 2022), uniform soup; arXiv 2203.05482",
        "normalize": True,
    },
    "task_arithmetic": {
        "summary": "The base plus a scaled sum of the changes",
        "paper": "Editing Models with Task Arithmetic (Ilharco et al., ICLR 2023); "
        "arXiv 2212.04089",
    },
    "ties": {
        "summary": "Trim to the largest changes, elect a sign per element, average those agreeing",
        "paper": "TIES-Merging (Yadav et al., NeurIPS 2023); arXiv 2306.01708",
        "sparsify": "magnitude",
        "consensus": True,
        "normalize": True,
        "density": 0.2,
    },
    "dare_linear": {
        "summary": "Drop changes at random, rescale the rest, sum",
        "paper": "Language Models are Super Mario (Yu et al., ICML 2024); arXiv 2311.03099",
        "sparsify": "random",
        "rescale": True,
        "density": 0.5,
    },
    "dare_ties": {
        "summary": "Drop changes at random, rescale the rest, sum those agreeing in sign",
        "paper": "Language Models are Super Mario (Yu et al., ICML 2024); arXiv 2311.03099",
        "sparsify": "random",
        "consensus": True,
        "rescale": True,
        "density": 0.5,
    },
    "breadcrumbs": {
        "summary": "Drop the largest changes as outliers and the small ones as noise, sum the rest",
        "paper": "Model Breadcrumbs (Davari & Belilovsky, ECCV 2024); arXiv 2312.06795",
        "sparsify": "middle",
        "density": 0.9,
    },
    "breadcrumbs_ties": {
        "summary": "Drop the largest and the small changes, sum those of the rest agreeing in sign",
        "paper": "Model Breadcrumbs (Davari & Belilovsky, ECCV 2024); arXiv 2312.06795",
        "sparsify": "middle",
        "consensus": True,
        "density": 0.9,
    },
    "della": {
        "summary": "Drop changes at random, small ones rather, average those agreeing in sign",
        "paper": "DELLA-Merging (Deep et al., 2024); arXiv 2406.11617",
        "sparsify": "ranked",
        "consensus": True,
        "normalize": True,
        "rescale": True,
        "density": 0.5,
    },
    "della_linear": {
        "summary": "Drop changes at random, small ones rather, rescale the rest, sum",
        "paper": "DELLA-Merging (Deep et al., 2024); arXiv 2406.11617",
        "sparsify": "ranked",
        "rescale": True,
        "density": 0.5,
    },
}


@final
class Arithmetic(Streaming):
    """Merges by a weighted sum of changes; `PRESETS` names the settings that papers name."""

    sparsify: Literal["none", "magnitude", "middle", "random", "ranked"] = "none"
    """Which elements of each change stay: all; the `density` part of largest magnitude per tensor
    (TIES, section 3.1); the `density` part below the `gamma` part of largest magnitude
    (Breadcrumbs); each with probability `density` (DARE, section 3.1); or each with a
    probability that rises with its rank in its row, `density` on average (DELLA)."""
    consensus: bool = False
    """Sum, per element, only the changes that agree with the sign of the weighted sum (TIES,
    section 3.1, steps 2 and 3)."""
    normalize: bool = False
    """Divide the sum by the weights that took part: a mean in place of a sum (TIES's disjoint mean;
    off in task arithmetic and in DARE as mergekit runs it)."""
    rescale: bool = False
    """Divide what stays of a random choice by its probability, which keeps the expectation (DARE,
    section 3.1; DELLA)."""
    density: float = Field(1.0, gt=0, le=1)
    """Part of each tensor's elements that stays. TIES keeps 0.2 (its section 4); DARE finds 0.1
    to 0.9 workable (its section 4.2), of which 0.5 is the middle, taken for DELLA too;
    Breadcrumbs' 0.9 is mergekit's advice."""
    gamma: float = Field(0.01, ge=0, lt=1)
    """Part of each tensor's elements, the largest, dropped as outliers by sparsify=middle; less
    where `density` leaves less to drop (mergekit's default)."""
    epsilon: float = Field(0.15, ge=0, lt=0.5)
    """The probabilities of sparsify=ranked run from density - epsilon for the smallest element of
    a row to density + epsilon for the largest (mergekit's default)."""
    scale: float = 1.0
    """Factor lambda of the merged change. TIES takes 1 when nothing can be validated (its section
    4); task arithmetic tunes it, often to 0.3 - 0.5 (its section 4)."""
    weights: list[float] | None = None
    """One weight per delta, in their order; all 1 when not given."""
    form: Literal["auto", "adapter", "model"] = "auto"
    """What is written. auto writes one PEFT adapter where every delta is a low-rank adapter and the
    sum is plain (neither sparsify nor consensus), without a look at the base's weights but for
    DoRA's; else a model. adapter refuses anything that would need a model."""
    rank: int | None = Field(None, ge=1)
    """Largest rank of a merged adapter's modules: the nearest one is taken, by an SVD through the
    factors. Exact when not given: the factors stand side by side, so ranks add up."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rescale and self.sparsify not in ("random", "ranked"):
            raise ValueError("rescale belongs to sparsify=random or ranked; set rescale=false")
        if self.form == "adapter" and not self._plain:
            raise ValueError(
                f"form=adapter needs a plain sum, not sparsify={self.sparsify} "
                f"consensus={self.consensus}; set form=model"
            )
        if self.rank is not None and (self.form == "model" or not self._plain):
            raise ValueError("rank belongs to merged adapters, and this writes a model")
        if self.sparsify == "ranked" and self.density < 1:
            low, high = self.density - self.epsilon, self.density + self.epsilon
            if low <= 0 or high > 1:
                raise ValueError(
                    f"density -/+ epsilon = {low:.4g}, {high:.4g} are no probabilities above 0; "
                    "set a smaller epsilon"
                )
        return self

    @property
    def _plain(self) -> bool:
        return self.sparsify == "none" and not self.consensus

    def survey(self, base: Path, deltas: Sequence[Path | None]) -> Survey:
        """See Merger."""
        from deltaloom.merge._adapters import survey_adapters

        adapters = [one for one in deltas if one and (one / "adapter_config.json").is_file()]
        if self._plain and self.form != "model" and len(adapters) == len(deltas) > 0:
            return survey_adapters(base, adapters, self.rank)
        return super().survey(base, deltas)

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """See Streaming; writes an adapter where `form` says so."""
        from deltaloom.merge._adapters import adapters_among, merge_adapters

        adapters = adapters_among(deltas)
        together = self._plain and self.form != "model" and len(adapters) == len(deltas) > 0
        if together:
            parts = shares(self.weights, len(deltas), self.normalize)
            factors = [self.scale * part for part in parts]
            return merge_adapters(base, adapters, factors, self.rank, run)
        if self.form == "adapter" or self.rank is not None:
            others = [i for i, delta in enumerate(deltas, 1) if delta not in adapters]
            raise InputError(
                f"delta {others[0] if others else 1} is no low-rank adapter, so the product is "
                "none; set form=model and leave rank out"
            )
        return super().merge(base, deltas, run, data=data)

    def rule(self, models: int, seed: int = 0) -> Linear | Selective:
        """The rule for `models` sources; raises InputError when the weights do not fit them."""
        from deltaloom.merge._rules import Linear, Selective

        parts = shares(self.weights, models, self.normalize)
        if self._plain:
            return Linear([self.scale * part for part in parts])
        if self.consensus:
            parts = shares(self.weights, models, normalize=False)  # divided element by element
        return Selective(self, parts, seed)
