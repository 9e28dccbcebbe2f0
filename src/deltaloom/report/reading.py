"""Run folders as the report sees them: steps with settings, status, cost and lineage.

Only the files of the run-folder contract are read; a step whose folder is missing, unfinished or
damaged is kept and says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.run import COUNTERS, PEAKS, Run

INPUTS = ("pool", "target", "data", "weights", "deltas", "tasks")
"""Settings that name data or earlier steps, besides `base`."""
STATUS = {
    "done": "done",
    "failed": "failed",
    "interrupted": "interrupted",
    "running": "not finished",
    "missing": "not started",
    "unreadable": "unreadable",
}
"""What a run's status is called in a report; any other is shown as it is."""


@dataclass(frozen=True)
class Step:
    """One step of one run."""

    run: str
    name: str
    verb: str
    settings: dict[str, Any]
    folder: Path
    record: dict[str, Any]
    status: str
    error: str | None = None

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.settings.get("method", ""))

    @property
    def cost(self) -> dict[str, float]:
        """The ledger, zeros where nothing was entered."""
        spent = self.record.get("cost", {})
        return {key: float(spent.get(key) or 0.0) for key in (*COUNTERS, *PEAKS)}

    @property
    def results(self) -> dict[str, Any]:
        """What the step recorded as its results."""
        return self.record.get("results", {})

    @property
    def base(self) -> str | None:
        """The model it worked on."""
        base = self.settings.get("base")
        return base.get("model") if isinstance(base, dict) else base

    def names(self, key: str) -> list[str]:
        """One input's names as a list."""
        value = self.settings.get(key) or []
        return [value] if isinstance(value, str) else [str(one) for one in value]


@dataclass(frozen=True)
class RunView:
    """One run folder: of a recipe, or of a single step."""

    name: str
    folder: Path
    record: dict[str, Any]
    steps: tuple[Step, ...]
    recipe: bool

    @property
    def status(self) -> str:
        """How it ended."""
        return str(self.record.get("status", "running"))


@dataclass(frozen=True)
class Report:
    """All runs of a report and how their steps depend on one another."""

    runs: tuple[RunView, ...]
    _parents: dict[Path, list[Step]] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        """Every step, in order."""
        return [step for run in self.runs for step in run.steps]

    def of_verb(self, *verbs: str) -> list[Step]:
        """The steps of some verbs."""
        return [step for step in self.steps if step.verb in verbs]

    def label(self, step: Step) -> str:
        """The step's name, with its run's when that alone does not say which."""
        same = [one for one in self.steps if one.name == step.name]
        return step.name if len(same) == 1 else f"{step.run}/{step.name}"

    def find(self, name: str, near: Step) -> Step | None:
        """The step that `near` means by `name`: of its own run, or another run's folder."""
        for one in self.steps:
            if one.run == near.run and one.name == name and one is not near:
                return one
        if "/" not in name:
            return None
        path = Path(name)
        places = {path.resolve(), path.resolve().parent}
        return next((one for one in self.steps if one.folder.resolve() in places), None)

    def lineage(self, step: Step) -> list[Step]:
        """The step and all steps that its product rests on, in order."""
        found: list[Step] = []
        waiting = [step]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.append(one)
                waiting.extend(self._inputs(one))
        return [one for one in self.steps if one in found]

    def _inputs(self, step: Step) -> list[Step]:
        if step.folder not in self._parents:
            names = [name for key in INPUTS for name in step.names(key)]
            names += [step.base] if step.base else []
            found = (self.find(name, step) for name in names)
            self._parents[step.folder] = [one for one in found if one is not None]
        return self._parents[step.folder]


def read_runs(folders: Sequence[Path]) -> Report:
    """Read run folders; raises InputError when one is none."""
    if not folders:
        raise InputError("a report needs at least one run folder")
    paths = [Path(folder) for folder in dict.fromkeys(folders)]
    return Report(tuple(_run(path, name) for path, name in zip(paths, _names(paths), strict=True)))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a missing file has none, a torn last line is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many folders before them as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _run(folder: Path, name: str) -> RunView:
    record = _record(folder)
    recipe = record.get("recipe")
    named = recipe.get("steps") if isinstance(recipe, dict) else None
    found = [_verb(raw) for raw in named] if isinstance(named, list) else []
    listed = [one for one in found if one is not None]
    is_recipe = (
        len(listed) != 1
        or "steps" in record.get("results", {})
        or (folder / str(listed[0][1].get("name")) / "run.json").exists()
    )
    if is_recipe:
        steps = [_step(name, verb, values, folder) for verb, values in listed]
    else:
        verb, values = listed[0]
        steps = [_made(name, verb, values, folder, record)]
    return RunView(name, folder, record, tuple(steps), is_recipe)


def _record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no run folder (there is no such folder)")
    try:
        return Run.read(folder)
    except AttributeError:
        raise InputError(f"{folder / 'run.json'} is no run record") from None


def _verb(raw: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(raw, dict) or len(raw) != 1:
        return None
    ((verb, values),) = raw.items()
    return (str(verb), values) if isinstance(values, dict) else None


def _step(run: str, verb: str, values: dict[str, Any], home: Path) -> Step:
    folder = home / str(values.get("name", verb))
    if not (folder / "run.json").exists():
        return Step(run, folder.name, verb, values, folder, {}, "missing")
    try:
        return _made(run, verb, values, folder, _record(folder))
    except InputError as error:
        return Step(run, folder.name, verb, values, folder, {}, "unreadable", str(error))


def _made(
    run: str, verb: str, values: dict[str, Any], folder: Path, record: dict[str, Any]
) -> Step:
    name = str(values.get("name", verb))
    status = str(record.get("status", "running"))
    return Step(run, name, verb, values, folder, record, status, record.get("error"))
