"""Task arithmetic and its family: weighted sums of changes, sparsified or not, by sign or not.

Paper: Editing Models with Task Arithmetic (Ilharco et al., ICLR 2023), section 2; TIES-Merging
(Yadav et al., NeurIPS 2023), section 3; Language Models are Super Mario (Yu et al., ICML 2024),
section 3; Model Soups (Wortsman et al., ICML 2022).

Formula: theta = theta_0 + scale * sum_i w_i s(tau_i) / z, with tau_i = theta_i - theta_0 per
tensor. s keeps everything, the `density` part of largest magnitude, or a random `density` part
divided by `density`. With `consensus` the sum runs, per element, over the changes whose sign is
that of the weighted sum of all. z is 1, or with `normalize` the weights that took part.

Differs: TIES trims per tensor, as mergekit does, where the paper trims per task vector; equal
magnitudes at the threshold are kept from the lowest flat index on, so exactly
max(1, floor(density * n)) elements stay. Everything is float32 (float64 where the base is) and
rounded once; magnitudes are compared in float32. mergekit rounds changes and weights to the model's
dtype in between, lets an unstable sort choose among equal magnitudes, and rescales DARE by a ratio
of L1 norms where this divides by the density, as the paper does. DARE's draws are Philox4x32-10 in
counter mode keyed by (seed, tensor name, place in the list), so they depend on nothing else.

Not covered: DELLA, breadcrumbs, densities or weights that differ by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Merger, Sizes, Work

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
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
}


@final
class Arithmetic(Merger):
    """Merges by a weighted sum of changes; `PRESETS` names the settings that papers name."""

    sparsify: Literal["none", "magnitude", "random"] = "none"
    """Which elements of each change stay: all, the `density` part of largest magnitude per tensor
    (TIES, section 3.1), or each with probability `density` (DARE, section 3.1)."""
    consensus: bool = False
    """Sum, per element, only the changes that agree with the sign of the weighted sum (TIES,
    section 3.1, steps 2 and 3)."""
    normalize: bool = False
    """Divide the sum by the weights that took part: a mean in place of a sum (TIES's disjoint mean;
    off in task arithmetic and in DARE as mergekit runs it)."""
    rescale: bool = False
    """Divide what stays of a random choice by `density`, which keeps its expectation (DARE,
    section 3.1)."""
    density: float = Field(1.0, gt=0, le=1)
    """Part of each tensor's elements that stays. TIES keeps 0.2 (its section 4); DARE finds 0.1
    to 0.9 workable (its section 4.2), of which 0.5 is the middle."""
    scale: float = 1.0
    """Factor lambda of the merged change. TIES takes 1 when nothing can be validated (its section
    4); task arithmetic tunes it, often to 0.3 - 0.5 (its section 4)."""
    weights: list[float] | None = None
    """One weight per delta, in their order; all 1 when not given."""
    threads: int | None = Field(None, ge=1)
    """Threads over tensors; two when not given. The result does not depend on it."""
    block: int | None = Field(None, ge=256)
    """Elements handled at a time, the measure of memory; 262,144 when not given (measured). The
    result does not depend on it."""
    shard_bytes: int = Field(5_000_000_000, ge=1)
    """Largest weights file in bytes."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Type of the merged weights; the base's, tensor by tensor, when not given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rescale and self.sparsify != "random":
            raise ValueError("rescale belongs to sparsify=random; set rescale=false")
        return self

    def work(self, sizes: Sizes) -> Work:
        """Blocks of every model at a time, and one model written; no token is run."""
        from deltaloom.merge._stream import BLOCK

        buffers = 4.0 * (self.block or BLOCK) * (sizes.deltas + 2) * (self.threads or 2)
        return Work(memory_bytes=buffers, disk_bytes=float(sizes.weight_bytes))

    def merge(self, base: Base, deltas: list[Delta], run: Run) -> Delta:
        """Write the merged model to `run.folder` and return it as a change over `base`.

        Whole models and adapters are read where they lie; a delta that is only in memory is
        written to `run.work` first. Raises InputError for no deltas, weights that do not match
        them, or deltas that do not fit the base.
        """
        from deltaloom.core.delta import describe, load
        from deltaloom.core.progress import progress
        from deltaloom.core.tensors import TensorFolder

        self.rule(len(deltas), run.seed)
        folders = [_folder(delta, run.work / f"delta-{i}") for i, delta in enumerate(deltas)]
        merged = run.work / "merged"
        with progress("merge, bytes", TensorFolder(base.folder).nbytes) as advance:
            if not merged.exists():  # an interrupted run may have got as far as the rename
                self.merge_folders(base.folder, folders, merged, run.seed, advance)
        describe(merged, "dense", base)
        run.publish(merged)
        return load(run.folder, base)

    def merge_folders(self, base, sources, out, seed=0, progress=None) -> Path:
        """Merge local folders `sources` over the local folder `base` into the new folder `out`.

        `progress` is called with the bytes of each tensor written. Raises as `merge` does.
        """
        from deltaloom.merge._stream import BLOCK, merge_folders

        return merge_folders(
            base,
            sources,
            self.rule(len(sources), seed),
            out,
            threads=self.threads,
            block=self.block or BLOCK,
            shard_bytes=self.shard_bytes,
            dtype=self.dtype,
            progress=progress,
        )

    def rule(self, models: int, seed: int = 0) -> Linear | Selective:
        """The rule for `models` sources; raises InputError when the weights do not fit them."""
        from deltaloom.merge._rules import Linear, Selective

        if models < 1:
            raise InputError("nothing to merge: give at least one delta")
        weights = self.weights if self.weights is not None else [1.0] * models
        if len(weights) != models:
            raise InputError(f"{len(weights)} weights for {models} deltas; give one for each")
        if self.normalize and abs(sum(weights)) < 1e-8:
            raise InputError("the weights sum to zero, so they cannot be normalized")
        total = sum(weights) if self.normalize and not self.consensus else 1.0
        shares = [weight / total for weight in weights]
        if self.sparsify == "none" and not self.consensus:
            return Linear([self.scale * share for share in shares])
        return Selective(self, shares, seed)


def _folder(delta: Delta, scratch: Path) -> Path:
    """A folder the engine can read: the delta's own, or `scratch` with the delta written to it."""
    from deltaloom.core.deltas.dense import Dense, ModelChange
    from deltaloom.core.deltas.lowrank import LowRank

    if isinstance(delta, LowRank) and delta.folder is not None:
        return delta.folder
    if isinstance(delta, Dense) and len(delta.terms) == 1:
        factor, change = delta.terms[0]
        if factor == 1.0 and isinstance(change, ModelChange):
            return change.tuned.path
    (delta if isinstance(delta, Dense) else Dense(delta.base, ((1.0, delta),))).save(scratch)
    return scratch
