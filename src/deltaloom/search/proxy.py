"""Settings for a task on which nothing was tried: past tasks, each by its relevance.

Paper: Sloman et al. 2025, "Proxy-informed Bayesian transfer learning with unknown sources"
(UAI, arXiv 2411.03263).

What a past task g showed is y_g(x) = theta . (1, x, x^2) + psi_g . (1, x) + noise over settings x:
theta transfers, psi_g does not. Of the target's psi there is a proxy alone: features of its rows
and the untuned base's loss, from which psi is predicted by a ridge over the past tasks, with the
error that it makes on tasks left out. The proxy serves twice, as in the paper: as the target's
prior, and to weigh each source by the probability that it is like the target
(`_relevance.py`, conjugate Gaussian). The choice is the candidate with the best mean under the
posterior of the weighted sources; `relevance.json` is what `search quicktune` takes with `trust`.

Differs: the paper's own relevance function and figures are not known to us; ours is the posterior
probability in a mixture of like and unlike sources. Sources are whole tasks, and like ones may
differ from the target by half of the spread between tasks.

Not covered: sources without labels within one file of runs; proxies asked of people; learning
curves, of which the last value is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np
from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.search._candidates import Choices, default_space, split
from deltaloom.search._past import read_history
from deltaloom.search._space import Space
from deltaloom.search._study import brief
from deltaloom.search._trust import RELEVANCE, SHARE, judge_past

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Proxy(Searcher):
    """Choice from the past alone, and which past to trust."""

    trial: ClassVar[dict[str, Any]] = {"candidates": 8}

    tuner: Literal["lora", "full", "composite", "spiel", "prompt"] = "lora"
    """Tune method whose settings are chosen."""
    space: Space | None = None
    """What to choose: settings of the tuner. None is that of `search quicktune`."""
    fixed: dict[str, Any] = {}
    """Settings of the tuner that are no part of the choice."""
    history: Annotated[list[str], PLACE] = []
    """What other tasks have shown, as for `search quicktune`. Without any the choice is the tuner's
    own settings."""
    share: Annotated[float, Field(gt=0, lt=1)] = SHARE
    """Probability that a past task is like the target, before anything is seen (ours)."""
    candidates: Annotated[int, Field(ge=1)] = 128
    """Settings to choose among, as in `search quicktune`."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows on which the untuned base is measured, when `evaluate` is not given."""

    def work(self, sizes: Sizes) -> Work:
        """The untuned base is measured; nothing is trained."""
        tokens = self.holdout * sizes.rows * sizes.row_tokens
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Choose for `data`; no trial is made."""
        from deltaloom.search._parts import Parts

        space = default_space(self.tuner) if self.space is None else self.space
        choices = Choices("search proxy", self.tuner, space, self.fixed)
        choices.check()
        past = read_history(self.history, self.tuner)
        kept, evaluation = split(data, evaluation, self.holdout, run.seed)
        candidates = choices.draw(past, self.candidates, run.seed)
        limit = choices.make(candidates[0]).max_length
        target = Parts(base, kept, evaluation, run, 1).describe(self.tuner, limit)
        read_history(self.history, self.tuner, target.metric)
        weights, means = judge_past(space, candidates, target, past, self.share, run.seed)
        found = {task.name: float(one) for task, one in zip(past, weights, strict=True)}
        write_json(run.folder / RELEVANCE, found)
        for name, weight in found.items():
            say(f"{name}: relevance {weight:.2f}")
        chosen = candidates[int(np.argmin(means))]
        say(f"chosen: {brief(chosen)}")
        choice = {
            "settings": {**self.fixed, **chosen},
            "predicted": float(np.min(means)),
            "relevance": found,
            "tuner": self.tuner,
            "untuned": target.untuned,
        }
        return Found(choice, ())
