"""Search which small modules, of what size, in which layers: quality against parameters.

Paper: Zhou et al. 2024, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient
Fine-Tuning" (TACL, arXiv 2301.12132).

A configuration says the size of a serial and a parallel bottleneck, of a prefix and of a low-rank
change (0 or a power of two up to `largest`), and for every layer whether it has them (`tune
composite`). Each is tuned on a part of the rows and measured on another; both that measurement and
log2(1 + parameters) are made small by multi-objective Bayesian optimisation. What no other
configuration beats in both is the front: each of its points is kept as an adapter folder
(`front/`), and is measured on rows that neither tuning nor the search has seen.

Differs: the surrogate is Optuna's Gaussian process with expected hypervolume improvement, where the
paper has a fully Bayesian one with sparse axes; the authors report the rows that they searched on,
and their code proposes the start of each local search instead of its end; LoRA is ours to add.

Not covered: sparse modules; retraining the front with other seeds; low-fidelity runs other than
fewer `epochs` or rows.
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
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Trial, Work, get
from deltaloom.core.progress import say
from deltaloom.search._space import Dimension
from deltaloom.search._study import Outcome, Study
from deltaloom.tune._gradient import GradientSettings, train
from deltaloom.tune.composite import Composite
from deltaloom.tune.lora import save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

KINDS = ("serial", "parallel", "prefix", "lora")
GOAL, SIZE = "objective", "log2_parameters"
FRONT = "front"


@final
class Autopeft(GradientSettings, Searcher):
    """Pareto front of mixed modules."""

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
    storage: str | None = None
    """Database URL of the Optuna study, as postgresql+psycopg://USER@HOST/DB; None keeps a journal
    file in the run's folder."""

    def work(self, sizes: Sizes) -> Work:
        """Every trial at half of the largest sizes."""
        one = Composite(serial=self.largest // 2 or 1, epochs=self.epochs).work(sizes)
        return Work(
            adapter_tokens=self.trials * one.adapter_tokens,
            memory_bytes=one.memory_bytes,
            disk_bytes=self.trials * one.disk_bytes,
        )

    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Search on `base`; the product is the front's best adapter, beside the whole front."""
        depth = base.config().get("num_hidden_layers")
        if not isinstance(depth, int):
            raise InputError(f"{base.model}: its config has no num_hidden_layers to switch layers")
        kept, inner, outer = self._split(data, evaluation, run)
        space = self._space(depth)
        study = Study(run, space, {GOAL: "lower", SIZE: "lower"}, self.trials, self.storage)
        home = run.work / "adapters"

        def attempt(settings: dict[str, Any], part: Run) -> Outcome:
            return self._try(base, kept, inner, settings, part, home)

        trials = study.explore(attempt)
        front = self._front(trials, space, home, base, outer, run)
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

    def _try(
        self,
        base: Base,
        kept: Examples,
        inner: Evaluation,
        settings: dict[str, Any],
        part: Run,
        home: Path,
    ) -> Outcome:
        """Tune one configuration, keep its adapter, measure it."""
        from deltaloom.engine.meter import training_cost

        tuner = self._tuner(settings)
        if tuner is None:  # nothing is on: the base itself
            return Outcome({GOAL: _measured(base.load(), base, inner, part), SIZE: 0.0})
        model = tuner.attach(base, part.seed)
        how = tuner.train_settings(self.lr, trainable="adapter", keep=1)
        model = train(model, base, kept, part, tuner, how, None)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        folder = home / _name(part)
        shutil.rmtree(folder, ignore_errors=True)
        save_adapter(model, folder, base, "composite")
        tokens = round(self.epochs * part.record["notes"]["tokens"])
        cost = {**training_cost(model, tokens, "adapter"), "parameters": float(count)}
        value = _measured(model, base, inner, part)
        return Outcome({GOAL: value, SIZE: _log(count)}, cost)

    def _tuner(self, settings: dict[str, Any]) -> Composite | None:
        own = _configuration(settings)
        if own is None:
            return None
        shared = {key: getattr(self, key) for key in GradientSettings.model_fields}
        return Composite(**{**shared, **own, "lr": self.lr})

    def _front(
        self,
        trials: Sequence[Trial],
        space: dict[str, Dimension],
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
            adapter = (goal / name).exists()
            point = {
                "trial": trial.number,
                "settings": _configuration(trial.settings) or {},
                GOAL: trial.values[GOAL],
                "parameters": int(trial.cost.get("parameters", 0)),
                "adapter": f"{FRONT}/{name}" if adapter else None,
            }
            if adapter or not point["settings"]:
                model = load(goal / name, base).apply(base) if adapter else base.load()
                point["untouched"] = _measured(model, base, outer, run.nested("untouched"))
            found.append(point)
            say(f"front: {point['parameters']} parameters, {GOAL} {point[GOAL]:.4g}")
        write_json(run.folder / "front.json", found)
        return found

    def _publish(self, best: dict[str, Any], base: Base, run: Run) -> Delta | None:
        """The best point's adapter as the step's own product."""
        if best["adapter"] is None:
            return None
        result = run.work / "result"
        shutil.rmtree(result, ignore_errors=True)
        shutil.copytree(run.folder / best["adapter"], result)
        run.publish(result)
        return load(run.folder, base)


def pareto(trials: Sequence[Trial], goals: tuple[str, str]) -> list[Trial]:
    """The finished trials that no other is at least as good as in both, the best by the first goal
    first; the earliest of equals.
    """
    done = [trial for trial in trials if trial.failed is None]
    order = sorted(done, key=lambda t: (t.values[goals[0]], t.values[goals[1]], t.number))
    front: list[Trial] = []
    for trial in order:
        if not front or trial.values[goals[1]] < front[-1].values[goals[1]]:
            front.append(trial)
    return front


def _configuration(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `tune composite` takes; None where nothing is on."""
    sizes = {kind: 2 ** (settings[kind] - 1) if settings[kind] else 0 for kind in KINDS}
    bits = [key for key in settings if key.startswith("layer_")]
    layers = [number for number in range(len(bits)) if settings[f"layer_{number}"]]
    if not layers or not any(sizes.values()):
        return None
    return {**sizes, "layers": layers}


def _measured(model: Any, base: Base, by: Evaluation, run: Run) -> float:
    """The measurement, lower for better."""
    model.eval()
    estimate = by.method.measure(model, base.tokenizer(), by.data, run)
    return estimate.value if estimate.better == "lower" else -estimate.value


def _log(count: int) -> float:
    import math

    return math.log2(1 + count)


def _name(part: Run) -> str:
    return part.folder.name
