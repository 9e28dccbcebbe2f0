"""How alike tasks are, by their gradients or by what tuning on one does for another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaloom.core.encoding import Encoded
from deltaloom.core.run import Run
from deltaloom.engine.forward import token_logprobs
from deltaloom.engine.gradients import sketched
from deltaloom.engine.meter import count_forward, count_training
from deltaloom.engine.projection import projection
from deltaloom.engine.train import TrainSettings, fit

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 4096
"""Of projected gradients (LESS halved, as in `select less`)."""

Tasks = Mapping[str, Sequence[Encoded]]
Similarity = dict[str, dict[str, float]]


def by_gradient(
    model: Any, tasks: Tasks, pad_id: int, settings: TrainSettings, steps: int, run: Run
) -> Similarity:
    """Cosine of the tasks' mean unit gradients, projected, after `steps` on all rows together."""
    if steps:
        every = [row for rows in tasks.values() for row in rows]
        drawn = _drawn(every, steps * settings.batch_size, run.seed)
        fit(model, drawn, pad_id, settings, run, folder="mixed")
    sketch = projection("sparse", WIDTH, run.seed)
    means: dict[str, NDArray[np.float64]] = {}
    for name, rows in tasks.items():
        total = np.zeros(WIDTH)
        for _, found in sketched(model, list(rows), pad_id, sketch):
            total += torch.nn.functional.normalize(found, dim=1).double().sum(0).cpu().numpy()
        means[name] = total / max(float(np.linalg.norm(total)), 1e-30)
        count_training(run, model, sum(len(row.input_ids) for row in rows), "adapter")
    return {a: {b: float(means[a] @ means[b]) for b in tasks} for a in tasks}


def by_transfer(
    model: Any, tasks: Tasks, pad_id: int, settings: TrainSettings, steps: int, run: Run
) -> Similarity:
    """Entry (a, b): the part of task b's own gain in loss that as many steps on task a give.

    Half of a task's rows are tuned on, the other half measured. 0 where a task gains nothing from
    itself; at most 1 either way.
    """
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    halves = {name: (rows[::2], rows[1::2] or rows) for name, rows in tasks.items()}

    def losses() -> dict[str, float]:
        model.eval()
        return {name: _loss(model, own[1], pad_id, run) for name, own in halves.items()}

    before, after = losses(), {}
    for number, name in enumerate(tasks):
        with torch.no_grad():
            for parameter, tensor in start.items():
                model.get_parameter(parameter).copy_(tensor)
        drawn = _drawn(halves[name][0], steps * settings.batch_size, run.seed)
        part = Run.open(run.work / f"transfer-{number}", {"transfer": name}, {}, run.seed)
        with part:
            fit(model.train(), drawn, pad_id, settings, part)
        run.spend(**{k: part.record["cost"][k] for k in ("forward_tokens", "backward_tokens")})
        after[name] = losses()
    gains = {a: {b: before[b] - after[a][b] for b in tasks} for a in tasks}

    def share(a: str, b: str) -> float:
        own = gains[b][b]
        return min(1.0, max(-1.0, gains[a][b] / own)) if own > 0 else 0.0

    return {a: {b: share(a, b) for b in tasks} for a in tasks}


def kept(similarity: Similarity, threshold: float) -> list[str]:
    """Tasks after those that fit the rest least are dropped one by one, two left at least.

    How a task fits is the mean of its similarities with all that are left, itself (1) too, both
    ways. With cosines of gradients u that is u_k . mean(u): below 0 a step for all tasks together
    makes the loss of this one larger, to first order.
    """
    left = sorted(similarity)

    def fit_of(name: str) -> float:
        both = [(similarity[name][one] + similarity[one][name]) / 2 for one in left if one != name]
        return (1 + sum(both)) / len(left)

    while len(left) > 2:
        worst = min(left, key=lambda name: (fit_of(name), name))
        if fit_of(worst) >= threshold:
            break
        left.remove(worst)
    return left


def _drawn(rows: Sequence[Encoded], count: int, seed: int) -> list[Encoded]:
    """`count` rows in random order, all of them before any comes again."""
    order = list(range(len(rows)))
    random.Random(f"probe {seed}").shuffle(order)
    return [rows[order[k % len(order)]] for k in range(count)]


def _loss(model: Any, rows: Sequence[Encoded], pad_id: int, run: Run) -> float:
    """Mean cross-entropy of all response tokens."""
    found = token_logprobs(model, [(row.input_ids, row.response_mask) for row in rows], pad_id)
    count_forward(run, model, sum(len(row.input_ids) for row in rows))
    return -sum(float(one.sum()) for one in found) / max(1, sum(len(one) for one in found))
