"""Search which small modules, of what size, in which layers: quality against parameters.

Paper: Zhou et al. 2024, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient
Fine-Tuning" (TACL, arXiv 2301.12132).

A configuration says the size of a serial and a parallel bottleneck, of a prefix, of a low-rank and
of a sparse change (0 or a power of two up to `largest`), and for every layer whether it has them
(`tune composite`); what has no size or no layer is none. Each is tuned on a part of the rows and
measured on another; both that measurement and log2(1 + parameters) are made small by
multi-objective Bayesian optimisation. A search of twenty trials or more begins with each kind
alone, on all layers. What no other configuration beats in both is the front: each of its points is
kept as an adapter folder (`front/`), and is measured on rows that neither tuning nor the search has
seen. With `rungs` above 1 configurations are tuned on few rows first, and only the best third goes
on to three times as many.

Differs: the surrogate is Optuna's Gaussian process with expected hypervolume improvement, where the
paper has a fully Bayesian one with sparse axes; `surrogate: saas` is that one with the most
probable lengths instead of samples of them (`search/_saas.py`). The authors report the rows that
they searched on; their code proposes the start of each local search instead of its end and may
propose what was tried. LoRA, sparse changes and successive halving are ours to add.

Not covered: tuning the front again from other seeds (bench/claims/autopeft.py does it); sampled
lengths of a surrogate.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Trial, Work
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.search._front import Goals, pareto
from deltaloom.search._mixtures import GOAL, KINDS, SIZE, Attempt, configuration, meaning, measured
from deltaloom.search._proposing import Surrogate
from deltaloom.search._saas import check_installed
from deltaloom.search._space import Dimension
from deltaloom.search._study import KEPT, Study
from deltaloom.tune._gradient import GradientSettings
from deltaloom.tune.composite import Composite

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

FRONT = "front"


@final
class Autopeft(GradientSettings, Searcher):
    """Pareto front of mixed modules."""

    # Five are the fewest of which two are proposed by results; a rung above takes two of them.
    trial = {"trials": 5, "epochs": 0.2, "rungs": 2, "largest": 4}

    trials: Annotated[int, Field(ge=1)] = 8
    """Configurations to tune (ours; AutoPEFT: 200)."""
    largest: Annotated[int, Field(ge=1)] = 64
    """Largest size of a module; sizes are 0 and the powers of two up to it (ours; AutoPEFT's go up
    to the hidden size)."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of every trial (as `tune composite`)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over a trial's rows (ours; AutoPEFT: 20 at most)."""
    holdout: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Share of the rows for comparing trials, where `evaluate` is not given, and the same again for
    the front's own figures (ours)."""
    rungs: Annotated[int, Field(ge=1)] = 1
    """Attempts of a configuration: the first of all, on few rows; each further one of the best
    third, on three times as many; the last is on all rows."""
    ahead: Annotated[int, Field(ge=1)] = 1
    """Trials that may be done at the same time once each depends on earlier ones: a proposal knows
    the results of all but so many less one. Set it to the number of `workers` (AutoPEFT: 4)."""
    surrogate: Surrogate = "gp"
    """What proposes from results: `gp`, Optuna's Gaussian-process sampler; `saas`, processes with
    sparse axes by BoTorch (`pip install "deltaloom[botorch]"`; AutoPEFT has sparse axes)."""
    save_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps between checkpoints within a trial; None saves finished trials only."""
    storage: str | None = None
    """Database URL of the Optuna study, as postgresql+psycopg://USER@HOST/DB; None keeps a journal
    file in the run's folder."""

    def work(self, sizes: Sizes) -> Work:
        """Every trial at half of the largest sizes."""
        one = Composite(serial=self.largest // 2 or 1, epochs=self.epochs).work(sizes)
        # A third of the trials on three times the rows takes as long as all of them before.
        whole = self.rungs * self.trials / KEPT ** (self.rungs - 1)
        return Work(
            adapter_tokens=whole * one.adapter_tokens,
            memory_bytes=one.memory_bytes,
            disk_bytes=self.trials * one.disk_bytes,
        )

    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Search on `base`; the product is the front's best adapter, beside the whole front."""
        if self.surrogate == "saas":
            check_installed()
        depth = base.config().get("num_hidden_layers")
        if not isinstance(depth, int):
            raise InputError(f"{base.model}: its config has no num_hidden_layers to switch layers")
        kept, inner, outer = self._split(data, evaluation, run)
        space = self._space(depth)
        goals: Goals = {GOAL: "lower", SIZE: "lower"}
        study = Study(
            run,
            space,
            goals,
            self.trials,
            self.storage,
            first=self._alone(space),
            ahead=self.ahead,
            meaning=meaning,
            surrogate=self.surrogate,
        )
        home = run.work / "adapters"
        mixed = random.Random(run.seed).sample(range(len(kept)), len(kept))
        shares = [KEPT**-rung for rung in reversed(range(self.rungs))]
        parts = [kept.take(sorted(mixed[: max(1, round(one * len(kept)))])) for one in shares]
        trials = study.explore(*(Attempt(self, base, part, inner, home) for part in parts))
        whole = [trial for trial in trials if trial.rung == self.rungs - 1]
        front = self._front(whole, home, base, outer, run)
        best = front[0]
        delta = self._publish(best, base, run)
        choice = {
            "settings": best["settings"],
            GOAL: best[GOAL],
            "parameters": best["parameters"],
            "trial": best["trial"],
            FRONT: front,
        }
        return Found(choice, trials, delta)

    def _space(self, depth: int) -> dict[str, Dimension]:
        """Exponents of the sizes, 0 for none, and a bit for each layer."""
        size = Dimension(low=0, high=self.largest.bit_length(), integer=True)
        layer = Dimension(low=0, high=1, integer=True)
        return {**dict.fromkeys(KINDS, size), **{f"layer_{n}": layer for n in range(depth)}}

    def _alone(self, space: dict[str, Dimension]) -> list[dict[str, Any]]:
        """Each kind by itself, of middle size, on all layers; nothing in a search so short that
        these would be more than a quarter of it.
        """
        if self.trials < 4 * len(KINDS):
            return []
        off = {name: 0 if name in KINDS else 1 for name in space}
        return [{**off, kind: (self.largest.bit_length() + 1) // 2} for kind in KINDS]

    def _split(
        self, data: Examples, evaluation: Evaluation | None, run: Run
    ) -> tuple[Examples, Evaluation, Evaluation]:
        """Rows to tune on; what compares trials; what is left untouched until the end."""
        held = max(1, round(self.holdout * len(data)))
        parts = 1 if evaluation else 2
        if len(data) < parts * held + 1:
            raise InputError(f"{data.name}: {len(data)} rows are too few to tune and compare on")
        order = random.Random(run.seed).sample(range(len(data)), len(data))
        outer = data.take(sorted(order[:held]))
        measurer: Any = get("measure", "loss").make({"max_length": self.max_length})
        if evaluation is None:
            inner = Evaluation(measurer, data.take(sorted(order[held : 2 * held])))
        else:
            inner, measurer = evaluation, evaluation.method
        return data.take(sorted(order[parts * held :])), inner, Evaluation(measurer, outer)

    def _front(
        self,
        trials: Sequence[Trial],
        home: Path,
        base: Base,
        outer: Evaluation,
        run: Run,
    ) -> list[dict[str, Any]]:
        """The points that no other beats, the best first, measured on untouched rows."""
        goal = run.folder / FRONT
        goal.mkdir(exist_ok=True)
        found = []
        for trial in pareto(trials, (GOAL, SIZE)):
            name = f"trial-{trial.number}"
            if (home / name).exists():
                shutil.rmtree(goal / name, ignore_errors=True)
                os.replace(home / name, goal / name)
            model = load(goal / name, base).apply(base)
            point = {
                "trial": trial.number,
                "settings": configuration(trial.settings),
                GOAL: trial.values[GOAL],
                "parameters": int(trial.cost["parameters"]),
                "adapter": f"{FRONT}/{name}",
                "untouched": measured(model, base, outer, run.nested("untouched")),
            }
            found.append(point)
            say(f"front: {point['parameters']} parameters, {GOAL} {point[GOAL]:.4g}")
        write_json(run.folder / "front.json", found)
        return found

    def _publish(self, best: dict[str, Any], base: Base, run: Run) -> Delta:
        """The best point's adapter as the step's own product."""
        result = run.work / "result"
        shutil.rmtree(result, ignore_errors=True)
        shutil.copytree(run.folder / best["adapter"], result)
        run.publish(result)
        return load(run.folder, base)
