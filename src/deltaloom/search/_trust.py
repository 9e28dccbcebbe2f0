"""How far a search trusts each past task: by its features, or by what was found before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.core.errors import InputError
from deltaloom.search._past import Task
from deltaloom.search._relevance import Evidence, Model, Source, relevance
from deltaloom.search._space import Dimension

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RELEVANCE = "relevance.json"
"""Task -> probability that it is like the target, in a `search proxy`'s folder."""
SHARE = 0.5
"""Probability that a past task is like the target, before anything is seen (ours)."""
RIDGE = 1.0
"""Prior precision of theta's coefficients and of the features' (ours; all are of unit scale)."""
NEAR = 0.25
"""Variance of a like task's psi around the target's, over that between tasks (ours)."""
ENOUGH = 3
"""Past tasks below which there is no spread to tell like from unlike: all count alike."""


def read_trust(folder: str, past: Sequence[Task]) -> list[float]:
    """The weight of each task that a `search proxy` left in its folder; raises InputError for a
    task that it does not know.
    """
    path = Path(folder).expanduser() / RELEVANCE
    try:
        found = {str(k): float(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        raise InputError(
            f"trust: {folder}: no finished `search proxy` there ({path} is missing or damaged); "
            "name its folder"
        ) from None
    absent = [task.name for task in past if task.name not in found]
    if absent:
        raise InputError(
            f"trust: {folder} says nothing of {absent[0]}; run `search proxy` with the same history"
        )
    return [found[task.name] for task in past]


def judge_past(
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
    return np.linalg.solve(gram, design.T @ values)  # pyright: ignore[reportReturnType]
