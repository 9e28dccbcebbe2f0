"""How far a search trusts each past task: what `search proxy` found of the same history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deltaloom.core.errors import InputError
from deltaloom.search._past import Task

RELEVANCE = "relevance.json"
"""Task -> probability that it is like the target, in a `search proxy`'s folder."""


def trusted(folder: str | None, past: Sequence[Task]) -> list[float] | None:
    """A weight for each task, None where nothing is said; raises InputError for a task that the
    folder does not know.
    """
    if folder is None:
        return None
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
