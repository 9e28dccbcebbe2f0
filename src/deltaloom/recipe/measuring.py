"""What a measure step does: every model on every task, and each against the one it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare, holm
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, of_kind
from deltaloom.core.origin import Origin, refuse_other_tokens
from deltaloom.core.progress import say
from deltaloom.core.run import Run
from deltaloom.recipe.inputs import Inputs
from deltaloom.recipe.references import labels
from deltaloom.recipe.steps import MeasureStep, Planned

ESTIMATE = "estimate.json"


def measure(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    """Do a measure step: its estimates and comparisons, without their items."""
    step, base = planned.step, inputs.base
    assert isinstance(step, MeasureStep)
    measurer = of_kind(planned.method, Measurer)
    measured = labels(step.deltas, "base" if base is not None else str(measurer.subject))
    # A measure that brings its own questions is its own task; two in a recipe go by their names.
    own = step.method if step.name == f"measure-{step.method}" else step.name
    given = inputs.data["tasks"] or [Examples([], own)]
    tasks = [Path(data.name).stem for data in given]
    if len(set(tasks)) != len(tasks):
        raise InputError(f"{step.name}: two of tasks have the same file name: {', '.join(tasks)}")
    origins = {
        label: base and Origin(base, None if name == "base" else inputs.folder(name))
        for label, name in measured.items()
    }
    if measurer.by_token and step.compare is not None:
        refuse_other_tokens(origins, step.compare, given[0], step.name)
    found: dict[tuple[str, str], Estimate] = {}
    for label, origin in origins.items():
        loaded = _Once(origin.load if origin is not None else lambda: (None, None))
        for task, data in zip(tasks, given, strict=True):
            part = run.part(f"{label}--{task}")
            part.origin = origin
            parts = _estimates(measurer, loaded, data, part, f"{label} on {task}")
            for inner, one in parts.items():
                found[label, f"{task}.{inner}" if inner else task] = one
        run.save()
    return _measured(found, step.compare)


class _Once:
    """Loads on first use, so that a finished measurement loads nothing again."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        self._load = load
        self._value: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._value is None:
            self._value = self._load()
        return self._value


def _estimates(
    measurer: Measurer, loaded: _Once, data: Examples, part: Run, of: str
) -> dict[str, Estimate]:
    """One Estimate, of the name "", and those of its parts; each in a folder of its own."""
    path = part.folder / ESTIMATE
    if path.exists():
        places = {"": path}
        for inner in sorted(path.parents[1].glob(f"{part.folder.name}.*/{ESTIMATE}")):
            places[inner.parent.name.removeprefix(f"{part.folder.name}.")] = inner
        return {
            name: Estimate.from_json(json.loads(place.read_text(encoding="utf-8")))
            for name, place in places.items()
        }
    measured = measurer.measure(*loaded(), data, part)
    found = measured if isinstance(measured, dict) else {"": measured}
    # The whole comes last: where it is, all are.
    for name in sorted(found, reverse=True):
        found[name] = replace(found[name], of=f"{of}.{name}" if name else of)
        folder = path.parent.with_name(f"{path.parent.name}.{name}") if name else path.parent
        folder.mkdir(exist_ok=True)
        write_json(folder / ESTIMATE, found[name].to_json())
        say(f"{found[name].of}: {found[name].summary()}")
    return found


def _measured(found: dict[tuple[str, str], Estimate], against: str | None) -> dict[str, Any]:
    estimates = {f"{label}/{task}/{one.metric}": brief(one) for (label, task), one in found.items()}
    paired = {
        (label, task): compare(one, found[against, task])
        for (label, task), one in found.items()
        if against is not None and label != against
    }
    # Corrected over all that this step compares: every task and every model is another chance.
    adjusted = holm(result.p_value for result in paired.values())
    comparisons = {
        f"{label} - {against}/{task}/{found[label, task].metric}": {
            **brief(result.difference),
            "p": result.p_value,
            "p_holm": p_holm,
            "favours": {"a": label, "b": against}.get(result.favours, "neither"),
        }
        for ((label, task), result), p_holm in zip(paired.items(), adjusted, strict=True)
    }
    return {"estimates": estimates, "comparisons": comparisons}


def brief(estimate: Estimate) -> dict[str, Any]:
    """An estimate without its items, for records and tables."""
    full = estimate.to_json()
    return {
        key: value for key, value in full.items() if key not in ("items", "weights", "clusters")
    }
