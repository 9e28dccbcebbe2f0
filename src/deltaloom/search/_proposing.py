"""What to try next: settings that fill the space evenly, then those that a surrogate asks for.

A proposal depends on the trials that are `ahead` or more before it, done, and on the settings of
those in between, whether they are done or not. So it is the same for any number of workers,
whichever of them is first, and a resumed search proposes what an undisturbed one does.

The first trials spread evenly over the space, later ones are proposed by Optuna's Gaussian-process
sampler, or by processes with sparse axes (`_saas.py`), new ones for each trial with a seed of its
own. Where `meaning` tells what settings amount to, nothing is tried twice, and nothing that is not
worth a trial. Optuna's sampler knows no such limits and proposes the same again once it is sure; in
its place comes a trial that none beats, drawn by lot, with one setting changed, or more until it is
new.

A failed trial counts, for proposing only, as the worst one seen; values much worse than the median
are cut to it plus twice its distance to the best, because one trial that nearly diverged would
otherwise flatten everything else (ours).
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaloom.core.method import Trial
from deltaloom.search import _saas
from deltaloom.search._front import Goals, unbeaten
from deltaloom.search._space import Dimension, first_points

Surrogate = Literal["gp", "saas"]
"""Optuna's Gaussian-process sampler, or processes with sparse axes."""
Meaning = Callable[[dict[str, Any]], Hashable]
"""What settings amount to; None for what is not worth a trial."""
STEPS = 1000
"""Changes before what was tried is tried again after all: the space may hold nothing else."""


@dataclass
class Proposer:
    """Settings for each of `trials` trials."""

    space: Mapping[str, Dimension]
    goals: Goals
    trials: int
    seed: int
    first: Sequence[dict[str, Any]] = ()
    """Settings to try before all others."""
    ahead: int = 1
    meaning: Meaning | None = None
    surrogate: Surrogate = "gp"
    """What proposes the later trials."""
    known: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Settings of the trials so far."""

    @property
    def evenly(self) -> int:
        """Trials at the beginning that need no other's result."""
        return len(self.first) + max(3, min(10, 2 * len(self.space) + 1, self.trials // 2))

    def propose(self, number: int, done: Mapping[int, Trial]) -> dict[str, Any] | None:
        """Settings for trial `number`; None while a trial is not done that they depend on.

        Trials before it must have been proposed.
        """
        if number in done:
            self.known[number] = dict(done[number].settings)
        if number not in self.known:
            found = self._proposed(number, done)
            if found is None:
                return None
            self.known[number] = self._fresh(number, found, done)
        return self.known[number]

    def _proposed(self, number: int, done: Mapping[int, Trial]) -> dict[str, Any] | None:
        if number < len(self.first):
            return dict(self.first[number])
        if number >= self.evenly:
            needed = range(max(0, number - self.ahead + 1))
            if any(one not in done for one in needed):
                return None
            values = self._values([done[one] for one in needed])
            if values and self.surrogate == "saas":
                past = [self.known[one] for one in range(number)]
                seed = self.seed + number
                return _saas.propose(self.space, self.goals, past, values, seed, self.meaning)
            if values:
                return self._ask(number, values)
        points = first_points(self.space, number + 1 - len(self.first), self.seed)
        return points[-1]

    def _fresh(
        self, number: int, settings: dict[str, Any], done: Mapping[int, Trial]
    ) -> dict[str, Any]:
        """`settings` if they are worth a trial, else others that are."""
        if self.meaning is None:
            return settings
        tried = {self.meaning(self.known[one]) for one in range(number)} | {None}
        if self.meaning(settings) not in tried:
            return settings
        chance, names = random.Random(f"{self.seed} {number}"), list(self.space)
        needed = range(max(0, number - self.ahead + 1)) if number >= self.evenly else ()
        parents = unbeaten([done[one] for one in needed], self.goals)
        found = usable = dict(chance.choice(parents).settings) if parents else settings
        for _ in range(STEPS):
            name = chance.choice(names)
            found = {**found, name: self.space[name].at(chance.random())}
            meaning = self.meaning(found)
            usable = found if meaning is not None else usable
            if meaning not in tried:
                break
        return usable

    def _ask(self, number: int, values: dict[int, list[float]]) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {name: one.distribution() for name, one in self.space.items()}
        state = optuna.trial.TrialState
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sampler calls itself experimental
            sampler = optuna.samplers.GPSampler(
                seed=self.seed + number, n_startup_trials=1, deterministic_objective=False
            )
            study = optuna.create_study(
                sampler=sampler,
                directions=[
                    "minimize" if way == "lower" else "maximize" for way in self.goals.values()
                ],
            )
            for one in range(number):
                frozen = optuna.trial.create_trial(
                    params=self.known[one],
                    distributions=kinds,
                    values=values.get(one),
                    state=state.COMPLETE if one in values else state.RUNNING,
                )
                study.add_trial(frozen)
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
