"""Dense deltas: a weighted sum of whole changes, kept lazy so that models never pile up in memory.

A term is a tuned model's folder (its change is model minus base), a folder of stored changes, or
any other delta. Tensors are read one at a time when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import WholeChange
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

STORED = "delta.safetensors"


class Change(Protocol):
    """Something that knows a change tensor by tensor; every Delta is one."""

    def names(self) -> list[str]: ...  # noqa: D102

    def shape(self, name: str) -> tuple[int, ...]: ...  # noqa: D102

    def to_dense(self, name: str) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class HeldChange:
    """Changes in memory, float32."""

    tensors: Mapping[str, Tensor]

    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self.tensors[name].shape)

    def to_dense(self, name: str) -> Tensor:
        """The change as it is held."""
        return self.tensors[name]


@dataclass(frozen=True)
class StoredChange:
    """Changes read from one safetensors file."""

    tensors: TensorFolder

    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self.tensors[name].shape

    def to_dense(self, name: str) -> Tensor:
        """The stored change as float32."""
        return self.tensors.read(name).float()


@dataclass(frozen=True)
class ModelChange:
    """A tuned model's folder minus its base, under the base's names."""

    tuned: TensorFolder
    base: TensorFolder
    twins: Mapping[str, str] = field(default_factory=dict)
    """Base name -> tuned name, where tied weights are stored under the other's name."""

    def names(self) -> list[str]:
        """Floating point tensors of the tuned model."""
        own = {theirs: ours for ours, theirs in self.twins.items()}
        return sorted(own.get(n, n) for n, entry in self.tuned.items() if "F" in entry.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self.tuned[self.twins.get(name, name)].shape

    def to_dense(self, name: str) -> Tensor:
        """Tuned minus base, in float32."""
        tuned = self.tuned.read(self.twins.get(name, name))
        return tuned.float() - self.base.read(name).float()


class Dense(Delta):
    """A weighted sum of changes."""

    kind = "dense"

    def __init__(
        self, base: Base, terms: tuple[tuple[float, Change], ...], folder: Path | None = None
    ) -> None:
        super().__init__(base)
        self.terms = terms
        self.folder = folder
        """The model folder this is, unchanged; None once arithmetic made it another."""

    @classmethod
    def from_model(cls, folder: Path, base: Base) -> Dense:
        """The delta that turns `base` into the model in `folder`.

        Raises InputError when their tensors differ in name or shape. A sequence classifier has a
        head that its base may lack, which counts from zero, and its name before the base's names.
        """
        tuned, own = TensorFolder(folder), TensorFolder(base.folder)
        if base.labels:
            keys = {name: name for name, entry in tuned.items() if "F" in entry.dtype}
            return cls(base, ((1.0, WholeChange(tuned, keys, own)),), folder)
        change = ModelChange(tuned, own, _twins(tuned, own, base))
        for name in change.names():
            if name not in own:
                raise InputError(f"{folder}: tensor {name} is not in the base {base.model}")
            if change.shape(name) != own[name].shape:
                raise InputError(
                    f"{folder}: tensor {name} has shape {list(change.shape(name))}, the base "
                    f"{base.model} {list(own[name].shape)}"
                )
        return cls(base, ((1.0, change),), folder)

    @classmethod
    def load(cls, folder: Path, base: Base) -> Dense:
        """The delta that `save` wrote."""
        return cls(base, ((1.0, StoredChange(TensorFolder(folder / STORED))),))

    def names(self) -> list[str]:
        """Tensors that any term changes."""
        return sorted({name for _, change in self.terms for name in change.names()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self._holding(name)[0][1].shape(name)

    def to_dense(self, name: str) -> Tensor:
        """The weighted sum for one tensor, float32."""
        total: Tensor | None = None
        for factor, change in self._holding(name):
            part = change.to_dense(name)
            part = part if factor == 1.0 else part * factor
            total = part if total is None else total + part
        assert total is not None
        return total

    def __mul__(self, factor: float) -> Dense:
        scaled = tuple((factor * own, change) for own, change in self.terms)
        return Dense(self.base, scaled, self.folder if factor == 1.0 else None)

    def __add__(self, other: Delta) -> Dense:
        self.same_base(other)
        theirs = other.terms if isinstance(other, Dense) else ((1.0, other),)
        return Dense(self.base, (*self.terms, *theirs))

    def save(self, folder: Path) -> None:
        """Write the changes as float32 to `delta.safetensors`, beside `delta.json`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / STORED) as temporary:
            save_file({name: self.to_dense(name).contiguous() for name in self.names()}, temporary)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """The model: loaded as it is when it is a folder, else added to `base` in float32."""
        if self.folder is not None:
            return base.model_copy(update={"model": str(self.folder), "revision": None}).load()
        return add_to_model(base, self)

    def _holding(self, name: str) -> list[tuple[float, Change]]:
        found = [(factor, change) for factor, change in self.terms if name in {*change.names()}]
        if not found:
            raise KeyError(name)
        return found


def _twins(tuned: TensorFolder, own: TensorFolder, base: Base) -> dict[str, str]:
    """A tied pair is one tensor under either name: `lm_head.weight` or the embedding's."""
    new, gone = sorted(set(tuned) - set(own)), sorted(set(own) - set(tuned))
    tied = base.config().get("tie_word_embeddings", True)
    return {gone[0]: new[0]} if tied and len(new) == len(gone) == 1 else {}


def add_to_model(base: Base, delta: Delta) -> PreTrainedModel:
    """Load `base` and add `delta` to its parameters.

    Raises InputError for a change of a tensor that the base lacks or only shares with another, and
    for a quantised base.
    """
    import torch

    base.refuse_change()
    model = base.load()
    state = model.state_dict()
    with torch.no_grad(), TensorFolder(base.folder) as stored:
        for name in delta.names():
            if name not in state:
                raise InputError(f"the delta changes {name}, which {base.model} does not have")
            own = state[name]
            twins = [n for n in state if n != name and state[n].data_ptr() == own.data_ptr()]
            if twins and name not in stored:
                raise InputError(
                    f"the delta changes {name}, which {base.model} ties to {twins[0]}: adding it "
                    "would change both; untie the base's embeddings first"
                )
            change = delta.to_dense(name).to(own.device)
            own.copy_((own.float() + change).to(own.dtype))
    return model
