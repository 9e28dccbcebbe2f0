"""Recipes from YAML and the shell: keys checked and names placed before anything is done."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.method import Measurer, Method
from deltaloom.core.places import moved
from deltaloom.core.registry import VERBS, get, methods
from deltaloom.core.spec import explain, field_help
from deltaloom.recipe.references import check_measured, check_name, labels, refuse_later
from deltaloom.recipe.steps import (
    STEPS,
    MeasureStep,
    MergeStep,
    Planned,
    Recipe,
    Step,
    TransferStep,
    TuneStep,
    path_of,
    placed,
)


def parse_step(
    verb: str, values: dict[str, Any], where: str, earlier: Collection[str] = ()
) -> Planned:
    """Check one step, which may name `earlier` ones; raises InputError for an unknown or wrong key,
    naming it.
    """
    values = dict(values)
    cls = STEPS[verb]
    if "method" not in values:
        known = ", ".join(entry.name for entry in methods(verb))
        raise InputError(f"{where}: 'method' is missing; known: {known}")
    entry = get(verb, str(values["method"]))
    values.setdefault("name", f"{verb}-{entry.name}")
    fields = entry.load().model_fields
    own = {key: values.pop(key) for key in list(values) if key in cls.model_fields}
    for key in values:
        if key not in fields:
            known_keys = [*cls.model_fields, *fields]
            raise InputError(f"{where}: unknown key {key!r}{suggest(key, known_keys)}")
    method = entry.make(values)
    step = cls.parse(own, where)
    absent = [key for key in sorted(cls.required - method.optional) if not getattr(step, key)]
    if absent:
        raise InputError(f"{where}: {absent[0]!r} is missing{field_help(cls, absent[0])}")
    missing = [key for key in sorted(method.needs) if getattr(step, key, None) is None]
    if missing:
        raise InputError(f"{where}: {entry.name} needs {missing[0]}={_help(cls, missing[0])}")
    if verb in ("merge", "transfer"):
        _refuse_unused(step, method, f"{where}: {entry.name}")
    if step.base is None and (
        isinstance(step, TuneStep | MergeStep | TransferStep)
        or (isinstance(step, MeasureStep) and (step.deltas or _subject(method) is None))
    ):
        raise InputError(f"{where}: base= is missing{_help(cls, 'base')}")
    if step.base is not None and step.base.labels and not method.classifiers:
        raise InputError(
            f"{where}: {verb} {entry.name} does not work on sequence classifiers; "
            "leave out base.labels or choose another method"
        )

    def place(name: str) -> str:
        return name if name in earlier else path_of(name)

    step = placed(step, place)
    if isinstance(step, MeasureStep):
        subject = "base" if step.base is not None else str(_subject(method))
        check_measured(step, labels(step.deltas, subject), where)
    return Planned(step, moved(method, place))


def _subject(method: Method) -> str | None:
    return method.subject if isinstance(method, Measurer) else None


def _refuse_unused(step: Step, method: Method, where: str) -> None:
    for key in ("deltas", "data", "donor"):
        if getattr(step, key, None) is not None and key not in method.needs | method.uses:
            raise InputError(f"{where} makes no use of {key}=; leave it out")


def parse_recipe(content: Any, where: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Check a whole recipe; `overrides` maps `step.key` (or `base`, `seed`) to values."""
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise InputError(f"{where}: a recipe is a mapping with a list of 'steps'")
    unknown = sorted(content.keys() - {"base", "seed", "steps"})
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}{suggest(unknown[0], ['base', 'seed', 'steps'])}"
        )
    steps = [_named(raw, number, where) for number, raw in enumerate(content["steps"], 1)]
    content = {key: content[key] for key in ("base", "seed") if key in content}
    _override(content, steps, overrides or {})
    if not steps:
        raise InputError(f"{where}: has no steps")
    later = {values["name"] for _, values in steps}
    names: set[str] = set()
    planned = []
    for verb, values in steps:
        here = f"{where}: step {values['name']}"
        check_name(values["name"], here)
        if values["name"] in names:
            raise InputError(f"{here}: two steps have this name; set name: on one")
        one = parse_step(verb, {**content, **values}, here, names)
        refuse_later(one.step, one.method, later - names, here)
        planned.append(one)
        names.add(values["name"])
    return Recipe(tuple(planned))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping, each key once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """A YAML file, loaded safely; raises InputError naming the line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None


def assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` inside nested mappings."""
    *path, last = dotted.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if isinstance(inner, str) and part == "base":
            inner = values[part] = {"model": inner}
        if not isinstance(inner, dict):
            raise InputError(f"{dotted}: {part} is not a mapping")
        values = inner
    values[last] = value


def _named(raw: Any, number: int, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(raw, dict) or len(raw) != 1:
        raise InputError(f"{where}: step {number} must be one verb with its settings")
    ((verb, values),) = raw.items()
    if verb not in STEPS:
        raise InputError(f"{where}: step {number}: no verb {verb!r}{suggest(str(verb), VERBS)}")
    if not isinstance(values, dict):
        raise InputError(f"{where}: step {number}: {verb} needs a mapping of settings")
    name = values.get("name") or f"{verb}-{values.get('method', '')}"
    return verb, {**values, "name": str(name)}


def _override(
    content: dict[str, Any], steps: list[tuple[str, dict[str, Any]]], overrides: dict[str, Any]
) -> None:
    by_name = {values["name"]: values for _, values in steps}
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if rest and head in by_name:
            assign(by_name[head], rest, value)
        elif head in ("base", "seed"):
            assign(content, key, value)
        else:
            known = [*by_name, "base", "seed"]
            raise InputError(f"{key}: no step or recipe key {head!r}{suggest(head, known)}")


def _help(cls: type[Step], key: str) -> str:
    text = explain(cls, key)
    return f" ({text})" if text else ""
