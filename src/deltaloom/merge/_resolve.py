"""Which value a setting of mergekit's YAML has for one tensor, by mergekit's published rules.

The nearest scope wins: source, slice, module, whole file. Within one, the first condition counts
whose filter is absent, `*` or part of the tensor's name; where none is, the next scope is asked.
A list is a gradient at t = i / (L - 1) for layer i of the L of its slice (t = 1 for a slice of one
layer) and t = 0 outside the layers: linear between numbers, `values[int(t (n - 1))]` of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deltaloom.core.errors import InputError
from deltaloom.core.spec import WANTED
from deltaloom.merge._config import (
    Condition,
    Input,
    MergeConfig,
    Module,
    Reference,
    Settings,
    SliceInput,
)

REQUIRED = object()
LAYER = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")
"""A tensor of a layer: what comes before the first number in its name, that number, the rest."""


@dataclass(frozen=True)
class Parameter:
    """A setting that a method of mergekit knows."""

    name: str
    kind: type
    default: Any = REQUIRED
    shared: bool = False
    """One for all models, rather than one for each."""

    def checked(self, value: Any) -> Any:
        """`value` as a number, truth value or whole number, texts of such included."""
        return TypeAdapter(self.kind).validate_python(value)


@dataclass(frozen=True)
class Source:
    """One model of a slice."""

    model: Reference
    first: int
    parameters: Settings | None
    key: str
    """Where it stands in the file."""


@dataclass(frozen=True)
class Slice:
    """Layers of the output; the whole of it when `layers` is None."""

    sources: tuple[Source, ...]
    base: Reference | None
    layers: int | None
    scopes: tuple[Settings | None, ...]
    """Settings of the slice, of the module and of the file."""


def slices_of(config: MergeConfig, place: str) -> list[Slice]:
    """The slices of the output; a base missing among `models` is appended, without settings."""
    if config.modules is None:
        given, module, key = config, None, ""
    elif len(config.modules) == 1:
        [(name, module)] = config.modules.items()
        given, key = module, f"modules.{name}."
    else:
        raise InputError(
            f"{place}: modules with {len(config.modules)} entries ({', '.join(config.modules)}) "
            "are not supported; give models, which merges every tensor of the files"
        )
    outer = (module.parameters if isinstance(module, Module) else None, config.parameters)
    if given.models:
        inputs = list(given.models)
        base = config.base_model
        if base and base not in [one.model for one in inputs]:
            inputs.append(Input(model=base))
        sources = _sources(inputs, f"{key}models", place)
        return [Slice(sources, base, None, (None, *outer))]
    found = []
    for i, one in enumerate(given.slices or ()):
        first, end = one.sources[0].layer_range
        sources = _sources(one.sources, f"{key}slices[{i}].sources", place)
        base = one.base_model or config.base_model
        found.append(Slice(sources, base, end - first, (one.parameters, *outer)))
    return found


def _sources(inputs: Sequence[Input], key: str, place: str) -> tuple[Source, ...]:
    sources = []
    for i, one in enumerate(inputs):
        first = one.layer_range[0] if isinstance(one, SliceInput) else 0
        if one.model in [source.model for source in sources]:
            raise InputError(f"{place}: {key}[{i}] lists {one.model} again; list a model once")
        sources.append(Source(one.model, first, one.parameters, f"{key}[{i}]"))
    return tuple(sources)


def shared_values(
    parameters: Iterable[Parameter], part: Slice, tensor: str, t: float, place: str
) -> dict[str, Any]:
    """The settings that are one for all models, for one tensor of the output."""
    values = {}
    for one in parameters:
        found = value_of(one, part.scopes, tensor, t, place)
        if found is REQUIRED:
            wrong = [s.key for s in part.sources if one.name in (s.parameters or {})]
            remedy = (
                f"it is one for all models and does not belong in {wrong[0]}.parameters"
                if wrong
                else f"it has no value for {tensor!r}"
            )
            raise InputError(f"{place}: parameters.{one.name} is missing: {remedy}")
        values[one.name] = found
    return values


def source_values(
    parameters: Iterable[Parameter], part: Slice, source: Source, tensor: str, t: float, place: str
) -> dict[str, Any]:
    """The settings of one model, for one of its tensors."""
    values = {}
    for one in parameters:
        found = value_of(one, (source.parameters, *part.scopes), tensor, t, place)
        if found is REQUIRED:
            given = one.name in (source.parameters or {})
            raise InputError(
                f"{place}: {source.key} ({source.model}) has no parameters.{one.name}"
                + (f" for tensor {tensor!r}: no filter finds it" if given else "")
            )
        values[one.name] = found
    return values


def value_of(
    parameter: Parameter, scopes: Iterable[Settings | None], tensor: str, t: float, place: str
) -> Any:
    """The value of one setting from scopes, nearest first; its default when none has one.

    Raises InputError for a value of the wrong kind.
    """
    for scope in scopes:
        for condition in (scope or {}).get(parameter.name, ()):
            if condition.filter in (None, "*") or str(condition.filter) in tensor:
                try:
                    return _at(condition, parameter, t)
                except ValidationError as error:
                    first = error.errors()[0]
                    wanted = WANTED.get(first["type"])
                    reason = f"must be {wanted}" if wanted else first["msg"]
                    raise InputError(
                        f"{place}: parameters.{parameter.name} = {first['input']!r}: {reason}"
                    ) from None
    return parameter.default


def _at(condition: Condition, parameter: Parameter, t: float) -> Any:
    if not isinstance(condition.value, tuple):
        return parameter.checked(condition.value)
    values = [parameter.checked(value) for value in condition.value]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[int(t * (len(values) - 1))]
    position = t * (len(values) - 1)
    left = int(position)
    right, part = min(left + 1, len(values) - 1), position - left
    return parameter.checked((1 - part) * values[left] + part * values[right])


def place_in(layer: int, layers: int) -> float:
    """The t of a gradient at layer `layer` of `layers`."""
    return layer / (layers - 1) if layers > 1 else 1.0


def unknown_settings(
    config: MergeConfig, parts: Iterable[Slice], known: set[str]
) -> list[tuple[str, str]]:
    """Path and name of every setting that the method does not have."""
    scopes: dict[str, Settings | None] = {"": config.parameters}
    for i, part in enumerate(parts):
        scopes[f"slices[{i}]."] = part.scopes[0]
        scopes |= {f"{source.key}.": source.parameters for source in part.sources}
    for name, module in (config.modules or {}).items():
        scopes[f"modules.{name}."] = module.parameters
    return [
        (f"{path}parameters.{name}", name)
        for path, scope in scopes.items()
        for name in scope or {}
        if name not in known
    ]
