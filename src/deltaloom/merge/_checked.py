"""A merge by mergekit's YAML as far as it can be checked without the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from deltaloom.core.errors import InputError, suggest
from deltaloom.merge._compat import build
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_sums import CompatScale
from deltaloom.merge._config import MergeConfig, Reference
from deltaloom.merge._dialect import Dialect, dialect
from deltaloom.merge._resolve import (
    Slice,
    Source,
    shared_values,
    slices_of,
    source_values,
    unknown_settings,
)
from deltaloom.merge._rule import Rule
from deltaloom.merge._vocabulary import check_template
from deltaloom.merge.passthrough import PassthroughRule

GENERIC = "model.norm.weight"
"""A tensor's name for settings that are checked before files are."""
Precision = Literal["mergekit", "float32"]
SINGLE = Numbers("float32")
Values = tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]
"""Settings for all models; and of each by name."""


@dataclass(frozen=True)
class Checked:
    """One document that is right as far as can be told without the models."""

    config: MergeConfig
    place: str
    dialect: Dialect
    parts: list[Slice]
    notes: list[str]
    precision: Precision = "mergekit"
    """Whether steps are rounded as in mergekit, or all is float32 and rounded once."""

    def base(self, part: Slice) -> Reference | None:
        """What a slice is merged over, if the method takes a base."""
        return None if self.dialect.base == "ignored" else part.base

    def merged(self, part: Slice) -> list[tuple[int, Source]]:
        """The sources of a slice that its rule gets, in its order, each with its number."""
        base, every = self.base(part), list(enumerate(part.sources))
        others = [one for one in every if one[1].model != base]
        if not others or (self.dialect.ends and base):
            return [one for one in every if one[1].model == base] + others
        return others

    def values(self, part: Slice, names: tuple[str, ...], out: str, t: float) -> Values:
        """Settings of one tensor: for all models, and for each that has some of its own."""
        shared = shared_values(self.dialect.shared, part, out, t, self.place)
        base, each = self.base(part), []
        for source, name in zip(part.sources, names, strict=True):
            if source.model != base:
                own = source_values(self.dialect.own, part, source, name, t, self.place)
                each.append((str(source.model), own))
        return shared, each

    def rule(self, part: Slice, values: Values, seed: int, numbers: Numbers = SINGLE) -> Rule:
        """The rule for one tensor whose inputs have the format `numbers`."""
        shared, each = values
        if not each:  # nothing but the base
            compatible = self.precision == "mergekit"
            return CompatScale(numbers, None) if compatible else PassthroughRule(1.0)
        for name, own in each:
            if not 0 <= own.get("density", 1.0) <= 1:
                raise InputError(
                    f"{self.place}: {name}: density = {own['density']:g} must be from 0 to 1"
                )
        settings = [own for _, own in each]
        try:
            method, base = self.config.merge_method, self.base(part) is not None
            if self.precision == "mergekit":
                return build(method, shared, settings, base, seed, numbers)
            return self.dialect.build(method, shared, settings, base, seed)
        except InputError as error:
            raise InputError(f"{self.place}: {error}") from None

    def samples(self, parts: list[Slice] | None = None) -> Iterator[tuple[str, Values]]:
        """Settings at the ends and in the middle of the layers, for names that filters find."""
        for part in parts or self.parts:
            scopes = (*part.scopes, *(source.parameters for source in part.sources))
            every = [c for scope in scopes for one in (scope or {}).values() for c in one]
            filters = {str(c.filter) for c in every if c.filter not in (None, "*")}
            for name in (GENERIC, *sorted(filters)):
                which = f"tensors with {name!r}" if name in filters else "other tensors"
                for t in (0.0, 0.5, 1.0):
                    names = (name,) * len(part.sources)
                    yield f"{which} at t = {t}", self.values(part, names, name, t)

    @property
    def dtype(self) -> str | None:
        """Type of the output."""
        return self.config.out_dtype or self.config.dtype


def check(config: MergeConfig, place: str, precision: Precision = "mergekit") -> Checked:
    """Check all that does not need the models; raises InputError naming file and key."""
    method = dialect(config.merge_method, place)
    notes = [f"unknown key {path!r} is ignored{hint}" for path, hint in config.unknown_keys()]
    parts = slices_of(config, place)
    known = {one.name for one in method.parameters}
    for path, name in unknown_settings(config, parts, known):
        hint = suggest(name, known)
        hint = hint if "did you mean" in hint else ""
        notes.append(f"{path} means nothing to {config.merge_method} and is ignored{hint}")
    checked = Checked(config, place, method, parts, notes, precision)
    _check_models(checked)
    for part in parts:
        for _, values in checked.samples([part]):
            checked.rule(part, values, 0)
    _check_counts(checked)
    _check_tokens(checked)
    return checked


def _check_models(checked: Checked) -> None:
    method, place = checked.config.merge_method, checked.place
    for i, part in enumerate(checked.parts):
        if checked.dialect.base == "required" and part.base is None:
            hint = "".join(f"; {note}" for note in checked.notes[:1])
            raise InputError(f"{place}: base_model is missing, and {method} needs one{hint}")
        base = checked.base(part)
        if base and base not in [source.model for source in part.sources]:
            raise InputError(
                f"{place}: slices[{i}].sources lacks base_model {base}; list its layers too"
            )
    forms = {
        (len(checked.merged(p)), len(p.sources) == 1, checked.base(p) is None)
        for p in checked.parts
    }
    if len(forms) > 1:
        raise InputError(f"{place}: slices with different numbers of sources are not supported")


def _check_counts(checked: Checked) -> None:
    low, high = checked.dialect.least, checked.dialect.most
    for part in checked.parts:
        base = checked.base(part)
        count = len([source for source in part.sources if source.model != base])
        if count < low or (high is not None and count > high):
            wanted = f"{low}" if low == high else f"{low} or more"
            beside = " beside base_model" if base else ""
            raise InputError(
                f"{checked.place}: merge_method {checked.config.merge_method} needs {wanted} "
                f"{'model' if high == 1 else 'models'}{beside}; got {count}"
            )


def _check_tokens(checked: Checked) -> None:
    config, place = checked.config, checked.place
    if config.source_of_tokens() == "base" and config.base_model is None:
        raise InputError(f"{place}: tokenizer_source base needs base_model")
    if config.chat_template:
        check_template(config.chat_template, place)
