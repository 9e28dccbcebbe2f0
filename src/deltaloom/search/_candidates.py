"""What a search of a tuner's settings may try, checked before anything is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation
from deltaloom.core.registry import get
from deltaloom.search._past import Task
from deltaloom.search._space import Dimension, Space, check_space, first_points
from deltaloom.search._study import brief

if TYPE_CHECKING:
    from deltaloom.core.examples import Examples

RATES = {
    "lora": (2e-5, 2e-2),
    "full": (1e-6, 1e-3),
    "composite": (2e-5, 2e-2),
    "spiel": (1e-5, 1e-2),
    "prompt": (1e-3, 0.3),
}
"""Learning rates to search by default (ours), wide around each tuner's own."""


@dataclass(frozen=True)
class Choices:
    """A tuner, what is searched of its settings, and what is the same in all trials."""

    where: str
    """The search, for messages."""
    tuner: str
    space: Space
    fixed: dict[str, Any]

    def check(self) -> None:
        """Raise InputError for a space that is empty or contradicts itself."""
        known = get("tune", self.tuner).load().model_fields
        check_space(self.space, known, self.where)
        twice = sorted(self.space.keys() & self.fixed.keys())
        if twice:
            raise InputError(
                f"{self.where}: {twice[0]} is in space and in fixed; leave it out of one"
            )
        other = {"library", "start"} & {*self.fixed, *self.space}
        if self.tuner == "prompt" and other:
            raise InputError(
                f"{self.where}: a prompt that begins as another one cannot pause; leave "
                f"{min(other)} out"
            )

    def draw(self, past: Sequence[Task], count: int, seed: int) -> list[dict[str, Any]]:
        """The tuner's own settings, the past's best, and points that fill the space; each once."""
        fields = get("tune", self.tuner).load().model_fields
        defaults = {name: field.default for name, field in fields.items()}
        found = [{name: defaults[name] for name in self.space}]
        for task in past:
            done = [t for t in task.trials if t.curve and t.failed is None]
            if done:
                best = min(done, key=lambda trial: min(point.value for point in trial.curve))
                found.append({name: {**defaults, **best.settings}[name] for name in self.space})
        inside = [one for one in found if all(self.space[n].has(v) for n, v in one.items())]
        inside += first_points(self.space, count, seed)
        distinct: dict[str, dict[str, Any]] = {}
        for one in inside:
            distinct.setdefault(repr(one), one)
        return list(distinct.values())[:count]

    def make(self, settings: dict[str, Any]) -> Any:
        """The tuner with settings of the space; raises InputError for what it does not take."""
        try:
            return get("tune", self.tuner).make({**self.fixed, **settings})
        except InputError as error:
            raise InputError(
                f"{self.where}: space and fixed allow {brief(settings)}, which tune {self.tuner} "
                f"does not take ({error})"
            ) from None

    def long_enough(self, tuner: Any, settings: dict[str, Any], rows: int, parts: int) -> None:
        """Raise InputError for a run of fewer optimizer steps than parts."""
        steps = math.ceil(math.ceil(rows / tuner.batch_size) * tuner.epochs)
        if steps < parts:
            raise InputError(
                f"{self.where}: {brief(settings)} makes {steps} optimizer steps on {rows} rows, "
                f"fewer than parts = {parts}; lower parts or batch_size"
            )


def default_space(tuner: str) -> Space:
    """Learning rate and batch size; for lora the rank as well."""
    low, high = RATES[tuner]
    own = {"r": Dimension(low=2, high=64, integer=True, log=True)}
    return {
        "lr": Dimension(low=low, high=high, log=True),
        "batch_size": Dimension(low=4, high=32, integer=True, log=True),
        **(own if tuner == "lora" else {}),
    }


def split(
    data: Examples, evaluation: Evaluation | None, holdout: float, seed: int
) -> tuple[Examples, Evaluation]:
    """Rows to train on, and what compares trials: what is given, or the loss of a share of them."""
    if evaluation is not None:
        return data, evaluation
    if len(data) < 2:
        raise InputError(f"{data.name}: one row cannot be split; give evaluate= rows")
    order = random.Random(seed).sample(range(len(data)), len(data))
    held = max(1, round(holdout * len(data)))
    measurer: Any = get("measure", "loss").make()
    kept = data.take(sorted(order[held:]))
    return kept, Evaluation(measurer, data.take(sorted(order[:held])))
