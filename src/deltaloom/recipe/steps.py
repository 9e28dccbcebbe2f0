"""Steps and recipes: what the shell and YAML say, checked before anything is loaded.

A step is one verb with its inputs (`pool`, `data`, `deltas`, ...) and its method's settings in one
flat mapping; inputs may name earlier steps. The shell's `deltaloom tune lora data=d.jsonl lr=1e-4`
is the one-step recipe `tune: {method: lora, data: d.jsonl, lr: 1e-4}`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BeforeValidator, Field

from deltaloom.core.base import BaseField
from deltaloom.core.errors import InputError, suggest
from deltaloom.core.method import Measurer, Method
from deltaloom.core.places import moved
from deltaloom.core.registry import VERBS, get, methods
from deltaloom.core.spec import Spec, explain, field_help
from deltaloom.recipe.references import check_measured, check_name, labels, refuse_later


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


WHO = ("workers", "cluster")
"""Keys that say who does the work: no part of what the step is."""
Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class Step(Spec):
    """What every step has."""

    verb: ClassVar[str]
    data_keys: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[frozenset[str]] = frozenset()
    """Inputs that must be given unless the method says that they are optional."""
    model_keys: ClassVar[tuple[str, ...]] = ()
    """Inputs that name one folder, hub id or earlier step each."""

    name: str
    """Name by which later steps, overrides and reports call this step."""
    method: str
    """Name of the method, as `deltaloom ls` shows it."""
    base: BaseField | None = None
    """Model to work on: hub id, folder, an earlier step, or a mapping with model, revision,
    dtype, device, trust_remote_code. The recipe's own `base` when left out."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every random choice, of 32 bits as NumPy takes them. The recipe's own `seed` when
    left out."""


class SharedStep(Step):
    """A step whose gradient and feature passes, or trials, may be shared among processes."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that share the shards of a gradient or feature pass, or the trials of a search,
    each with one thread; any number of them gives the same bytes. 0 works in this process. May
    change between resumptions."""
    cluster: str | None = None
    """Address of a Ray cluster to do that on, or `local`; its machines must see the same files."""


class SelectStep(SharedStep):
    """Choose rows of a pool."""

    verb = "select"
    data_keys = ("pool", "target")
    required = frozenset({"pool"})

    pool: Names | None = None
    """Files, folders, dataset ids or earlier select steps to choose from."""
    target: Names | None = None
    """A few rows of what the model should become good at."""


class EvaluateSpec(Spec):
    """A measurement made while tuning."""

    method: str = "loss"
    """Measure method."""
    data: Names
    """Rows to measure on."""
    every: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps between evaluations; once an epoch when left out."""
    settings: dict[str, Any] = {}
    """Settings of the measure method."""


def _as_evaluate(value: Any) -> Any:
    return {"data": value} if isinstance(value, str | list) else value


class TuneStep(Step):
    """Tune the base on rows."""

    verb = "tune"
    data_keys = ("data",)

    data: Names
    """Files, folders, dataset ids or earlier select steps to learn from."""
    weights: str | None = None
    """A `weights.json`, or an earlier select step that found weights: an epoch then has the shares
    of `data`'s sources that it says, exactly; rows repeat only as often as it allows."""
    evaluate: Annotated[EvaluateSpec | None, BeforeValidator(_as_evaluate)] = None
    """Stop early and keep the best weights by this measurement; a file name means its loss."""
    settings_from: str | None = None
    """An earlier search step, or its folder, whose chosen settings this step takes; a setting given
    here has the last word."""


class SearchStep(SharedStep):
    """Search for settings: try some on rows, keep the best."""

    verb = "search"
    data_keys = ("data",)

    data: Names
    """Files, folders, dataset ids or earlier select steps that every trial learns from."""
    evaluate: Annotated[EvaluateSpec | None, BeforeValidator(_as_evaluate)] = None
    """What trials are compared by; a file name means its loss. Rows held out of data when left
    out."""


class MergeStep(Step):
    """Merge deltas of one base."""

    verb = "merge"
    data_keys = ("data",)

    deltas: Names | None = None
    """Adapter or model folders, hub ids or earlier tune and merge steps."""
    data: Names | None = None
    """Files, folders, dataset ids or earlier select steps, for methods that merge with data: one
    for each delta in their order, or what the method's own page says."""


class TransferStep(Step):
    """Give the base another tokenizer."""

    verb = "transfer"
    data_keys = ("data",)
    model_keys = ("tokenizer", "donor")

    tokenizer: str
    """Folder, hub id or earlier step with the tokenizer to move to."""
    donor: str | None = None
    """Model that has the tokenizer, for methods that look at its embeddings; the model that
    `tokenizer` names when left out."""
    data: Names | None = None
    """Files, folders, dataset ids or earlier select steps of text, for methods that learn from it
    and for healing."""


class MeasureStep(SharedStep):
    """Measure the base or deltas of it."""

    verb = "measure"
    data_keys = ("tasks",)
    required = frozenset({"tasks"})

    tasks: Names | None = None
    """Files of questions or rows, one task each."""
    deltas: Annotated[list[str], BeforeValidator(_as_list)] = []
    """What to measure; `base` is the base itself, and is all when the list is empty."""
    compare: str | None = None
    """One of the measured, against which every other is compared, item by item."""


STEPS: dict[str, type[Step]] = {
    cls.verb: cls
    for cls in (SelectStep, TuneStep, MergeStep, TransferStep, SearchStep, MeasureStep)
}


@dataclass(frozen=True)
class Planned:
    """A checked step with its method made."""

    step: Step
    method: Method

    def record(self) -> dict[str, Any]:
        """The step with every setting spelled out, as a recipe says it."""
        inputs = self.step.model_dump(mode="json", exclude_none=True, exclude={*WHO})
        return {self.step.verb: {**inputs, **self.method.model_dump(mode="json")}}

    def standing_alone(self, folder_of: Callable[[str], str]) -> Planned:
        """This step with the earlier steps it names replaced by their folders."""
        changes: dict[str, Any] = {
            key: [folder_of(name) for name in getattr(self.step, key) or []]
            for key in (*self.step.data_keys, "deltas")
            if getattr(self.step, key, None)
        }
        if isinstance(self.step, TuneStep) and self.step.weights is not None:
            changes["weights"] = folder_of(self.step.weights)
        for key in self.step.model_keys:
            if getattr(self.step, key) is not None:
                changes[key] = folder_of(getattr(self.step, key))
        if self.step.base is not None:
            model = folder_of(self.step.base.model)
            changes["base"] = self.step.base.model_copy(update={"model": model})
        if isinstance(self.step, TuneStep | SearchStep) and self.step.evaluate is not None:
            changes["evaluate"] = _on(self.step.evaluate, folder_of)
        step = _placed(self.step.model_copy(update=changes), _path)
        return Planned(step, moved(self.method, folder_of))


@dataclass(frozen=True)
class Recipe:
    """Checked steps in order."""

    steps: tuple[Planned, ...]

    def record(self) -> dict[str, Any]:
        """The recipe with every setting spelled out."""
        return {"steps": [planned.record() for planned in self.steps]}


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
        return name if name in earlier else _path(name)

    step = _placed(step, place)
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


def read_yaml(path: Path) -> Any:
    """A YAML file, loaded safely; raises InputError naming the line."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
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


def _placed(step: Step, place: Callable[[str], str]) -> Step:
    """Every place that a step names changed by `place`; `base` among what is measured is none."""
    changes: dict[str, Any] = {}
    for key in (*step.data_keys, "deltas"):
        names = getattr(step, key, None)
        if names:
            measured = key == "deltas" and isinstance(step, MeasureStep)
            changes[key] = [name if measured and name == "base" else place(name) for name in names]
    if isinstance(step, TuneStep) and step.weights is not None:
        changes["weights"] = place(step.weights)
    for key in step.model_keys:
        if getattr(step, key) is not None:
            changes[key] = place(getattr(step, key))
    if isinstance(step, TuneStep | SearchStep) and step.evaluate is not None:
        changes["evaluate"] = _on(step.evaluate, place)
    if step.base is not None:
        changes["base"] = step.base.model_copy(update={"model": place(step.base.model)})
    return step.model_copy(update=changes)


def _on(evaluate: EvaluateSpec, place: Callable[[str], str]) -> EvaluateSpec:
    return evaluate.model_copy(update={"data": [place(name) for name in evaluate.data]})


def _path(name: str) -> str:
    """A local path made absolute, so that a recorded recipe replays from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _help(cls: type[Step], key: str) -> str:
    text = explain(cls, key)
    return f" ({text})" if text else ""
