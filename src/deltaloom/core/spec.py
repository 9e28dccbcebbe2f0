"""Spec: frozen, typed, documented settings that refuse unknown keys in one clear sentence."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from deltaloom.core.errors import InputError, suggest

WANTED = {
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "list_type": "a list",
    "string_type": "a text",
}


class Spec(BaseModel):
    """Base of every method and step: the field's docstring is its help, schema and docs text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Validate `values`; raises InputError naming `where`, the key and the remedy."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(sentence(error, where, cls)) from None

    def digest(self) -> str:
        """Sixteen hex digits that change when any setting does."""
        return digest(self.model_dump(mode="json"))


def sentence(error: ValidationError, where: str, cls: type[BaseModel]) -> str:
    """The first problem of a pydantic error as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    last, owner = str((first["loc"] or ("",))[-1]), _owner(cls, first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{suggest(last, owner.model_fields)}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing{field_help(owner, last)}"
    wanted = WANTED.get(first["type"])
    reason = f"must be {wanted}" if wanted else first["msg"].removeprefix("Value error, ")
    # A rule about several fields has no key of its own and says itself which they are.
    return f"{where}: {key} = {first['input']!r}: {reason}" if key else f"{where}: {reason}"


def _owner(cls: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model, `cls` or one nested in it, that the last part of `location` is a key of."""
    for part in location[:-1]:
        field = cls.model_fields.get(str(part))
        if field is not None:
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    cls = kind
    return cls


def field_help(cls: type[BaseModel], key: str) -> str:
    """`": what the field is for"`, from the field's own docstring."""
    field = cls.model_fields.get(key)
    text = field.description if field is not None else None
    return f": {' '.join(text.split())}" if text else ""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def first_difference(a: Any, b: Any, path: str) -> str:
    """Where two values differ first, by dotted key, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if canonical(a.get(key)) != canonical(b.get(key)):
                return first_difference(a.get(key), b.get(key), f"{path}.{key}")
    return f"{path}: {a!r} there, {b!r} here"
