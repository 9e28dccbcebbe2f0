"""Settings for a tuner, from what other tasks have shown, a part of a run at a time.

Paper: Arango et al. 2024, "Quick-Tune: Quickly Learning Which Pretrained Model to Finetune and How"
(arXiv 2306.03828); for language models Strangmann et al. 2024, "Transfer Learning for Finetuning
Large Language Models" (arXiv 2411.01195).

A surrogate predicts every candidate's learning curve from its settings, the task's features, the
part of the run, and all curves seen, of this task and of earlier ones (`history`). The candidate
with the largest EI / cost goes on by one part, of which there are `parts` in a run: EI is the
expected improvement, after that part, over the best value that any candidate had by then (at first
the untuned base's), cost is predicted as well. A paused trial keeps its checkpoint and goes on from
it, in the bytes of an uninterrupted run.

Differs: the surrogate is a Gaussian process with one covariance for settings and one term each for
task, like tasks and trial, in place of deep kernels over a network's features, which need more runs
than a user has; costs are predicted by a ridge on logarithms, and a trial's own are taken once it
ran. Lengths and variances are fitted on the history and then frozen (the second paper's transfer
without refit), the posterior takes in every new value; without a history they are fitted anew
before every part. Values enter relative to the untuned base's. Past tasks count by how likely they
are to be like this one, where the papers let all count alike (`alike`).

Not covered: choosing among pretrained models or among tuners; features of images; trials that run
at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from deltaloom.core.errors import WorkError
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Trial, Work
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.search._candidates import Choices, default_space, split
from deltaloom.search._past import HISTORY, Task, read_history
from deltaloom.search._space import Space
from deltaloom.search._storage import Mirror
from deltaloom.search._study import brief
from deltaloom.search._trust import SHARE, judge_past, read_trust

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.search._parts import Done, Parts
    from deltaloom.search._policy import Policy

GOAL = "objective"
"""What trials are compared by; the lower the better, as a loss or an accuracy times -1."""


@final
class Quicktune(Searcher):
    """Multi-fidelity search that other tasks' runs have warmed up."""

    trial: ClassVar[dict[str, Any]] = {
        "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "fixed": {"epochs": 0.12, "save_steps": 99},
        "parts": 2,
        "steps": 3,
        "candidates": 8,
    }

    tuner: Literal["lora", "full", "composite", "spiel", "prompt"] = "lora"
    """Tune method whose settings are searched: one that trains once and can pause."""
    space: Space | None = None
    """What to search: settings of the tuner. None is ours: lr around the tuner's own, batch_size 4
    to 32, and for lora r 2 to 64."""
    fixed: dict[str, Any] = {}
    """Settings of the tuner that are the same in every trial; all others are its own."""
    history: Annotated[list[str], PLACE] = []
    """What other tasks have shown: folders of earlier quicktune searches, of tune runs that were
    given `evaluate`, and history files (docs/search.md has their form)."""
    trust: Annotated[str | None, PLACE] = None
    """Folder of a `search proxy` over the same history, by whose relevances past tasks count. None
    tells them from features in the same way (ours: of the arms of bench/claims/quicktune.py that
    lacks least)."""
    alike: bool = False
    """Let all past tasks count alike, as published."""
    parts: Annotated[int, Field(ge=1)] = 5
    """Parts of a run, after each of which another trial may go on (ours; Quick-Tune: epochs)."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Parts to do in all, four whole runs by default (ours)."""
    flops: Annotated[float | None, Field(gt=0)] = None
    """FLOPs to spend on trials; the part that goes beyond is the last."""
    seconds: Annotated[float | None, Field(gt=0)] = None
    """Seconds to spend on trials; improvement is then by predicted second, which no two runs share,
    and by FLOP otherwise."""
    candidates: Annotated[int, Field(ge=1)] = 128
    """Settings to choose among: the tuner's own, the best of each past task, and points that fill
    the space (Quick-Tune's tool: 128)."""
    finish: bool = True
    """Train the chosen trial to its end; its product is then this step's."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows that compares trials, when `evaluate` is not given (ours)."""
    storage: str | None = None
    """Database URL of the Optuna study, as postgresql+psycopg://USER@HOST/DB; None keeps a journal
    file in the run's folder. It is written when the search ends."""

    @model_validator(mode="after")
    def _one_trust(self) -> Quicktune:
        if self.alike and self.trust is not None:
            raise ValueError("trust and alike say two things of the past; leave one out")
        return self

    def work(self, sizes: Sizes) -> Work:
        """As many runs as the parts make, and the chosen one's end."""
        runs = self.steps / self.parts + self.finish
        one = get("tune", self.tuner).make(self.fixed).work(sizes)
        return Work(
            adapter_tokens=runs * one.adapter_tokens,
            full_tokens=runs * one.full_tokens,
            memory_bytes=one.memory_bytes,
            disk_bytes=min(self.steps, self.candidates) * one.disk_bytes,
        )

    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Search on `base`; the chosen trial's delta is the product, where `finish` says so."""
        from deltaloom.search._parts import Parts
        from deltaloom.search._policy import Policy

        space = default_space(self.tuner) if self.space is None else self.space
        choices = Choices("search quicktune", self.tuner, space, self.fixed)
        choices.check()
        past = read_history(self.history, self.tuner)
        weights = None if self.trust is None else read_trust(self.trust, past)
        kept, evaluation = split(data, evaluation, self.holdout, run.seed)
        candidates = choices.draw(past, self.candidates, run.seed)
        tuners = [choices.make(one) for one in candidates]
        for settings, tuner in zip(candidates, tuners, strict=True):
            choices.long_enough(tuner, settings, len(kept), self.parts)
        doing = Parts(base, kept, evaluation, run, self.parts)
        target = doing.describe(self.tuner, tuners[0].max_length)
        read_history(self.history, self.tuner, target.metric)  # refuses what is measured otherwise
        unit: Any = "flops" if self.seconds is None else "seconds"
        if self.trust is None and not self.alike:
            relevances, _ = judge_past(space, candidates, target, past, SHARE, run.seed)
            weights = relevances.tolist()
        policy = Policy(space, candidates, self.parts, target, past, weights, unit, run.seed)
        self._explore(policy, tuners, doing, run)
        return self._found(policy, tuners, doing, target, run)

    def _explore(self, policy: Policy, tuners: Sequence[Any], doing: Parts, run: Run) -> None:
        """Do parts until the budget is spent; those done before are told first."""
        began, trying = time.perf_counter(), 0.0
        for one in doing.done:
            policy.tell(self._seen(one, doing))
        while not self._spent(doing) and (asked := policy.ask()) is not None:
            candidate, part = asked
            settings = brief(policy.candidates[candidate])
            say(f"part {len(doing.done) + 1} of {self.steps} at most: {part + 1} of {settings}")
            one = doing.do(candidate, part, tuners[candidate])
            trying += one.seconds
            policy.tell(self._seen(one, doing))
            if one.failed is not None:
                say(f"it failed: {one.failed}")
        past, seconds = run.record["notes"], time.perf_counter() - began
        run.note(
            trial_seconds=past.get("trial_seconds", 0.0) + trying,
            overhead_seconds=past.get("overhead_seconds", 0.0) + seconds - trying,
        )

    def _seen(self, one: Done, doing: Parts) -> Any:
        """A part as the policy is told; one that failed tells no FLOPs and takes the others'."""
        from deltaloom.search._policy import Seen

        cost = one.flops if self.seconds is None else one.seconds
        if not cost:
            known = [other.flops for other in doing.done if other.flops]
            cost = sum(known) / len(known) if known else 1.0
        return Seen(one.candidate, one.part, one.value, cost)

    def _spent(self, doing: Parts) -> bool:
        flops = sum(one.flops for one in doing.done)
        seconds = sum(one.seconds for one in doing.done)
        return (
            len(doing.done) >= self.steps
            or (self.flops is not None and flops >= self.flops)
            or (self.seconds is not None and seconds >= self.seconds)
        )

    def _found(
        self, policy: Policy, tuners: Sequence[Any], doing: Parts, target: Task, run: Run
    ) -> Found:
        """Records of all trials, and the best one, trained to its end."""
        begun = list(dict.fromkeys(one.candidate for one in doing.done))
        trials = tuple(self._trial(n, policy, doing.of(c)) for n, c in enumerate(begun))
        settings = [{**self.fixed, **one} for one in policy.candidates]
        past = target.model_copy(update={"trials": doing.past(settings, begun)})
        past.write(run.folder / HISTORY)
        times = {str(n): [one.seconds for one in doing.of(c)] for n, c in enumerate(begun)}
        run.note(part_seconds=times)
        space, goals = policy.space, {GOAL: "lower"}
        Mirror(run, space, goals, self.storage).restore({t.number: t for t in trials})  # pyright: ignore
        best = policy.best()
        if best is None:
            raise WorkError(f"all {len(trials)} trials failed; the first: {trials[0].failed}")
        say(f"best of {len(trials)} trials: {brief(policy.candidates[best.candidate])}")
        choice = {
            "settings": settings[best.candidate],
            GOAL: best.value,
            "share": (best.part + 1) / self.parts,
            "trial": begun.index(best.candidate),
            "tuner": self.tuner,
            "untuned": target.untuned,
        }
        if not self.finish:
            return Found(choice, trials)
        delta, choice["finished"] = doing.finish(best.candidate, tuners[best.candidate])
        return Found(choice, trials, delta)

    def _trial(self, number: int, policy: Policy, done: list[Done]) -> Trial:
        """A trial as it was when last seen."""
        last = done[-1]
        settings = dict(policy.candidates[last.candidate])
        cost = {"backward_tokens": float(last.tokens), "flops": sum(one.flops for one in done)}
        if last.value is None:
            return Trial(number, settings, {}, cost, last.failed)
        values = {GOAL: last.value, "share": (last.part + 1) / self.parts}
        return Trial(number, settings, values, cost)
