"""Affinities of examples and of tasks from the inner products of unit gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000
"""Bootstrap samples behind an interval of the affinity matrix. Ours."""


def margins(gram: Array, tasks: NDArray[np.int64]) -> Array:
    """(n,) of each example: its mean affinity to its own task less that to the others.

    `gram` (n, n) holds the examples' affinities and `tasks` (n,) numbers from 0. An example is not
    compared with itself; the other tasks count alike. With one task, the affinity to that.
    """
    sums, sizes = _sums(gram, tasks)
    own = np.arange(len(gram)), tasks
    sums[own] -= gram.diagonal()
    towards = sums / sizes  # (n, tasks)
    mine = sums[own] / (sizes[tasks] - 1)
    others = len(sizes) - 1
    return mine - (towards.sum(1) - towards[own]) / others if others else mine


def margin_pseudovalues(gram: Array, tasks: NDArray[np.int64]) -> Array:
    """(n,) jackknife pseudo-values of the mean of `margins`: n M - (n - 1) M without the example.

    A margin shares its pairs with all others, so the spread of margins understates the error of
    their mean (by half, for one task); that of the pseudo-values does not. A task needs three
    examples.
    """
    n = len(gram)
    before = margins(gram, tasks)
    sums, sizes = _sums(gram, tasks)
    sums[np.arange(n), tasks] -= gram.diagonal()
    others = len(sizes) - 1
    found = np.zeros(n)
    for gone in range(n):
        task = tasks[gone]
        same = tasks == task  # whose own task loses an example
        pairs = sizes[task] - same  # (n,) others of that task
        change = (sums[:, task] - gram[gone]) / (pairs - 1) - sums[:, task] / pairs
        after = before + np.where(same, change, -change / others if others else 0.0)
        found[gone] = n * before.mean() - (after.sum() - after[gone])
    return found


def affinities(gram: Array, tasks: NDArray[np.int64], seed: int) -> tuple[Array, Array, Array]:
    """Cosines (tasks, tasks) of the tasks' mean gradients, with the ends of 95 % intervals.

    The squared length of a mean is that of its pairs of different examples: an example's product
    with itself is chance, and would lower the cosines of small tasks. NaN where that is not
    positive: the task's gradients have no direction in common. The intervals are percentiles over
    `RESAMPLES` bootstrap samples of examples within tasks, in which copies of one example are no
    pair either.
    """
    draw = np.random.default_rng(seed)
    members = [np.flatnonzero(tasks == task) for task in range(tasks.max() + 1)]
    plain = [np.ones((1, len(own))) for own in members]
    drawn = [
        draw.multinomial(len(own), np.full(len(own), 1 / len(own)), RESAMPLES).astype(float)
        for own in members
    ]
    samples = _cosines(gram, members, drawn)  # (samples, tasks, tasks)
    found = _cosines(gram, members, plain)[0]
    low, high = (_percentile(samples, q) for q in (2.5, 97.5))
    return found, low, high


def _sums(gram: Array, tasks: NDArray[np.int64]) -> tuple[Array, Array]:
    """Summed affinities (n, tasks) of each example to each task, and the tasks' sizes."""
    one_hot = np.eye(tasks.max() + 1)[tasks]  # (n, tasks)
    return gram @ one_hot, one_hot.sum(0)


def _cosines(gram: Array, members: list[NDArray[np.int64]], weights: list[Array]) -> Array:
    """(b, tasks, tasks) for the examples' weights (b, size) in each task."""
    count = len(members)
    products = np.zeros((len(weights[0]), count, count))
    for s, (rows, left) in enumerate(zip(members, weights, strict=True)):
        for t, (columns, right) in enumerate(zip(members, weights, strict=True)):
            block = gram[np.ix_(rows, columns)]
            total = ((left @ block) * right).sum(1)
            if s == t:
                total = total - (left**2) @ block.diagonal()
                pairs = left.sum(1) ** 2 - (left**2).sum(1)
            else:
                pairs = left.sum(1) * right.sum(1)
            products[:, s, t] = np.divide(total, pairs, out=np.zeros_like(total), where=pairs > 0)
    squares = np.diagonal(products, axis1=1, axis2=2)
    lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
    return products / lengths[:, :, None] / lengths[:, None, :]


def _percentile(samples: Array, q: float) -> Array:
    """Over the samples that have a value; NaN where none has."""
    found = np.full(samples.shape[1:], np.nan)
    for place in np.ndindex(found.shape):
        values = samples[(slice(None), *place)]
        values = values[np.isfinite(values)]
        if len(values):
            found[place] = np.percentile(values, q)
    return found


def unit(rows: Any) -> Array:
    """Rows of length 1 in float64; a row of zeros stays."""
    rows = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
