"""The YAML that mergekit reads, as it is published: models, slices or modules, and settings.

Unknown keys are ignored, as mergekit does, but each is reported with what was probably meant. A
setting is a number (or text), a gradient (a list of them over the layers), or such values with
filters on tensor names. A model is `path[@revision][+adapter[@revision]]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.spec import sentence

Scalar = bool | int | float | str
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Part(BaseModel):
    """Any mapping of the file: frozen, and with its unknown keys kept for the report."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Condition(Part):
    """A value, or one for each point of a gradient, for the tensors that a filter finds."""

    value: tuple[Scalar, ...] | Scalar
    """One value, or a gradient over the layers of the slice."""
    filter: str | None = None
    """Part of the names of the tensors that it is for; all of them when absent or `*`."""


def _conditions(value: Any) -> Any:
    """Every form of a setting as a list of conditions."""
    if isinstance(value, Condition | dict):
        return [value]
    if isinstance(value, bool | int | float | str):
        return [{"value": value}]
    if isinstance(value, list | tuple):
        if all(isinstance(one, bool | int | float | str) for one in value):
            return [{"value": value}] if value else []
        if all(isinstance(one, Condition | dict) for one in value):
            return value
    raise ValueError("must be a number, a list of numbers, or a list of {filter, value}")


Setting = Annotated[tuple[Condition, ...], BeforeValidator(_conditions)]
Settings = dict[str, Setting]


def _file(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path, at, revision = value.partition("@")
    if "@" in revision:
        raise ValueError(f"{value!r} has more than one '@'; write path@revision")
    if not path:
        raise ValueError(f"{value!r} names no model")
    return {"path": path, "revision": revision or None} if at else {"path": path}


class Files(Part):
    """A local folder or a hub id, and perhaps a revision of it."""

    path: str
    """Local folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def _reference(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    model, *lora = value.split("+")
    if len(lora) > 1:
        raise ValueError(f"{value!r} has more than one '+'; write model+adapter")
    return {"model": model, **({"lora": lora[0]} if lora else {})}


PlainFiles = Annotated[Files, BeforeValidator(_file)]


class Reference(Part):
    """A model, perhaps with a LoRA adapter on it."""

    model: PlainFiles
    """The model."""
    lora: PlainFiles | None = None
    """The adapter."""
    override_architecture: str | None = None
    """Of no effect here: tensors are merged by name, whatever class owns them."""

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and str(self) == str(other)


Ref = Annotated[Reference, BeforeValidator(_reference)]


class Input(Part):
    """A whole model that is merged."""

    model: Ref
    """The model."""
    parameters: Settings | None = None
    """Settings for this model."""


class SliceInput(Input):
    """Some layers of a model."""

    layer_range: tuple[int, int]
    """First layer, and the one after the last."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        first, end = self.layer_range
        if not 0 <= first < end:
            raise ValueError(f"layer_range [{first}, {end}] holds no layers; write [first, end)")
        return self


class OutputSlice(Part):
    """Layers of the output, from as many layers of each source."""

    sources: tuple[SliceInput, ...]
    """Where the layers come from."""
    base_model: Ref | None = None
    """The base of this slice, when another than the whole merge's."""
    residual_weight: float | None = None
    """Of no effect, in mergekit neither."""
    parameters: Settings | None = None
    """Settings for this slice."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        lengths = {one.layer_range[1] - one.layer_range[0] for one in self.sources}
        if len(lengths) != 1:
            found = ", ".join(str(list(one.layer_range)) for one in self.sources)
            raise ValueError(
                f"the sources of a slice need equally many layers, layer_range has {found}"
                if lengths
                else "sources is empty; name at least one model"
            )
        return self


class Module(Part):
    """One part of a model that has several, such as an encoder."""

    models: tuple[Input, ...] | None = None
    """Whole models."""
    slices: tuple[OutputSlice, ...] | None = None
    """Layers."""
    parameters: Settings | None = None
    """Settings for this module."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("exactly one of models and slices must be given")
        return self


class TokenRow(Part):
    """A row of zeros, or that of a token of a model."""

    kind: Literal["zero", "model_token"]
    """Which of the two."""
    model: Ref | None = None
    """The model."""
    token: str | None = None
    """Its token."""
    token_id: int | None = None
    """Or the number of that."""

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        given = (self.token is not None) + (self.token_id is not None)
        if self.kind == "model_token" and (self.model is None or given != 1):
            raise ValueError("kind: model_token needs model and one of token and token_id")
        return self


def _row_or_model(value: Any) -> str:
    return "row" if isinstance(value, TokenRow) or "kind" in value else "model"


class Token(Part):
    """Where the row of one token is from."""

    source: (
        Annotated[
            Annotated[TokenRow, Tag("row")] | Annotated[Ref, Tag("model")],
            Discriminator(_row_or_model),
        ]
        | None
    ) = None
    """What the models that lack the token get."""
    force: bool = False
    """Whether those that have it get that too."""


class Tokenizer(Part):
    """What the output's tokenizer is."""

    source: Literal["union", "base"] | Ref = "union"
    """The base's, a model's, or the union of all."""
    tokens: dict[str, Token] | None = None
    """Where the embeddings of single tokens come from."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Rows of the embedding are padded to a multiple of this."""


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{value!r} is no type of weights{suggest(name, DTYPES)}")
    return name


Dtype = Annotated[str | None, BeforeValidator(_dtype)]


class MergeConfig(Part):
    """One document of the file."""

    merge_method: str
    """Name of the method."""
    models: tuple[Input, ...] | None = None
    """Whole models."""
    slices: tuple[OutputSlice, ...] | None = None
    """Layers."""
    modules: dict[str, Module] | None = None
    """Parts of a model that has several."""
    base_model: Ref | None = None
    """The model that changes are counted from."""
    dtype: Dtype = None
    """Type of the merged weights, when out_dtype does not say."""
    out_dtype: Dtype = None
    """Type of the merged weights; each tensor's own when neither is given."""
    tokenizer_source: Literal["union", "base"] | Ref | None = None
    """The older way to write tokenizer.source."""
    tokenizer: Tokenizer | None = None
    """What the output's tokenizer is; the base's (or first model's) when not given."""
    chat_template: str | None = None
    """auto, or the template."""
    parameters: Settings | None = None
    """Settings for all."""
    name: str | None = None
    """What later documents of the file call this one's result."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of models, slices and modules must be given; is {found}")
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("give tokenizer or tokenizer_source, not both")
        return self

    def references(self) -> list[Reference]:
        """Every model that the document names, once, in order, the base first."""
        modules = self.modules or {"": self}
        found = [self.base_model] if self.base_model else []
        for module in modules.values():
            found += [one.model for one in module.models or ()]
            for part in module.slices or ():
                found += [one.model for one in part.sources]
                found += [part.base_model] if part.base_model else []
        return list(dict.fromkeys(found))

    def source_of_tokens(self) -> Literal["union", "base"] | Reference | None:
        """What either of the two keys says about the tokenizer."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    def unknown_keys(self) -> Iterator[tuple[str, str]]:
        """Path of every key that means nothing, and a suggestion."""
        yield from _unknown(self, "")


def _unknown(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Part):
        fields = set(type(value).model_fields)
        for key in value.model_extra or {}:
            yield f"{path}{key}", _hint(key, fields)
        for key in type(value).model_fields:
            yield from _unknown(getattr(value, key), f"{path}{key}.")
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _unknown(one, f"{path}{key}.")
    elif isinstance(value, tuple):
        for i, one in enumerate(value):
            yield from _unknown(one, f"{path.removesuffix('.')}[{i}].")


PARAMETERS = ("weight", "density", "t", "normalize", "lambda", "gamma", "epsilon", "rescale")


def _hint(key: str, fields: set[str]) -> str:
    if key in PARAMETERS and "parameters" in fields:
        return f"; did you mean 'parameters: {{{key}: ...}}'?"
    if key == "revision":
        return "; did you mean 'model: path@revision'?"
    hint = suggest(key, fields)
    return hint if "did you mean" in hint else ""


def read_config(file: Path) -> list[MergeConfig]:
    """The documents of a YAML file, one as a rule.

    Raises InputError naming file and key for what cannot be read as mergekit would.
    """
    try:
        documents = [one for one in yaml.safe_load_all(file.read_text("utf-8")) if one is not None]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is not text"
        raise InputError(f"{file}{line}: not YAML ({reason})") from None
    if not documents:
        raise InputError(f"{file} is empty; it needs merge_method and models")
    configs = [parse_config(one, where(file, i, len(documents))) for i, one in enumerate(documents)]
    for i, config in enumerate(configs[:-1]):
        if not config.name:
            raise InputError(
                f"{where(file, i, len(configs))}: 'name' is missing; every document but the last "
                "needs one, by which later documents use its result"
            )
    return configs


def where(file: Path, number: int, count: int) -> str:
    """How messages call one document of a file."""
    return str(file) if count == 1 else f"{file} document {number + 1}"


def parse_config(values: Any, place: str) -> MergeConfig:
    """One document; raises InputError that starts with `place`."""
    if not isinstance(values, dict):
        raise InputError(f"{place}: must be a mapping with merge_method and models")
    try:
        return MergeConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(sentence(error, place, MergeConfig)) from None
