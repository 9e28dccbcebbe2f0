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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np
from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Work
from deltaloom.core.progress import say
from deltaloom.search._candidates import Choices, default_space, split
from deltaloom.search._past import Task, read_history
from deltaloom.search._relevance import Evidence, Model, Source, relevance
from deltaloom.search._space import Dimension, Space
from deltaloom.search._study import brief
from deltaloom.search._trust import RELEVANCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

    Array = NDArray[np.float64]

RIDGE = 1.0
"""Prior precision of theta's coefficients and of the features' (ours; all are of unit scale)."""
NEAR = 0.25
"""Variance of a like task's psi around the target's, over that between tasks (ours)."""
ENOUGH = 3
"""Past tasks below which there is no spread to tell like from unlike: all count alike."""


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
    history: list[str] = []
    """What other tasks have shown, as for `search quicktune`. Without any the choice is the tuner's
    own settings."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
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
        weights, means = judged(space, candidates, target, past, self.share, run.seed)
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


def judged(
    space: Mapping[str, Dimension],
    candidates: Sequence[Mapping[str, Any]],
    target: Task,
    past: Sequence[Task],
    share: float,
    seed: int,
) -> tuple[Array, Array]:
    """Relevance of each past task, and the predicted value of each candidate, relative to the
    untuned base's: 0 is as good as that, lower is better.
    """
    from deltaloom.search._policy import complete, coordinates, features, relative

    wanted = np.array([coordinates(space, one) for one in candidates])
    told = [task for task in past if any(trial.curve for trial in task.trials)]
    if not told:
        return np.ones(len(past)), np.zeros(len(wanted))
    places: list[Array] = []
    values: list[Array] = []
    for task in told:
        done = [trial for trial in task.trials if trial.curve]
        own = [coordinates(space, complete(task.tuner, trial.settings)) for trial in done]
        places.append(np.array(own))
        values.append(np.array([relative(task, trial.curve[-1].value) for trial in done]))
    sources = [Source(shared(x), own_effects(x), y) for x, y in zip(places, values, strict=True)]
    model = known(sources, features([*told, target]), share)
    evidence = Evidence(model, sources)
    weights = relevance(evidence, seed) if len(told) >= ENOUGH else np.ones(len(told))
    mean, _ = evidence.weighted(weights)
    means = np.c_[shared(wanted), own_effects(wanted)] @ mean
    by_name = dict(zip((task.name for task in told), weights, strict=True))
    return np.array([by_name.get(task.name, 0.0) for task in past]), means


def shared(x: Array) -> Array:
    """(1, x, x^2), of coordinates from -1 to 1."""
    own = 2 * x - 1
    return np.c_[np.ones(len(x)), own, own**2]


def own_effects(x: Array) -> Array:
    """(1, x): a task's level, and where its good settings lie."""
    return np.c_[np.ones(len(x)), 2 * x - 1]


def known(sources: Sequence[Source], table: Array, share: float) -> Model:
    """Noise, spread between tasks, and the proxy of the target, whose features are the last row."""
    theta = _ridge(
        np.vstack([one.shared for one in sources]), np.concatenate([one.values for one in sources])
    )
    own, left = [], []
    for one in sources:
        rest = one.values - one.shared @ theta
        psi = _ridge(one.own, rest)
        own.append(psi)
        left += list(rest - one.own @ psi)
    psis = np.array(own)  # (G, q)
    noise = max(float(np.mean(np.square(left))), 1e-6)
    spread = np.maximum((psis**2).mean(0), 1e-4)
    cross = np.c_[np.ones(len(table)), table]
    proxy = cross[-1] @ _ridge(cross[:-1], psis)
    missed = spread.copy()
    if len(psis) >= ENOUGH:
        rest = [
            psis[g] - cross[g] @ _ridge(np.delete(cross[:-1], g, 0), np.delete(psis, g, 0))
            for g in range(len(psis))
        ]
        missed = np.maximum(np.square(rest).mean(0), 1e-4)
    return Model(
        shared=1 / RIDGE,
        own=np.diag(spread),
        proxy=proxy,
        proxy_noise=np.diag(missed),
        noise=noise,
        share=share,
        near=np.diag(NEAR * spread),
    )


def _ridge(design: Array, values: Array) -> Array:
    gram = design.T @ design + RIDGE * np.eye(design.shape[1])
    return np.linalg.solve(gram, design.T @ values)
