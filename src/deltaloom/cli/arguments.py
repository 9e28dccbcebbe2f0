"""`key=value` words of the shell as the mapping that YAML would give."""

from __future__ import annotations

from typing import Any

import yaml

from deltaloom.core.errors import InputError
from deltaloom.recipe.parsing import assign

PLAIN = (str, int, float, bool, list, dict, type(None))


def parse_pairs(words: list[str] | None) -> dict[str, Any]:
    """Parse words; dotted keys stay as they are: a recipe reads them as `step.key`.

    Raises InputError for a word without `=` and for a key given twice.
    """
    pairs: dict[str, Any] = {}
    for word in words or []:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(f"{word!r}: settings are written key=value")
        if key in pairs:
            raise InputError(f"{key}: given twice")
        pairs[key] = parse_value(text)
    return pairs


def parse_value(text: str) -> Any:
    """A value as YAML reads it; what YAML cannot read, or reads as a date, is plain text.

    A text is kept to the letter: a word of the shell has no comments (`rows #2.jsonl`), and a space
    before it was meant (`indicator=' [IND]'`).
    """
    if text[:1].isspace() or text.startswith("#"):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    unquoted = isinstance(value, str) and text[0] not in "\"'|>&!"
    return value if isinstance(value, PLAIN) and not unquoted else text


def nest(pairs: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for key, value in pairs.items():
        assign(nested, key, value)
    return nested
