"""Keep the rows whose Adam-shaped gradients point like the target's (LESS).

Paper: Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning"
(arXiv 2402.04333).

Score of row z for subtask S: sum_c w_c mean_{z' in S} cos(P Gamma_c(z), P grad l(z'; theta_c)),
the largest over subtasks. theta_c are the epochs' checkpoints of a warm-up LoRA run on a random
part of the pool, w_c the epochs' mean learning rates scaled to sum to 1, P a random projection,
and Gamma = m' / sqrt(v' + 1e-8) with m' = 0.9 m + 0.1 g, v' = 0.999 v + 0.001 g^2 from the
warm-up optimizer's moments m, v. Subtasks are the target rows' `group` (one when they have none).

Differs: the update follows the authors' code (no bias correction, epsilon inside the root) where
the paper prints Adam's; the projection is a sparse Johnson-Lindenstrauss transform of the same
fidelity (`projection=rademacher` is the authors') and rows are stored as int8 (QLESS, Ananta et al.
2025, arXiv 2502.01703); groups may differ in size; adapters sit on all linear modules unless
`warmup.modules` says otherwise.

Not covered: gradients of anything but LoRA factors; near-duplicates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, field_validator

from deltaloom.core.base import BaseField
from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.select._budget import BudgetSelector
from deltaloom.select._picking import Pick
from deltaloom.tune.lora import Lora

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.select._influence import Influence

AUTHORS = {"r": 128, "alpha": 512.0, "dropout": 0.1, "lr": 2e-5, "epochs": 4, "batch_size": 128}
"""LESS's warm-up (scripts/train, on four devices)."""
WIDTHS = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
NAMED = 3
"""Target rows that a reason names."""


@final
class Less(BudgetSelector):
    """Gradient influence on the target."""

    needs: ClassVar[frozenset[str]] = frozenset({"target", "base"})

    proxy: Annotated[BaseField | None, PLACE] = None
    """Model whose gradients are used instead of the base's: a small model of the same family
    selects for a large one at its own price (the paper's LESS-T)."""
    warmup_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Random share of the pool that the warm-up run sees (LESS: 0.05)."""
    warmup: Lora = Lora(**AUTHORS)
    """Settings of the warm-up run; each epoch gives one checkpoint (LESS: r 128, alpha 512,
    dropout 0.1, lr 2e-5, 4 epochs, batch 128). Keys given replace these one by one."""
    checkpoints: Literal["all", "last"] = "all"
    """Epochs whose gradients count: all as published, or the last alone, at a part of the cost
    (ours)."""
    projection: Literal["sparse", "rademacher", "gaussian"] = "sparse"
    """Random projection of the gradients: sparse costs O(D), rademacher is the authors'."""
    dimension: Annotated[int, Field(ge=1)] = 4096
    """Width of the projected gradients (LESS: 8192; half of it kept the ranking on CPUs)."""
    dtype: Literal["int8", "float16", "bfloat16", "float32"] = "int8"
    """Number format of the stored features (QLESS: int8 selects as float16 does)."""
    pick: Pick = "top"
    """How influence becomes a choice: top takes the best scores (LESS), round_robin lets subtasks,
    or the rows of a single one, take turns (Nayak et al. 2026)."""
    features: str | None = None
    """Folder where the warm-up and the pool's features are kept and found again, so that another
    target costs its own rows only; the run's scratch when left out."""
    scores_only: bool = False
    """Keep each pool row's influence instead of its features: less disk, nothing for another
    target."""

    @field_validator("warmup", mode="before")
    @classmethod
    def _onto_authors(cls, value: Any) -> Any:
        return {**AUTHORS, **value} if isinstance(value, dict) else value

    @field_validator("features")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value and str(Path(value).expanduser().resolve())

    def work(self, sizes: Sizes) -> Work:
        """Warm-up epochs on a part, then one gradient pass over everything per checkpoint."""
        epochs = round(self.warmup.epochs)
        passes = epochs if self.checkpoints == "all" else 1
        training = self.warmup.work(sizes)
        trained, seen = epochs * self.warmup_fraction * sizes.rows, sizes.rows + sizes.target_rows
        width = 4 * sizes.target_rows if self.scores_only else WIDTHS[self.dtype] * self.dimension
        return Work(
            adapter_tokens=(trained + passes * seen) * sizes.row_tokens,
            memory_bytes=training.memory_bytes,
            disk_bytes=training.disk_bytes + float(passes * sizes.rows * width),
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows in order of choice; the scores cover the whole pool."""
        from deltaloom.core.features import Features
        from deltaloom.select._picking import round_robin, top

        assert target is not None
        assert base is not None
        reach = self.reach(len(pool))
        _say_shared(pool, target, run)
        influence = self._influence(pool, target, self.proxy or base, run)
        groups = _columns([row.group or "" for row in target])
        by_group = influence.of(groups)  # (n, G)
        scores = by_group.max(axis=1)
        if self.pick == "top":
            order = top(scores, reach)
        else:
            one_by_one = [[j] for j in range(len(target))]
            turns = by_group if len(groups) > 1 else influence.of(one_by_one)
            order = round_robin(turns, reach)
        chosen = self.take(pool, order, run, base)
        stored = Features.from_scores(
            run.work / "scores",
            pool.ids,
            scores,
            about={"method": "less", "base": base.fingerprint(), "target": target.digest()},
            columns={"source": [row.source for row in pool]},
        )
        return Selection(chosen, stored, _reasons(influence, chosen, pool, target))

    def _influence(self, pool: Examples, target: Examples, source: Base, run: Run) -> Influence:
        from deltaloom.select._influence import Influence, Sketching
        from deltaloom.select._warmup import kept_folder, warm_up

        how = Sketching(source, self.warmup, self.projection, self.dimension, run.seed, self.dtype)
        with kept_folder(self.features, run) as home:
            epochs = warm_up(how, self.warmup_fraction, pool, run, home)
            if self.checkpoints == "last":
                epochs = epochs[-1:]
            only = self.scores_only
            return Influence.measure(how, epochs, pool, target, run, home, scores_only=only)


def _columns(groups: list[str]) -> list[list[int]]:
    """The target rows of each subtask, subtasks by name."""
    return [[j for j, group in enumerate(groups) if group == name] for name in sorted(set(groups))]


def _say_shared(pool: Examples, target: Examples, run: Run) -> None:
    shared = len(set(pool.ids) & set(target.ids))
    if shared:
        say(f"{shared} target rows are in the pool too and will choose themselves")
        run.note(target_rows_in_pool=shared)


def _reasons(
    influence: Influence, chosen: Examples, pool: Examples, target: Examples
) -> dict[str, str]:
    """Chosen id -> the target rows that pulled it in, strongest first."""
    number = {identity: i for i, identity in enumerate(pool.ids)}
    pulls = influence.rows([number[identity] for identity in chosen.ids])  # (k, t)
    best = (-pulls).argsort(axis=1, kind="stable")[:, :NAMED]
    ids = target.ids
    return {
        identity: "pulled in by target rows " + ", ".join(f"{ids[j]} ({row[j]:+.3f})" for j in own)
        for identity, row, own in zip(chosen.ids, pulls, best, strict=True)
    }
