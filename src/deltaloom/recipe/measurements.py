"""Reading back what measure steps left: every estimate with its items."""

from __future__ import annotations

import json
from pathlib import Path

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.run import Run
from deltaloom.recipe.measuring import ESTIMATE

Key = tuple[str, str, str]
"""What was measured, task, metric."""


def read_estimates(folder: Path) -> dict[Key, Estimate]:
    """All estimates of a run, of its steps too; raises InputError when it measured nothing."""
    Run.read(folder)
    found: dict[Key, Estimate] = {}
    for path in sorted(folder.rglob(ESTIMATE)):
        label, _, task = path.parent.name.partition("--")
        estimate = Estimate.from_json(json.loads(path.read_text(encoding="utf-8")))
        found[label, task, estimate.metric] = estimate
    if not found:
        raise InputError(f"{folder}: this run measured nothing")
    return found


def matched(
    first: dict[Key, Estimate], second: dict[Key, Estimate]
) -> dict[str, tuple[Estimate, Estimate]]:
    """Pairs to compare: the same thing measured in both, else each run's only one of a task."""
    shared = [key for key in first if key in second]
    if shared:
        return {"/".join(key): (first[key], second[key]) for key in shared}
    ours, theirs = _by_task(first), _by_task(second)
    return {
        key: (ours[key][0], theirs[key][0])
        for key in ours
        if key in theirs and len(ours[key]) == len(theirs[key]) == 1
    }


def _by_task(found: dict[Key, Estimate]) -> dict[str, list[Estimate]]:
    tasks: dict[str, list[Estimate]] = {}
    for (_, task, metric), estimate in found.items():
        tasks.setdefault(f"{task}/{metric}", []).append(estimate)
    return tasks
