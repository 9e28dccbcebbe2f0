"""Settings that name a file, a folder, a hub id or an earlier step of a recipe.

A method marks such a field once, `scorer: Annotated[str | None, PLACE] = None`; it may be a text, a
list of texts, a Base, or something else that names no place (an endpoint). Recipes then make its
local paths absolute, put the folder of an earlier step for its name, and count what is there in the
step's input hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deltaloom.core.base import Base
from deltaloom.core.spec import Spec, digest

RECORDS = ("run.json", "recipe.yaml", "metrics.jsonl", "README.md")
"""Files of a run's folder that are about the run and no part of its product."""
Settings = TypeVar("Settings", bound=Spec)


class Place:
    """The mark."""


PLACE = Place()


def places(settings: Spec) -> Iterator[tuple[str, str]]:
    """Key and name of every place that the settings give."""
    for key, value in _marked(settings):
        for one in value if isinstance(value, list) else [value]:
            name = one.model if isinstance(one, Base) else one
            if isinstance(name, str):
                yield key, name


def moved(settings: Settings, change: Callable[[str], str]) -> Settings:
    """The settings with every place changed."""
    new = {key: _changed(value, change) for key, value in _marked(settings)}
    new = {key: value for key, value in new.items() if value != getattr(settings, key)}
    return settings.model_copy(update=new) if new else settings


def fingerprint(path: Path) -> str:
    """Sixteen hex digits of what is there: weights by samples (see `Base`), other files whole."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if any(path.glob("*.safetensors")):
        return Base(model=str(path)).fingerprint()
    inner = (one for one in sorted(path.iterdir()) if one.name not in RECORDS)
    return digest([[one.name, fingerprint(one)] for one in inner if one.name[0] != "."])


def _marked(settings: Spec) -> Iterator[tuple[str, Any]]:
    for key, field in type(settings).model_fields.items():
        if PLACE in field.metadata:
            yield key, getattr(settings, key)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, Base):
        return value.model_copy(update={"model": change(value.model)})
    return value
