"""Delta: what tuning changed, over a named Base.

A Delta is a vector: it adds, subtracts, scales and has an inner product, whatever its kind. Names
are those of the base's tensors (`model.layers.0.mlp.up_proj.weight`), shapes are the base's.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltaloom.core.base import Base


class Kind(NamedTuple):
    """A kind of adapter that is not low-rank."""

    home: str
    """Module of `core.deltas` and class of its delta."""
    called: str
    """What people call it."""


ADAPTERS = {
    "DELTALOOM_BOTTLENECK": Kind("bottleneck:Bottleneck", "bottleneck"),
    "DELTALOOM_COMPOSITE": Kind("bottleneck:Composite", "composite"),
    "DELTALOOM_ROUTED": Kind("routed:Routed", "routed"),
    "DELTALOOM_SPARSE": Kind("sparse:Sparse", "sparse"),
    "PREFIX_TUNING": Kind("prompt:Prompt", "prefix"),
    "PROMPT_TUNING": Kind("prompt:Prompt", "soft prompt"),
}
"""By PEFT's name; all others are read as low-rank."""
STORED = {
    "trace.safetensors": "trace:Trace",
    "delta.safetensors": "dense:Dense",
    "vocab.safetensors": "vocab:Vocab",
}
"""A file that `Delta.save` writes -> module and class."""


class Delta(ABC):
    """A change to the tensors of `base`."""

    kind: ClassVar[str]

    def __init__(self, base: Base) -> None:
        self.base = base

    @abstractmethod
    def names(self) -> list[str]:
        """Tensors of the base that this changes, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor `name`."""

    @abstractmethod
    def to_dense(self, name: str) -> Tensor:
        """The change of tensor `name`, float32, in the base's shape."""

    @abstractmethod
    def __mul__(self, factor: float) -> Delta:
        """This change `factor` times."""

    @abstractmethod
    def __add__(self, other: Delta) -> Delta:
        """Both changes together; raises InputError when their bases differ."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this delta so that `load` gives it back equal."""

    @abstractmethod
    def apply(self, base: Base) -> PreTrainedModel:
        """`base` loaded with this change."""

    def tokenizer(self, base: Base) -> PreTrainedTokenizerBase:
        """The tokenizer of `base` with this change."""
        return base.tokenizer()

    def __rmul__(self, factor: float) -> Delta:
        return self * factor

    def __neg__(self) -> Delta:
        return self * -1.0

    def __sub__(self, other: Delta) -> Delta:
        return self + other * -1.0

    def dot(self, other: Delta) -> float:
        """Inner product over all tensors, in float64."""
        self.same_base(other)
        shared = sorted({*self.names()} & {*other.names()})
        return float(
            sum(
                (self.to_dense(name).double() * other.to_dense(name).double()).sum()
                for name in shared
            )
        )

    def norm(self) -> float:
        """Euclidean length, the square root of `dot` with itself."""
        return max(self.dot(self), 0.0) ** 0.5

    def same_base(self, other: Delta) -> None:
        """Raise InputError unless both deltas are over the same weights."""
        if self.base == other.base:
            return
        mine, theirs = self.base.fingerprint(), other.base.fingerprint()
        if mine != theirs:
            raise InputError(
                f"deltas of different bases: {self.base.model} ({mine}) and "
                f"{other.base.model} ({theirs}); tune both from one base"
            )


def describe(folder: Path, delta_kind: str, base: Base) -> None:
    """Write `delta.json`, which says what kind of delta a folder holds and over which base."""
    from deltaloom.core.atomic import write_json

    about = {
        "schema": 1,
        "kind": delta_kind,
        "base": {
            "model": base.model,
            "revision": base.revision,
            "fingerprint": base.fingerprint(),
        },
    }
    write_json(folder / "delta.json", about)


def load(name: str | Path, base: Base) -> Delta:
    """The delta in a folder, or in the hub repository `name`, over `base`.

    Knows PEFT adapter folders, whole model folders (the change is model minus base; one that
    `transfer` made of this base is its change of tokenizer) and folders that `Delta.save` wrote.
    Raises InputError when it is none of these, or when its `delta.json`
    names a base of other weights.
    """
    folder = base.model_copy(update={"model": str(name), "revision": None}).folder
    about = _about(folder)
    recorded = about.get("base", {}).get("fingerprint")
    if about.get("kind") == "vocab" and (folder / "config.json").exists():
        if recorded == base.fingerprint():
            return _class("vocab:Vocab").load(folder, base)
        # A model in its own right: over a base with the same tokenizer it is a change like others.
        same_tokens(folder, base)
    elif recorded is not None and recorded != base.fingerprint():
        raise InputError(
            f"{folder}: is a delta over {about['base'].get('model')} ({recorded}), not over "
            f"{base.model} ({base.fingerprint()}); name the base it was tuned from"
        )
    adapter = adapter_kind(folder)
    if adapter is not None:  # LowRank refuses by name what it does not know
        kind = ADAPTERS.get(adapter)
        return _class(kind.home if kind else "lowrank:LowRank").load(folder, base)
    for stored, home in STORED.items():
        if (folder / stored).exists():
            return _class(home).load(folder, base)
    if (folder / "config.json").exists():
        return _class("dense:Dense").from_model(folder, base)
    raise InputError(f"{folder}: neither an adapter, a model nor a delta folder")


def same_tokens(folder: Path, base: Base) -> None:
    """Raise InputError unless the tokenizers of a model folder and of `base` are the same."""
    from deltaloom.core.vocabulary import Vocabulary

    ours, theirs = Vocabulary.read(folder), Vocabulary.read(base.folder)
    if (ours.tokens, ours.special) != (theirs.tokens, theirs.special):
        raise InputError(
            f"{folder} and {base.model} have different tokenizers, so their embeddings' rows do "
            "not belong together; transfer both to one tokenizer first"
        )


def _class(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(f"deltaloom.core.deltas.{module}"), name)


def adapter_kind(folder: Path) -> str | None:
    """PEFT's name of the kind of adapter in `folder` (`LORA`); None where there is no adapter.

    Raises InputError for a config that cannot be read.
    """
    from deltaloom.core.deltas._reading import CONFIG, adapter_config

    return str(adapter_config(folder).get("peft_type")) if (folder / CONFIG).exists() else None


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "delta.json"
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(about, dict) or not isinstance(about.get("base", {}), dict):
        raise InputError(f"{path}: does not say a delta's kind and base; remove the file")
    return about
