"""What the steps of a recipe say of one another: their names, what they name, what they compare."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.places import places

if TYPE_CHECKING:
    from deltaloom.core.method import Method
    from deltaloom.recipe.steps import Step


def check_name(name: str, where: str) -> None:
    """Raise InputError for a name that names no folder of its own, or the base."""
    if name == "base":
        raise InputError(f"{where}: 'base' is the recipe's base; give the step another name")
    if Path(name).name != name or name.startswith("."):
        raise InputError(
            f"{where}: a step's name is that of its folder, without '/' and no '.' at its beginning"
        )


def refuse_later(step: Step, method: Method, later: Collection[str], where: str) -> None:
    """Raise InputError where a step names one that is done after it, or itself."""
    for key, name in _named(step, method):
        if name in later and not Path(name).exists():
            raise InputError(
                f"{where}: {key} = {name!r} is made by this step or a later one, and they are done "
                "in their order; put that step before this one"
            )


def labels(deltas: list[str], subject: str) -> dict[str, str]:
    """Label -> name of what a step measures: the last part of a path or hub id."""
    names = deltas or [subject]
    return {Path(name).name if "/" in name else name: name for name in names}


def check_measured(step: Step, found: dict[str, str], where: str) -> None:
    """Raise InputError for two of one label, and for a comparison with what is not measured."""
    deltas, against = getattr(step, "deltas", []), getattr(step, "compare", None)
    if deltas and len(found) != len(deltas):
        raise InputError(f"{where}: two of deltas have the same last name: {', '.join(deltas)}")
    if against is not None and against not in found:
        raise InputError(
            f"{where}: compare = {against!r} is not measured here{suggest(against, found)}"
        )


def _named(step: Step, method: Method) -> Iterator[tuple[str, str]]:
    """Key and name of everything that a step takes from elsewhere."""
    if step.base is not None:
        yield "base", step.base.model
    for key in (*step.data_keys, "deltas", "weights", "settings_from", *step.model_keys):
        given = getattr(step, key, None)
        for name in [given] if isinstance(given, str) else given or ():
            yield key, name
    evaluate = getattr(step, "evaluate", None)
    for name in evaluate.data if evaluate is not None else ():
        yield "evaluate", name
    yield from places(method)
