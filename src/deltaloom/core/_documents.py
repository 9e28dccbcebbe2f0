"""Estimates and comparisons as JSON documents, which know no infinity, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from deltaloom.core.errors import InputError, suggest


def plain(value: Any) -> Any:
    """`value` in JSON's terms; JSON has no infinity, so an unknown error or bound is null."""
    if is_dataclass(value):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restore(record: dict[str, Any], **unbounded: float) -> None:
    """Undo `plain` where a null can only mean infinite."""
    record.update({name: end for name, end in unbounded.items() if record[name] is None})


def record_of(cls: Any, document: Mapping[str, Any] | str) -> dict[str, Any]:
    """The fields of the dataclass `cls` in a JSON document; InputError for unknown or absent."""
    kind = cls.__name__
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except json.JSONDecodeError as error:
            raise InputError(f"{kind}: not JSON ({error})") from None
    if not isinstance(document, Mapping):
        raise InputError(f"{kind}: expected a JSON object, not {type(document).__name__}")
    names = [part.name for part in fields(cls)]
    for key in set(document) - set(names):
        raise InputError(f"{kind}: unknown key {key!r}{suggest(key, names)}")
    for name in set(names) - set(document):
        raise InputError(f"{kind}: {name!r} is missing")
    return dict(document)
