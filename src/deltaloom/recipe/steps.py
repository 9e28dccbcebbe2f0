"""Steps and recipes: what the shell and YAML say (`parsing.py` checks it).

A step is one verb with its inputs (`pool`, `data`, `deltas`, ...) and its method's settings in one
flat mapping; inputs may name earlier steps. The shell's `deltaloom tune lora data=d.jsonl lr=1e-4`
is the one-step recipe `tune: {method: lora, data: d.jsonl, lr: 1e-4}`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from deltaloom.core.base import BaseField
from deltaloom.core.method import Method
from deltaloom.core.places import moved
from deltaloom.core.spec import Spec


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
        step = placed(placed(self.step, folder_of), path_of)
        return Planned(step, moved(self.method, folder_of))


@dataclass(frozen=True)
class Recipe:
    """Checked steps in order."""

    steps: tuple[Planned, ...]

    def record(self) -> dict[str, Any]:
        """The recipe with every setting spelled out."""
        return {"steps": [planned.record() for planned in self.steps]}


def placed(step: Step, place: Callable[[str], str]) -> Step:
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


def path_of(name: str) -> str:
    """A local path made absolute, so that a recorded recipe replays from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
