"""Trials, one after the other: proposed, done, recorded; whatever stops a search, it goes on.

A finished trial is one small file in the run's scratch; the Optuna study (a journal file beside the
run's record, or a database) is kept in step with those files and is rebuilt from them when it was
lost or damaged, and they from it. The first trials spread evenly over the space, later ones are
proposed by Optuna's Gaussian-process sampler, a new one for each trial with a seed of its own, so
that a resumed search proposes what an undisturbed one does.

A failed trial counts, for proposing only, as the worst one seen; values much worse than the median
are cut to it plus twice its distance to the best, because one trial that nearly diverged would
otherwise flatten everything else (ours).
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import WorkError
from deltaloom.core.method import Trial
from deltaloom.core.progress import say
from deltaloom.search._space import Dimension, first_points
from deltaloom.search._storage import Mirror

if TYPE_CHECKING:
    from deltaloom.core.run import Run

Goals = Mapping[str, Literal["lower", "higher"]]
"""What is measured of each trial, and which way is better."""


@dataclass(frozen=True)
class Outcome:
    """What one attempt gave."""

    values: dict[str, float]
    cost: dict[str, float] = field(default_factory=dict)


Attempt = Callable[[dict[str, Any], "Run"], Outcome]
"""Tries settings in a run of its own; raises WorkError when they do not work."""


@dataclass
class Study:
    """A search over `space` for `trials` trials."""

    run: Run
    space: Mapping[str, Dimension]
    goals: Goals
    trials: int
    storage: str | None = None
    first: Sequence[dict[str, Any]] = ()
    """Settings to try before all others."""

    def explore(self, attempt: Attempt) -> tuple[Trial, ...]:
        """Do all trials that are not done yet; raises WorkError when every one failed."""
        began, trying = time.perf_counter(), 0.0
        home = self.run.work / "trials"
        home.mkdir(exist_ok=True)
        mirror = Mirror(self.run, self.space, self.goals, self.storage)
        done = self._recorded(home, mirror)
        for number in range(len(done), self.trials):
            settings = self.propose(number, done)
            say(f"trial {number + 1} of {self.trials}: {brief(settings)}")
            start = time.perf_counter()
            trial = self._try(number, settings, attempt)
            trying += time.perf_counter() - start
            write_json(_path(home, number), asdict(trial))
            mirror.add(trial)
            done.append(trial)
            shutil.rmtree(self.run.work / f"trial-{number}", ignore_errors=True)
            if trial.failed is not None:
                say(f"trial {number + 1} failed: {trial.failed}")
        past = self.run.record["notes"]
        seconds = time.perf_counter() - began
        self.run.note(
            trial_seconds=past.get("trial_seconds", 0.0) + trying,
            overhead_seconds=past.get("overhead_seconds", 0.0) + seconds - trying,
        )
        if all(trial.failed is not None for trial in done):
            raise WorkError(f"all {len(done)} trials failed; the first: {done[0].failed}")
        return tuple(done)

    def _recorded(self, home: Path, mirror: Mirror) -> list[Trial]:
        done: list[Trial] = []
        kept = mirror.trials()
        while len(done) < self.trials:
            path, number = _path(home, len(done)), len(done)
            if path.exists():
                done.append(Trial(**json.loads(path.read_text(encoding="utf-8"))))
            elif number < len(kept):
                done.append(kept[number])
                write_json(path, asdict(kept[number]))
            else:
                break
        mirror.restore(done)
        return done

    def _try(self, number: int, settings: dict[str, Any], attempt: Attempt) -> Trial:
        import torch

        try:
            outcome = attempt(settings, self.run.nested(f"trial-{number}"))
        except (WorkError, torch.OutOfMemoryError) as error:
            return Trial(number, settings, {}, {}, str(error).splitlines()[0])
        wrong = [name for name in self.goals if not _finite(outcome.values[name])]
        if wrong:
            reason = f"{wrong[0]} is {outcome.values[wrong[0]]}"
            return Trial(number, settings, {}, outcome.cost, reason)
        return Trial(number, settings, outcome.values, outcome.cost)

    def propose(self, number: int, done: Sequence[Trial]) -> dict[str, Any]:
        """Settings for trial `number` after the trials `done`."""
        if number < len(self.first):
            return dict(self.first[number])
        spread = max(3, min(10, 2 * len(self.space) + 1, self.trials // 2))
        values = self._values(done)
        if number < len(self.first) + spread or not values:
            points = first_points(self.space, number + 1 - len(self.first), self.run.seed)
            return points[-1]
        return self._ask(number, done, values)

    def _ask(
        self, number: int, done: Sequence[Trial], values: dict[int, list[float]]
    ) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {name: one.distribution() for name, one in self.space.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sampler calls itself experimental
            sampler = optuna.samplers.GPSampler(
                seed=self.run.seed + number, n_startup_trials=1, deterministic_objective=False
            )
            study = optuna.create_study(
                sampler=sampler,
                directions=[
                    "minimize" if way == "lower" else "maximize" for way in self.goals.values()
                ],
            )
            study.add_trials(
                [
                    optuna.trial.create_trial(
                        params=trial.settings, distributions=kinds, values=values[trial.number]
                    )
                    for trial in done
                ]
            )
            params = study.ask(kinds).params
        return {name: params[name] for name in self.space}

    def _values(self, done: Sequence[Trial]) -> dict[int, list[float]]:
        """Trial -> values to propose by; empty when none has any."""
        found: dict[int, list[float]] = {trial.number: [] for trial in done}
        for name, way in self.goals.items():
            sign = 1.0 if way == "lower" else -1.0
            own = [sign * trial.values[name] for trial in done if trial.failed is None]
            if not own:
                return {}
            middle = statistics.median(own)
            limit = middle + 2 * (middle - min(own))
            worst = min(max(own), limit)
            for trial in done:
                value = worst if trial.failed else min(sign * trial.values[name], limit)
                found[trial.number].append(sign * value)
        return found


def best(trials: Sequence[Trial], goal: str, way: Literal["lower", "higher"]) -> Trial:
    """The best trial by one goal; the earliest of equals."""
    sign = 1.0 if way == "lower" else -1.0
    finished = [trial for trial in trials if trial.failed is None]
    return min(finished, key=lambda trial: (sign * trial.values[goal], trial.number))


def brief(settings: Mapping[str, Any]) -> str:
    """Settings as words for people."""
    texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in settings.values())
    return ", ".join(f"{name} = {text}" for name, text in zip(settings, texts, strict=True))


def _path(home: Path, number: int) -> Path:
    return home / f"{number:05}.json"


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
