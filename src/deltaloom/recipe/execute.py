"""Running steps and recipes: inputs resolved and hashed, one Run folder a step, resumed if there.

A step's folder *is* its product: an adapter or model folder, or the selected rows, with `run.json`
beside. In a recipe's folder each step has the folder of its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import (
    Evaluation,
    Measurer,
    Merger,
    Searcher,
    Selector,
    Transferrer,
    Tuner,
    of_kind,
)
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.core.run import COUNTERS, Run, Workers
from deltaloom.core.source_weights import SourceWeights, epoch
from deltaloom.core.spec import canonical
from deltaloom.recipe.card import write_card
from deltaloom.recipe.inputs import Inputs
from deltaloom.recipe.measuring import measure
from deltaloom.recipe.steps import (
    MergeStep,
    Planned,
    Recipe,
    SearchStep,
    SharedStep,
    TuneStep,
)

SELECTED, SCORES = "selected.jsonl", "scores"
CHOICE, TRIALS = "choice.json", "trials.jsonl"


def run_step(
    planned: Planned, folder: Path, earlier: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Do one step in `folder`, or find it done there; returns its run record.

    Raises InputError for bad input, WorkError for work that failed.
    """
    planned = with_choice(planned, earlier or {})
    inputs = Inputs(planned, earlier or {})
    replay = {"steps": [planned.standing_alone(inputs.folder).record()]}
    with Run.open(
        folder, {"steps": [planned.record()]}, inputs.hashes, planned.step.seed, replay=replay
    ) as run:
        if run.done:
            say(f"{planned.step.name}: already done in {folder}")
            return run.record
        if isinstance(planned.step, SharedStep):
            run.workers = Workers(planned.step.workers, planned.step.cluster)
        say(f"{planned.step.name}: {planned.step.verb} {planned.step.method} -> {folder}")
        found = Planned(planned.step, inputs.method)
        results = DOING[planned.step.verb](found, inputs, run)
        run.finish(**results)
        return run.record


def with_choice(planned: Planned, earlier: Mapping[str, Path]) -> Planned:
    """A step with the settings that the search it names has chosen, spelled out as its own."""
    name = getattr(planned.step, "settings_from", None)
    if name is None:
        return planned
    path = Path(earlier.get(name, name)) / CHOICE
    where = f"{planned.step.name}: settings_from = {name}"
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{where}: no finished search there ({path} is missing or damaged); name a search step "
            "or its folder"
        ) from None
    method = planned.method
    unknown = sorted(chosen.keys() - type(method).model_fields.keys())
    if unknown:
        raise InputError(
            f"{where}: its choice has {unknown[0]!r}, which {planned.step.verb} "
            f"{planned.step.method} does not take; name another search or another method"
        )
    given = {key: getattr(method, key) for key in method.model_fields_set}
    step = planned.step.model_copy(update={"settings_from": None})
    return Planned(step, type(method).parse({**chosen, **given}, where))


def run_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Do every step in its own folder inside `folder`, skipping those that are done."""
    for planned in recipe.steps:
        # Else the recipe's record would be another's before a step refuses to be.
        if getattr(planned.step, "settings_from", None) is None:
            Run.refuse_other(folder / planned.step.name, {"steps": [planned.record()]})
    with Run.open(folder, recipe.record(), {}, editable=True) as run:
        earlier: dict[str, Path] = {}
        results: dict[str, Any] = {"steps": {}, "estimates": {}, "comparisons": {}}
        cost = dict.fromkeys(COUNTERS, 0.0)
        for planned in recipe.steps:
            name = planned.step.name
            record = run_step(planned, folder / name, earlier)
            earlier[name] = folder / name
            results["steps"][name] = {
                "verb": planned.step.verb,
                "method": planned.step.method,
                "cost": record["cost"],
            }
            for part in ("estimates", "comparisons"):
                _add(results[part], record["results"].get(part, {}), name)
            cost = {key: cost[key] + record["cost"].get(key, 0.0) for key in COUNTERS}
        _refresh_cards(recipe, folder, results["estimates"])
        # The ledger of a recipe is the sum of its steps', whichever process did them.
        run.finish(**results)
        run.record["cost"].update(cost)
        write_json(folder / "run.json", run.record)
        return run.record


def _add(found: dict[str, Any], more: dict[str, Any], step: str) -> None:
    """Add a step's results; one that differs from an earlier of its name gets the step's beside."""
    for key, value in more.items():
        label, _, rest = key.partition("/")
        other = key in found and {**found[key], "cost": None} != {**value, "cost": None}
        found[f"{label} ({step})/{rest}" if other else key] = value


def _select(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    pool, target = inputs.rows("pool") or Examples([], "pool"), inputs.rows("target")
    selector = of_kind(planned.method, Selector)
    selection = selector.select(pool, run, target=target, base=inputs.base)
    columns: dict[str, dict[str, Any]] = {}
    if selection.scores is not None:
        values = dict(zip(selection.scores.ids, selection.scores.index["score"], strict=True))
        columns["score"] = values
        goal = run.folder / SCORES
        shutil.rmtree(goal, ignore_errors=True)  # an earlier attempt may have got this far
        os.replace(selection.scores.folder, goal)
    if selection.reasons:
        columns["reason"] = selection.reasons
    selection.chosen.write(run.folder / SELECTED, columns)
    found = {
        "rows": len(selection.chosen),
        "pool_rows": len(pool),
        "pool_sources": dict(pool.sources()),
        "selected_sources": dict(selection.chosen.sources()),
    }
    if selection.weights is not None:
        selection.weights.write(run.folder)
        found["weights"] = selection.weights.record()
    return found


def _tune(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    step, data, base = planned.step, inputs.rows("data"), inputs.base
    assert isinstance(step, TuneStep)
    assert data is not None
    assert base is not None
    if inputs.weights is not None:
        data = _mixed(data, inputs.weights, base, run)
    tuner = of_kind(planned.method, Tuner)
    delta = tuner.tune(base, data, run, evaluation=_evaluation(step, inputs))
    about = {
        "base": base.model,
        "fingerprint": base.fingerprint(),
        "sources": dict(data.sources()),
    }
    write_card(run.folder, planned.record(), about)
    return {"delta": delta.kind, "about": about}


def _mixed(data: Examples, weights: SourceWeights, base: Base, run: Run) -> Examples:
    """One epoch of the data by weights; how often rows are in it goes to the run's notes."""
    lengths = None
    if weights.unit == "tokens":
        from deltaloom.core.encoding import encode

        lengths = [len(row.input_ids) for row in encode(data, base.tokenizer(), base.max_length)]
    mixed = epoch(data, weights, run.seed, lengths)
    before, after = data.sources(), mixed.sources()
    repeated = {name: round(n / before[name], 3) for name, n in after.items() if n > before[name]}
    run.note(mixed_sources=dict(after), repeated_sources=repeated)
    if repeated:
        worst = max(repeated, key=lambda name: repeated[name])
        say(f"an epoch has each row of {worst!r} {repeated[worst]:g} times")
    return mixed


def _search(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    step, data, base = planned.step, inputs.rows("data"), inputs.base
    assert isinstance(step, SearchStep)
    assert data is not None
    assert base is not None
    searcher = of_kind(planned.method, Searcher)
    found = searcher.search(base, data, run, evaluation=_evaluation(step, inputs))
    lines = [canonical(asdict(trial)) + "\n" for trial in found.trials]
    write_text(run.folder / TRIALS, "".join(lines))
    write_json(run.folder / CHOICE, found.choice)
    results = {
        "choice": found.choice,
        "trials": len(found.trials),
        "failed_trials": sum(trial.failed is not None for trial in found.trials),
    }
    if found.delta is None:
        return results
    about = {
        "base": base.model,
        "fingerprint": base.fingerprint(),
        "sources": dict(data.sources()),
    }
    write_card(run.folder, planned.record(), about)
    return {**results, "delta": found.delta.kind, "about": about}


def _evaluation(step: TuneStep | SearchStep, inputs: Inputs) -> Evaluation | None:
    if step.evaluate is None or inputs.held is None:
        return None
    made = get("measure", step.evaluate.method).make(step.evaluate.settings)
    method = of_kind(made, Measurer)
    if inputs.base is not None and inputs.base.labels and not method.classifiers:
        raise InputError(
            f"{step.name}: evaluate.method = {step.evaluate.method} does not work on sequence "
            "classifiers; measure with evaluate.method=choice"
        )
    return Evaluation(method, inputs.held, step.evaluate.every)


def _merge(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    assert inputs.base is not None
    assert isinstance(planned.step, MergeStep)
    deltas = [inputs.delta(name) for name in planned.step.deltas or ()]
    merger = of_kind(planned.method, Merger)
    delta = merger.merge(inputs.base, deltas, run, data=inputs.data["data"])
    about = {"base": inputs.base.model, "fingerprint": inputs.base.fingerprint()}
    write_card(run.folder, planned.record(), about)
    return {"delta": delta.kind, "about": about}


def _transfer(planned: Planned, inputs: Inputs, run: Run) -> dict[str, Any]:
    base, tokenizer = inputs.base, inputs.tokenizer
    assert base is not None
    assert tokenizer is not None
    method = of_kind(planned.method, Transferrer)
    delta = method.transfer(base, tokenizer, run, donor=inputs.donor, data=inputs.rows("data"))
    about = {"base": base.model, "fingerprint": base.fingerprint()}
    write_card(run.folder, planned.record(), about)
    return {"delta": delta.kind, "about": about}


def _refresh_cards(recipe: Recipe, folder: Path, estimates: dict[str, Any]) -> None:
    """Write into each product's card what later steps measured of it."""
    for planned in recipe.steps:
        name = planned.step.name
        if "about" in Run.read(folder / name)["results"]:
            own = {
                key.partition("/")[2]: one
                for key, one in estimates.items()
                if key.startswith(f"{name}/")
            }
            about = Run.read(folder / name)["results"]["about"]
            write_card(folder / name, planned.record(), about, own)


DOING: dict[str, Callable[[Planned, Inputs, Run], dict[str, Any]]] = {
    "select": _select,
    "tune": _tune,
    "merge": _merge,
    "transfer": _transfer,
    "search": _search,
    "measure": measure,
}
"""What each verb does with its checked inputs."""
