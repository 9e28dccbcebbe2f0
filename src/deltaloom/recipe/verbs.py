"""The verbs as Python functions; each is a one-step recipe in a run folder, as in the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, load
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.recipe.execute import CHOICE, SELECTED, run_recipe, run_step
from deltaloom.recipe.measuring import ESTIMATE
from deltaloom.recipe.parsing import parse_recipe, parse_step, read_yaml
from deltaloom.recipe.steps import Planned


def select(method: str, *, out: str | Path, **settings: Any) -> Examples:
    """Choose rows: `select("less", base=B, pool=P, target=T, fraction=0.05, out=DIR)`.

    Raises InputError for bad input and WorkError for work that failed, as all verbs do.
    """
    _do("select", method, out, settings)
    return Examples.read(Path(out) / SELECTED)


def tune(method: str, *, out: str | Path, **settings: Any) -> Delta:
    """Tune: `tune("lora", base=B, data=D, lr=1e-4, out=DIR)`."""
    planned = _do("tune", method, out, settings)
    return load(Path(out), _base(planned))


def merge(method: str, *, out: str | Path, **settings: Any) -> Delta:
    """Merge: `merge("ties", base=B, deltas=[D1, D2], density=0.2, out=DIR)`."""
    planned = _do("merge", method, out, settings)
    return load(Path(out), _base(planned))


def transfer(method: str, *, out: str | Path, **settings: Any) -> Delta:
    """Give a base another tokenizer: `transfer("fvt", base=B, tokenizer=T, out=DIR)`."""
    planned = _do("transfer", method, out, settings)
    return load(Path(out), _base(planned))


def search(method: str, *, out: str | Path, **settings: Any) -> dict[str, Any]:
    """Search: `search("width", base=B, data=D, out=DIR)`; the choice, as in `choice.json`."""
    import json

    _do("search", method, out, settings)
    return json.loads((Path(out) / CHOICE).read_text(encoding="utf-8"))


def measure(method: str, *, out: str | Path, **settings: Any) -> dict[str, Estimate]:
    """Measure: `measure("choice", base=B, deltas=[D], tasks=T, out=DIR)`; by `label--task`."""
    import json

    _do("measure", method, out, settings)
    return {
        path.parent.name: Estimate.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(Path(out).glob(f"*/{ESTIMATE}"))
    }


def run(recipe: str | Path | dict[str, Any], *, out: str | Path, **overrides: Any) -> dict:
    """Run a recipe (a YAML file or its content); returns the record in `out/run.json`."""
    content = recipe if isinstance(recipe, dict) else read_yaml(Path(recipe))
    where = "recipe" if isinstance(recipe, dict) else str(recipe)
    return run_recipe(parse_recipe(content, where, overrides), Path(out))


def _do(verb: str, method: str, out: str | Path, settings: dict[str, Any]) -> Planned:
    values = {key: _plain(value) for key, value in settings.items()}
    planned = parse_step(verb, {"method": method, **values}, f"{verb} {method}")
    run_step(planned, Path(out))
    return planned


def _plain(value: Any) -> Any:
    if isinstance(value, Base):
        return value.model_dump()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _base(planned: Planned) -> Base:
    assert planned.step.base is not None
    return planned.step.base
