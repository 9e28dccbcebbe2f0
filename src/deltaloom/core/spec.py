"""Spec: frozen, typed, documented settings that refuse unknown keys in one clear sentence."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from deltaloom.core.errors import InputError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

WANTED = {
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
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

    # Pydantic's own `use_attribute_docstrings` reads every class's source when it is defined: a
    # tenth of the start of a command, for texts that few commands show.
    # What is not finite has no place in a record, which is JSON.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Validate `values`; raises InputError naming `where`, the key and the remedy."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(sentence(error, where, cls)) from None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        for key, shape in handler.resolve_ref_schema(schema).get("properties", {}).items():
            text = docstrings(cls).get(key)
            if text:
                shape.setdefault("description", text)
        return schema

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
    if first["type"] == "list_type" and isinstance(first["input"], str):
        reason += f", such as [{first['input']}]"
    if first["type"] == "too_short":
        reason = f"must have {first.get('ctx', {}).get('min_length', 1)} or more"
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
    text = explain(cls, key) if key in cls.model_fields else ""
    return f": {text}" if text else ""


def explain(cls: type[BaseModel], key: str) -> str:
    """What the field `key` is for, one line from its docstring; empty when it has none."""
    return " ".join((cls.model_fields[key].description or docstrings(cls).get(key, "")).split())


@cache
def docstrings(cls: type[BaseModel]) -> dict[str, str]:
    """The text under each annotated name of a class and of the classes that it comes from."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[: cls.__mro__.index(BaseModel)]):
        try:
            path = inspect.getsourcefile(owner)
        except (OSError, TypeError):  # a class typed at a prompt has no source
            continue
        if path:
            found.update(_texts(path).get(owner.__qualname__, {}))
    return found


@cache
def _texts(path: str) -> dict[str, dict[str, str]]:
    """Class -> annotated name -> the text under it, of one source file."""
    found: dict[str, dict[str, str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = dict(_pairs(node.body))
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                visit(node.body, f"{prefix}{node.name}.<locals>.")

    visit(ast.parse(Path(path).read_text(encoding="utf-8")).body, "")
    return found


def _pairs(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node, after in pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            yield node.target.id, inspect.cleandoc(after.value.value)


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
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            if canonical(one) != canonical(other):
                return first_difference(one, other, f"{path}.{i}")
    return f"{path}: {a!r} there, {b!r} here"
