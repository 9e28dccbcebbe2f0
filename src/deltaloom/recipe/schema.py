"""JSON schema of a recipe, made from the steps' and methods' own fields."""

from __future__ import annotations

from functools import cache
from typing import Any

from deltaloom.core.base import BaseField
from deltaloom.core.registry import Entry, methods
from deltaloom.recipe.steps import STEPS, Spec


class _Head(Spec):
    """The keys a recipe has beside its steps."""

    base: BaseField | None = None
    """Model of every step that names none."""
    seed: int = 0
    """Seed of every step that names none."""


def recipe_schema() -> dict[str, Any]:
    """The schema: one alternative per method, each with the step's and the method's keys."""
    head = _Head.model_json_schema(mode="validation")
    shared: dict[str, Any] = head.pop("$defs", {})
    steps = [_one_step(entry, shared) for entry in methods()]
    head["properties"]["base"] = {
        "anyOf": [{"type": "string"}, *head["properties"]["base"]["anyOf"]]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "deltaloom recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            **head["properties"],
            "steps": {"type": "array", "items": {"anyOf": steps}},
        },
        "$defs": shared,
    }


@cache
def _schema(cls: type[Spec]) -> dict[str, Any]:
    """Made once: methods share their verb's step, and rows of one table share their class."""
    return cls.model_json_schema()


def _one_step(entry: Entry, shared: dict[str, Any]) -> dict[str, Any]:
    step, method = _schema(STEPS[entry.verb]), _schema(entry.load())
    for schema in (step, method):
        shared.update(schema.get("$defs", {}))
    properties = {**step["properties"], **method["properties"]}
    properties["method"] = {"const": entry.name, "description": entry.summary}
    for key, value in entry.preset.items():
        properties[key] = {**properties[key], "default": value}
    # A list of names may be written as one name.
    for key in ("pool", "target", "data", "deltas", "tasks", "base", "evaluate"):
        if key in properties:
            properties[key] = {"anyOf": [{"type": "string"}, properties[key]]}
    required = [key for key in step.get("required", []) if key != "name"]
    required += sorted(STEPS[entry.verb].required - entry.load().optional)
    body = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required,
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [entry.verb],
        "properties": {entry.verb: body},
    }
