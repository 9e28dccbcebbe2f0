"""Weigh sources by what a few steps on each alone change on the targets (tail-patch).

Paper: Vu et al. 2024, "Foundational Autoraters: Taming Large Language Models for Better Automatic
Evaluation" (FLAMe, arXiv 2407.10817), FLAMe-Opt-RM. No code was released; the numbers of ratings
and bundles are quoted second-hand.

From a checkpoint partly trained on the mixture as it is, each source s gets a few steps alone. Its
effect d_st on target t is the change of the measure, better being positive. Ratings: helpful 2,
somewhat helpful 1, no clear effect 0, harmful -1. Bundles of sources by ratings get fixed weights:
100,000 where generally helpful, 30,000 where helpful for some target, 3,000 else.

Differs: ratings come from paired intervals over the target's rows (see `half`), where the authors
looked; a source rated harmful on balance gets weight 0; patches are of LoRA and of `steps` steps
(theirs: 3,000 with all weights); the clearly settled stop early, and of the others the more
promising half goes on (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943). Steps and
looks are what `cost` pays: with W tokens for the checkpoint, M for a look at the targets and c_s(k)
for the k-th patch of s, W + M + sum_k sum_s (c_s(k) + M) <= cost x passes x the pool's tokens,
whichever ceil(S / 2^k) of S sources get a patch k. `weighing=exponential` is ours: the proportional
rates times exp(sharpness u_s), u_s the effects per step shrunk to zero by their errors. Targets are
the groups of `target` (else its sources). All tokens spent are in the run's notes and ledger.

Not covered: the chance in which rows a patch sees (intervals speak of the target's rows); sources
that help only together; a control for what any steps away from the mixture would change.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, field_validator, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Measurer, Selection, Sizes, Work, of_kind
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.select._mixing import MixtureSelector, amounts_of
from deltaloom.select.proportional import rates
from deltaloom.tune.lora import Lora

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.select._patch_cost import Design
    from deltaloom.select._patches import Patches
    from deltaloom.select._ratings import Effect

OURS = {"epochs": 1.0}
"""Of the warm-up: one pass over its rows."""
SOURCES = 12
"""Of a pool that nobody has read yet, for `plan`."""
RUNGS = (1, 2, 3)
"""What `rungs` None chooses from."""


@final
class Tailpatch(MixtureSelector):
    """Tail-patch ratings and weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"target", "base"})
    trial: ClassVar[dict[str, Any]] = {"steps": 2, "rungs": 2, "cost": 20.0}

    checkpoint: Annotated[str | None, PLACE] = None
    """LoRA adapter folder of a partly trained run over the base, to patch from; None trains one
    here, on `warmup_fraction` of the pool. A partly trained model folder is given as `base`."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the pool, mixed as it is, that the checkpoint is trained on (ours; the paper says
    only that it is partly trained). 0 patches the base itself."""
    tuning: Lora = Lora.model_validate(OURS)
    """How checkpoint and patches are tuned; epochs are the checkpoint's (ours: 1). Patches keep its
    lr constant. Keys given replace these one by one."""
    cost: Annotated[float, Field(gt=0)] = 0.1
    """Tokens that checkpoint, patches and targets take together at most, as a share of the training
    run whose mixture this sets (ours: a tenth). Steps are as many as it pays."""
    passes: Annotated[float, Field(gt=0)] = 3.0
    """Size of that run, in passes over the pool (3, as `tune` makes unless told otherwise)."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps on each source at most, fewer where `cost` pays fewer (FLAMe: 3,000 of a 24B
    model; ours is what a tenth of a run can pay)."""
    rungs: Annotated[int | None, Field(ge=1)] = None
    """Looks at a source, equally far apart: after each, those whose sign is known on all targets
    stop, and of the others only the more promising half goes on. None takes as many, 1 to 3, as
    give the sources that go on the most steps for `cost`; 1 gives all the same steps."""
    measure: str = "loss"
    """Measure method for the targets."""
    measuring: dict[str, Any] = {}
    """Settings of the measure method."""
    weighing: Literal["bundles", "exponential"] = "bundles"
    """How weights come from effects: FLAMe's bundles, or a continuous form of ours."""
    half: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Part of the best source's effect on a target that makes a clear gain helpful and not only
    somewhat helpful (ours; the authors judged by eye)."""
    sharpness: Annotated[float, Field(gt=0)] = 2.0
    """Of the exponential weights: the power of e that a source gets for an effect of one spread
    above zero (ours)."""

    @field_validator("tuning", mode="before")
    @classmethod
    def _onto_ours(cls, value: Any) -> Any:
        return {**OURS, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> Tailpatch:
        self._measurer()
        if (self.rungs or 1) > self.steps:
            raise ValueError(f"rungs = {self.rungs} is more than steps = {self.steps}")
        return self

    def work(self, sizes: Sizes) -> Work:
        """The checkpoint, the patches of a dozen sources and the targets after each, as far as
        `cost` goes.
        """
        patched = SOURCES * self.steps * self.tuning.batch_size
        warmup = 0.0 if self.checkpoint else self.tuning.epochs * self.warmup_fraction * sizes.rows
        measured = (1 + SOURCES * (self.rungs or 1)) * sizes.target_rows
        paid = self.cost * self.passes * sizes.rows
        part = min(1.0, paid / max(warmup + patched + measured, 1.0))
        return Work(
            forward_tokens=part * measured * sizes.row_tokens,
            adapter_tokens=part * (warmup + patched) * sizes.row_tokens,
            memory_bytes=self.tuning.work(sizes).memory_bytes,
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """One epoch by the weights found; effects and ratings go into `weights.json`.

        Raises InputError for a single source, for a target of one row, for a `cost` that does not
        pay one step on each source, and for an epoch that `size` and `repeats` do not allow.
        """
        assert target is not None
        assert base is not None
        rows = by_name(pool, [row.source for row in pool])
        if len(rows) < 2:
            raise InputError(f"{pool.name}: has one source only; there is nothing to weigh")
        patches, warmup = self._patches(pool, target, base, tuple(rows), run)
        patches.begin(warmup)
        design, cost = self._design(patches, rows, warmup, pool.name)
        effects = self._effects(patches, rows, design, run)
        weights, about = self._weights(effects, pool, base)
        about["cost"] = cost
        return self.drawn(pool, weights, run, base, about)

    def _measurer(self) -> Measurer:
        return of_kind(get("measure", self.measure).make(self.measuring), Measurer)

    def _patches(
        self, pool: Examples, target: Examples, base: Base, sources: tuple[str, ...], run: Run
    ) -> tuple[Patches, Examples | None]:
        """What makes patches, and the rows of the checkpoint that is made here."""
        from deltaloom.core.source_weights import SourceWeights, epoch
        from deltaloom.select._patches import Patches

        targets = by_name(target, [row.group or row.source for row in target])
        for name, rows in targets.items():
            if len(rows) < 2:
                raise InputError(
                    f"{rows[0].where}: is the only row of the target {name!r}; an interval needs "
                    "2 rows at least, and says something with 20"
                )
        open_model = self._opened(base, run)
        patches = Patches(base, self.tuning, self._measurer(), targets, run, open_model, sources)
        warmup = None
        count = round(self.warmup_fraction * len(pool))
        if self.checkpoint is None and count:
            amounts = amounts_of(pool)
            as_it_is = SourceWeights(rates(amounts, 65_536), size=count).within(amounts)
            warmup = epoch(pool, as_it_is, run.seed)
        return patches, warmup

    def _design(
        self, patches: Patches, rows: dict[str, Examples], warmup: Examples | None, name: str
    ) -> tuple[Design, dict[str, float]]:
        """Steps and looks that `cost` pays, and what they take at most."""
        from deltaloom.select._patch_cost import Prices

        lengths = [patches.lengths(own) for own in rows.values()]
        whole = round(self.passes * sum(map(sum, lengths)))
        look = patches.look()
        # A part of a pass may have its longest rows, so it counts as a whole one.
        begun = math.ceil(self.tuning.epochs) * sum(patches.lengths(warmup)) if warmup else 0
        spent = begun + look
        prices = Prices(lengths, self.tuning.batch_size, look)
        rungs = RUNGS if self.rungs is None else (self.rungs,)
        budget = math.floor(self.cost * whole)
        design = prices.best(rungs, self.steps, budget - spent)
        if design is None:
            least = spent + prices.most(min(rungs), 1)
            raise InputError(
                f"cost = {self.cost:g} of {self.passes:g} passes over {name} pays {budget} tokens; "
                f"a checkpoint ({begun}), a step on each of {len(rows)} sources and a look at the "
                f"targets after each ({look} a look) take {least}: allow cost = "
                f"{math.ceil(1000 * least / whole) / 1000:g} or more passes, or give fewer target "
                "rows or sources"
            )
        most = spent + design.tokens
        say(
            f"{design.steps} steps and {design.rungs} looks a source at most: {most} tokens, "
            f"{most / whole:.1%} of {self.passes:g} passes over the pool"
        )
        return design, {"run_tokens": whole, "most_tokens": most, "share": most / whole}

    def _opened(self, base: Base, run: Run) -> Any:
        if self.checkpoint is None:
            return lambda: self.tuning.attach(base, run.seed)

        def load() -> Any:
            from peft import PeftModel

            from deltaloom.core.delta import load as load_delta

            delta = load_delta(str(self.checkpoint), base)
            if delta.kind != "lowrank":
                raise InputError(
                    f"checkpoint = {self.checkpoint}: is no LoRA adapter; give a model folder as "
                    "base= and leave out checkpoint="
                )
            return PeftModel.from_pretrained(base.load(), str(self.checkpoint), is_trainable=True)

        return load

    def _effects(
        self, patches: Patches, rows: dict[str, Examples], design: Design, run: Run
    ) -> dict[str, dict[str, Effect]]:
        """Source -> target -> effect, after as many rungs as each source was given."""
        from deltaloom.select._patches import effect, settled_heap

        before = patches.before()
        found: dict[str, dict[str, Effect]] = {}
        finished: list[tuple[str, int]] = []
        going = list(rows)
        with settled_heap():
            for rung in range(design.rungs):
                for source in going:
                    after = patches.patch(source, rows[source], rung, design.each)
                    steps = (rung + 1) * design.each
                    found[source] = {t: effect(before[t], after[t], steps) for t in before}
                    finished.append((source, rung))
                    says = ", ".join(f"{t} {one.value:+.3g}" for t, one in found[source].items())
                    say(f"{source}: {steps} steps alone: {says}")
                going = _go_on(going, found)
        cost = patches.account(finished)
        taken = {source: own[next(iter(own))].steps for source, own in found.items()}
        run.note(patch_steps=taken, patch_tokens=cost["backward_tokens"])
        return found

    def _weights(
        self, effects: dict[str, dict[str, Effect]], pool: Examples, base: Base
    ) -> tuple[dict[str, float], dict[str, Any]]:
        from deltaloom.select._ratings import bundled, exponential, rated, utilities

        ratings = rated(effects, self.half)
        amounts = amounts_of(pool, self.lengths(pool, base))
        if self.weighing == "bundles":
            weights = bundled(ratings)
        else:
            weights = exponential(effects, rates(amounts, 65_536), self.sharpness)
        about = {
            "method": "tailpatch",
            "measure": self.measure,
            "weighing": self.weighing,
            "ratings": ratings,
            "utilities": utilities(effects),
            "effects": {s: {t: one.record() for t, one in e.items()} for s, e in effects.items()},
        }
        return weights, about


def by_name(rows: Examples, names: list[str]) -> dict[str, Examples]:
    """Rows of each name, names in order."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name, []).append(number)
    return {
        name: type(rows)((rows[i] for i in found[name]), f"{rows.name} ({name})")
        for name in sorted(found)
    }


def _go_on(going: list[str], found: dict[str, dict[str, Effect]]) -> list[str]:
    """Of the sources whose signs are not all known, the half that may turn out best."""
    open_ones = [s for s in going if not all(one.settled for one in found[s].values())]

    def promise(source: str) -> float:
        return sum(one.high for one in found[source].values()) / len(found[source])

    kept = sorted(open_ones, key=lambda s: (-promise(s), s))[: math.ceil(len(open_ones) / 2)]
    return [s for s in going if s in kept]
