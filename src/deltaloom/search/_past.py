"""What past tuning says: tasks with their features, settings, learning curves and costs.

A search leaves it in `history.json`; the same file can be written by hand:

    {"format": 1, "tuner": "lora", "metric": "loss_per_token", "name": "faq",
     "features": {"rows": 6.5, "row_tokens": 4.2}, "untuned": 3.1,
     "trials": [{"settings": {"lr": 0.001, "r": 8}, "failed": null,
                 "curve": [{"share": 0.2, "value": 2.0, "flops": 1e12, "seconds": 9.5}, ...]}]}

`share` is the part of a trial's optimizer steps that was done, `value` what was then measured, the
lower the better (an accuracy times -1), `untuned` the same of the base; `flops` and `seconds` are
what each part took. Features are any numbers, of the same names in all tasks; those that a task
lacks, and `untuned`, `flops` and `seconds`, may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError
from deltaloom.core.run import Run
from deltaloom.core.spec import Spec, digest

HISTORY = "history.json"
Share = Annotated[float, Field(gt=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Point(Spec):
    """One measurement of a trial."""

    share: Share
    value: Finite
    flops: Cost | None = None
    seconds: Cost | None = None


class PastTrial(Spec):
    """One trial's settings and learning curve."""

    settings: dict[str, Any]
    curve: list[Point]
    failed: str | None = None


class Task(Spec):
    """One task's trials."""

    format: Literal[1] = 1
    tuner: str
    metric: str
    name: str
    features: dict[str, Finite] = {}
    untuned: Finite | None = None
    trials: list[PastTrial]

    def write(self, path: Path) -> None:
        """As a file that `read_history` takes."""
        write_json(path, self.model_dump(mode="json"))


def read_history(names: Sequence[str], tuner: str, metric: str | None = None) -> list[Task]:
    """The tasks in files, and in the folders of searches and of tune runs that measured
    themselves; each has as its name what names it here. Runs that tuned the same base on the same
    rows are one task, of the first one's name.

    Raises InputError for what is none of these, or is of another tuner or metric.
    """
    found: list[Task] = []
    runs: dict[str, list[tuple[str, Task]]] = {}
    for name in names:
        path = Path(name).expanduser()
        if (path / HISTORY).exists():
            task = _with_seconds(_read(path / HISTORY), path)
            found.append(task.model_copy(update={"name": name}))
        elif (path / "run.json").exists():
            key, task = _of_run(path)
            runs.setdefault(key, []).append((name, task))
        elif path.is_file():
            found.append(_read(path).model_copy(update={"name": name}))
        else:
            raise InputError(
                f"history: {name}: no history file, and no folder of a search that left "
                f"{HISTORY} or of a tune run; name one of these"
            )
    for same in runs.values():
        trials = [trial for _, task in same for trial in task.trials]
        found.append(same[0][1].model_copy(update={"trials": trials}))
    for task in found:
        for what, theirs, ours in (("tuner", task.tuner, tuner), ("metric", task.metric, metric)):
            if ours is not None and theirs != ours:
                raise InputError(
                    f"history: {task.name} has {what} = {theirs}, and this search {ours}; "
                    "leave it out"
                )
    return found


def _read(path: Path) -> Task:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"history: {path}: not JSON ({error}); name another file") from None
    if not isinstance(content, dict):
        raise InputError(f"history: {path}: holds no mapping; docs/search.md shows the form")
    return Task.parse(content, f"history: {path}")


def _with_seconds(task: Task, folder: Path) -> Task:
    """Seconds are in the run's record, as `history.json` must not differ from run to run."""
    seconds: Mapping[str, list[float]] = Run.read(folder)["notes"].get("part_seconds", {})
    trials = [
        trial.model_copy(
            update={
                "curve": [
                    point.model_copy(update={"seconds": own[k] if k < len(own) else point.seconds})
                    for k, point in enumerate(trial.curve)
                ]
            }
        )
        for trial, own in ((t, seconds.get(str(n), [])) for n, t in enumerate(task.trials))
    ]
    return task.model_copy(update={"trials": trials})


def _of_run(folder: Path) -> tuple[str, Task]:
    """A tune run's evaluations as the curve of one trial, and what tells its task."""
    record = Run.read(folder)
    step = record["recipe"].get("steps", [{}])[0].get("tune")
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    key = next((k for line in lines for k in line if k.startswith("evaluation_")), None)
    if step is None or record["status"] != "done" or key is None:
        raise InputError(
            f"history: {folder}: no finished tune run that measured itself (evaluate=); leave it "
            "out"
        )
    notes, cost = record["notes"], record["cost"]
    best = notes["best_evaluation"]
    sign = 1.0 if best["merit"] == -best["value"] else -1.0
    total = -(-notes["rows"] // step["batch_size"]) * step["epochs"]
    places = [(line["step"], line[key]) for line in lines if key in line]
    curve = [
        Point(
            share=min(1.0, at / total),
            value=sign * value,
            flops=cost["flops"] / len(places),
            seconds=cost["wall_seconds"] / len(places),
        )
        for at, value in places
    ]
    inputs = {k: v for k, v in record["inputs"].items() if k == "base" or k.startswith("data ")}
    given = ("name", "base", "seed", "data", "evaluate", "weights", "settings_from", "method")
    own = {name: value for name, value in step.items() if name not in given}
    task = Task(
        tuner=step["method"],
        metric=key.removeprefix("evaluation_"),
        name=str(folder),
        features=sizes(notes["rows"], notes["tokens"], notes["response_tokens"]),
        trials=[PastTrial(settings=own, curve=curve)],
    )
    return digest({**inputs, "tuner": step["method"]}), task


def sizes(rows: int, tokens: int, response_tokens: int) -> dict[str, float]:
    """The features of a task that a run's record tells: log2 of its sizes."""
    from math import log2

    return {
        "rows": log2(max(1, rows)),
        "row_tokens": log2(max(1.0, tokens / max(1, rows))),
        "response_tokens": log2(max(1.0, response_tokens / max(1, rows))),
    }
