"""Trials: proposed, done here or by workers, recorded; whatever stops a search, it goes on.

This process proposes and records; a trial is done by it or by one of the run's workers. A finished
trial is one small file in the run's scratch; the Optuna study (a journal file beside the run's
record, or a database) is kept in step with those files and is rebuilt from them when it was lost or
damaged, and they from it. What is killed leaves nothing in either: a killed worker's trial is done
again by another, and counts as failed when that keeps happening.

With several attempts a search is successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943):
all trials make the first, a cheap one by which settings are proposed; the best third (by layers of
what no other beats) make the next, and the last one's are the result.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import WorkError
from deltaloom.core.method import Trial
from deltaloom.core.progress import say
from deltaloom.core.run import Run
from deltaloom.engine.shards import Job, run_drawn
from deltaloom.search._front import Goals, ranked
from deltaloom.search._proposing import Meaning, Proposer, Surrogate
from deltaloom.search._space import Dimension
from deltaloom.search._storage import Mirror

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT = 3
"""Of so many trials one goes on to the next attempt (Hyperband's eta, arXiv 1603.06560: 3 or 4)."""


@dataclass(frozen=True)
class Outcome:
    """What one attempt gave."""

    values: dict[str, float]
    cost: dict[str, float] = field(default_factory=dict)


Attempt = Callable[[dict[str, Any], Run], Outcome]
"""Tries settings in a run of its own; raises WorkError when they do not work. It must pickle if the
run has workers."""


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
    ahead: int = 1
    """Trials that may be done at the same time once all depend on earlier ones."""
    meaning: Meaning | None = None
    """What settings amount to, where different ones may be the same."""
    surrogate: Surrogate = "gp"
    """What proposes the later trials; "saas" needs BoTorch and a space without real numbers."""

    def explore(self, *attempts: Attempt) -> tuple[Trial, ...]:
        """Do all trials that are not done yet; raises WorkError when every one failed."""
        clock = _Clock()
        with clock.outside():
            records = _Records(self, len(attempts))
            proposer = Proposer(
                self.space,
                self.goals,
                self.trials,
                self.run.seed,
                self.first,
                self.ahead,
                self.meaning,
                self.surrogate,
            )
            self._check_workers(proposer)
        climb = _Climb(self, proposer, records, clock, len(attempts))
        job = _Trials(attempts, list(self.goals), self.run, self.run.home, self.run.seed)
        planned = sum(map(climb.share, range(len(attempts))))
        most = max(1, planned - len(records.done))
        run_drawn(job, climb.draw, most, self.run.workers, climb.done, climb.lost)
        past = self.run.record["notes"]
        self.run.note(
            trial_seconds=past.get("trial_seconds", 0.0) + clock.trials,
            overhead_seconds=past.get("overhead_seconds", 0.0) + clock.others,
        )
        return tuple(trial for _, trial in sorted(records.done.items()))

    def _check_workers(self, proposer: Proposer) -> None:
        count = self.run.workers.count
        if count > self.ahead and self.trials > proposer.evenly:
            say(
                f"after the first {proposer.evenly} trials {self.ahead} of {count} workers are "
                f"busy at most: ahead = {self.ahead}"
            )


class _Clock:
    """Seconds of the trials, and of everything else that a search does."""

    def __init__(self) -> None:
        self.trials = self.others = 0.0

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """What is done here is no trial."""
        start = time.perf_counter()
        yield
        self.others += time.perf_counter() - start


class _Item(NamedTuple):
    """A trial to do; settings as JSON, because items are looked up."""

    number: int
    rung: int
    settings: str


class _Climb:
    """What is to be done next, attempt after attempt, and what was done."""

    def __init__(
        self, study: Study, proposer: Proposer, records: _Records, clock: _Clock, rungs: int
    ) -> None:
        self.study, self.records, self.clock, self.rungs = study, records, clock, rungs
        self.rung, self.numbers, self.next = 0, range(study.trials), 0
        self.settings: Callable[[int, Mapping[int, Trial]], dict[str, Any] | None]
        self.settings = proposer.propose

    def share(self, rung: int) -> int:
        """Trials that an attempt has at most."""
        return math.ceil(self.study.trials / KEPT**rung)

    def draw(self) -> _Item | None:
        """The next trial if it can be done already; raises WorkError when all of an attempt's
        failed.
        """
        with self.clock.outside():
            while self.next < self.numbers.stop or self._higher():
                settings = self.settings(self.next, self.records.done)
                if settings is None:
                    return None
                number, self.next = self.next, self.next + 1
                if number not in self.records.done:
                    say(f"trial {number + 1} of {self.numbers.stop}: {brief(settings)}")
                    return _Item(number, self.rung, json.dumps(settings))
        return None

    def _higher(self) -> bool:
        """Go on to the next attempt, if there is one and this one's trials are done."""
        found = [self.records.done.get(number) for number in self.numbers]
        ended = [trial for trial in found if trial is not None]
        if len(ended) < len(found):
            return False
        best = ranked(ended, self.study.goals)
        if not best:
            raise WorkError(f"all {len(ended)} trials failed; the first: {ended[0].failed}")
        if self.rung + 1 == self.rungs:
            return False
        self.rung += 1
        start, best = self.numbers.stop, best[: self.share(self.rung)]
        self.numbers = range(start, start + len(best))
        self.settings = lambda number, _: best[number - start].settings
        return True

    def done(self, item: _Item, made: _Made) -> None:
        """A trial has ended."""
        self.clock.trials += made.seconds
        with self.clock.outside():
            self.study.run.spend(**made.cost)
            self.study.run.note(**made.notes)
            self._record(made.trial)

    def lost(self, item: _Item, how: str) -> None:
        """A trial kills whoever does it."""
        self._record(Trial(item.number, json.loads(item.settings), {}, {}, how, item.rung))

    def _record(self, trial: Trial) -> None:
        self.records.add(trial)
        shutil.rmtree(self.study.run.work / f"trial-{trial.number}", ignore_errors=True)
        if trial.failed is not None:
            say(f"trial {trial.number + 1} failed: {trial.failed}")


@dataclass
class _Made:
    """A trial, and what the run must know of it."""

    trial: Trial
    seconds: float
    cost: dict[str, float]
    notes: dict[str, Any]


@dataclass
class _Trials(Job):
    """Does trials in `run`, or in a worker whose notes and costs are sent back."""

    attempts: Sequence[Attempt]
    goals: list[str]
    run: Run | None
    home: Path
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None}

    def open(self) -> Callable[[_Item], _Made]:
        """See Job."""
        return self._here if self.run is not None else self._away

    def _here(self, item: _Item) -> _Made:
        assert self.run is not None
        return self._make(item, self.run.nested(f"trial-{item.number}"), {}, {})

    def _away(self, item: _Item) -> _Made:
        run = Run.apart(self.home, self.seed).nested(f"trial-{item.number}")
        # The bars of several trials would write over each other.
        with open(run.folder / "said.txt", "a") as file, contextlib.redirect_stderr(file):
            return self._make(item, run, run.record["cost"], run.record["notes"])

    def _make(self, item: _Item, run: Run, cost: dict[str, float], notes: dict[str, Any]) -> _Made:
        start = time.perf_counter()
        trial = self._try(item, json.loads(item.settings), run)
        return _Made(trial, time.perf_counter() - start, cost, notes)

    def _try(self, item: _Item, settings: dict[str, Any], run: Run) -> Trial:
        import torch

        number, rung = item.number, item.rung
        try:
            outcome = self.attempts[rung](settings, run)
        except (WorkError, torch.OutOfMemoryError) as error:
            return Trial(number, settings, {}, {}, str(error).splitlines()[0], rung)
        wrong = [name for name in self.goals if not math.isfinite(outcome.values[name])]
        if wrong:
            reason = f"{wrong[0]} is {outcome.values[wrong[0]]}"
            return Trial(number, settings, {}, outcome.cost, reason, rung)
        return Trial(number, settings, outcome.values, outcome.cost, rung=rung)


class _Records:
    """Finished trials by number: files in the run's scratch, and the study beside them."""

    def __init__(self, study: Study, rungs: int) -> None:
        self.home = study.run.work / "trials"
        self.home.mkdir(exist_ok=True)
        self.mirror = Mirror(study.run, study.space, study.goals, study.storage, rungs)
        self.done = self.mirror.trials()
        for path in self.home.glob("*.json"):
            self.done[int(path.stem)] = Trial(**json.loads(path.read_text(encoding="utf-8")))
        for number, trial in self.done.items():
            if not self._path(number).exists():
                write_json(self._path(number), asdict(trial))
        self.mirror.restore(self.done)

    def add(self, trial: Trial) -> None:
        """One more."""
        write_json(self._path(trial.number), asdict(trial))
        self.mirror.add(trial)
        self.done[trial.number] = trial

    def _path(self, number: int) -> Path:
        return self.home / f"{number:05}.json"


def best(trials: Sequence[Trial], goal: str, way: Literal["lower", "higher"]) -> Trial:
    """The best trial by one goal; the earliest of equals."""
    sign = 1.0 if way == "lower" else -1.0
    finished = [trial for trial in trials if trial.failed is None]
    return min(finished, key=lambda trial: (sign * trial.values[goal], trial.number))


def brief(settings: Mapping[str, Any]) -> str:
    """Settings as words for people."""
    texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in settings.values())
    return ", ".join(f"{name} = {text}" for name, text in zip(settings, texts, strict=True))
