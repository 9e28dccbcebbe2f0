"""Low-rank deltas: PEFT LoRA adapters, on disk unchanged, as exact vectors in memory.

A change is `factor * scaling * B @ A` per module, with scaling alpha / r (LoRA, Hu et al. 2021,
section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023), and with DoRA (Liu et al. 2024)
multiples of the base's rows beside it. Sums concatenate the factors, so they stay exact and
low-rank; nothing is densified until `to_dense` asks for one tensor, and a rank is cut only by
`truncate`. What an adapter holds beside its factors (trained biases, modules saved whole) is a
dense change of those tensors, kept with the factors through every sum.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._factors import Factors
from deltaloom.core.deltas._reading import (
    CONFIG,
    WEIGHTS,
    WholeChange,
    known_as,
    read_adapter,
    read_factors,
)
from deltaloom.core.deltas._writing import write_adapter
from deltaloom.core.deltas.dense import Change, Dense, HeldChange
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Factors", "LowRank", "Reduced", "read_factors"]

D = TypeVar("D", bound=Delta, covariant=True)


class Reduced(NamedTuple, Generic[D]):
    """A smaller delta and how much of the change it kept."""

    delta: D
    kept: dict[str, float]
    """Per tensor, the part of the squared Frobenius norm that is left, 0 to 1."""


class LowRank(Delta):
    """Factors per tensor of the base, and a dense change of the tensors that have none."""

    kind = "lowrank"

    def __init__(
        self,
        base: Base,
        factors: dict[str, Factors],
        folder: Path | None = None,
        rest: Dense | None = None,
        task: str | None = None,
    ):
        super().__init__(base)
        self.factors = factors
        self.folder = folder
        """The PEFT adapter folder this is, unchanged; None once arithmetic made it another."""
        self.rest = rest or Dense(base, ())
        """Trained biases and modules held whole."""
        self.task = task
        """PEFT's task type, None when it is not known or the terms of a sum differ in it."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> LowRank:
        """Read a PEFT LoRA adapter; raises InputError naming what is not covered.

        Covers LoRA, rsLoRA and DoRA, trained biases, and modules saved whole; a module that the
        base does not have (a classifier) counts from zero. Also raises InputError when the adapter
        does not fit the base's tensors.
        """
        tensors = TensorFolder(base.folder)
        found = read_adapter(folder, tensors)
        terms: list[tuple[float, Change]] = []
        if found.added:
            terms.append((1.0, HeldChange(found.added)))
        if found.whole:
            terms.append((1.0, WholeChange(found.tensors, found.whole, tensors)))
        return cls(base, found.factors, folder, Dense(base, tuple(terms)), found.task)

    @property
    def plain(self) -> bool:
        """Whether products of factors are the whole change: no DoRA, bias or module held whole."""
        return not self.rest.terms and all(own.plain for own in self.factors.values())

    def names(self) -> list[str]:
        """Tensors with factors, and those changed densely."""
        return sorted({*self.factors, *self.rest.names()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.factors[name].shape if name in self.factors else self.rest.shape(name)

    def to_dense(self, name: str) -> Tensor:
        """`scale * B @ A` and what else there is of the tensor, in the base's layout, float32."""
        change = None
        if name in self.factors:
            own = self._settled(name)
            change = own.dense(None if own.plain else self._weight(name))
        if name in self.rest.names():
            held = self.rest.to_dense(name)
            change = held if change is None else change + held
        if change is None:
            raise KeyError(name)
        return change

    def __mul__(self, factor: float) -> LowRank:
        if factor == 1.0:
            return LowRank(self.base, self.factors, self.folder, self.rest, self.task)
        scaled = {name: self._settled(name).times(factor) for name in self.factors}
        return LowRank(self.base, scaled, None, self.rest * factor, self.task)

    def __add__(self, other: Delta) -> Delta:
        self.same_base(other)
        if not isinstance(other, LowRank):
            return Dense(self.base, ((1.0, self),)) + other
        both = {name: self._settled(name) for name in self.factors}
        for name in other.factors:
            own = other._settled(name)
            both[name] = both[name].joined(own) if name in both else own
        task = self.task if self.task == other.task else None
        rest = Dense(self.base, (*self.rest.terms, *other.rest.terms))
        return LowRank(self.base, both, None, rest, task)

    def dot(self, other: Delta) -> float:
        """Inner product; with another low-rank delta, through the factors where both have them."""
        if not isinstance(other, LowRank):
            return super().dot(other)
        self.same_base(other)
        total = 0.0
        for name in sorted({*self.names()} & {*other.names()}):
            mine, theirs = self._plain(name), other._plain(name)
            if mine is not None and theirs is not None:
                total += mine.dot(theirs)
            else:
                products = self.to_dense(name).double() * other.to_dense(name).double()
                total += float(products.sum())
        return total

    def truncate(self, rank: int) -> Reduced[LowRank]:
        """The nearest delta, module by module, whose factors have at most `rank`.

        Nearest in the Frobenius norm (Eckart and Young 1936), by an SVD through the factors: the
        cost is that of the ranks, not of the weights. Multiples of the base's rows (DoRA), biases
        and modules held whole stay as they are and do not count in the energy kept. Modules that
        have no higher rank are left alone. Raises InputError for a rank below one.
        """
        if rank < 1:
            raise InputError(f"rank = {rank}: give at least 1")
        kept = dict.fromkeys(sorted(self.factors), 1.0)
        if all(own.a.shape[0] <= rank for own in self.factors.values()):
            return Reduced(self, kept)
        factors = {name: self._settled(name) for name in kept}
        for name, own in factors.items():
            if own.a.shape[0] > rank:
                factors[name], kept[name] = own.truncated(rank)
        return Reduced(LowRank(self.base, factors, None, self.rest, self.task), kept)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder; an adapter that arithmetic has not touched is copied.

        Raises InputError for a change that no PEFT adapter can say.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            self._write(folder)
        elif self.folder.resolve() != folder.resolve():
            for name in (WEIGHTS, CONFIG):
                with new_file(folder / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the adapter attached by PEFT.

        Adding it to the weights would be another model where modules are tied: an adapter on an
        embedding leaves the output head that shares its weight as it is. Raises InputError for
        modules that the base does not have, which PEFT would leave out in silence.
        """
        from peft import PeftModel

        model = base.load(new_head=True)
        state = model.state_dict()
        for name in self.rest.names():
            # a bias beside B is PEFT's alone
            beside = name.endswith(".bias") and f"{name[:-5]}.weight" in self.factors
            if name not in state and not beside:
                raise InputError(f"the delta changes {name}, which {base.model} does not have")
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder or Path(scratch)
            if self.folder is None:
                self._write(folder)
            return PeftModel.from_pretrained(model, folder).eval()  # pyright: ignore

    def _write(self, folder: Path) -> None:
        rest = {*self.rest.names()}
        factors = {name: self._settled(name) for name in self.factors if name not in rest}
        whole = {name: self.to_dense(name) for name in sorted(rest)}
        write_adapter(folder, factors, whole, self._weights, self.base.model, self.task)

    def _settled(self, name: str) -> Factors:
        own = self.factors[name]
        return own if own.magnitude is None else own.settled(self._weight(name))

    def _plain(self, name: str) -> Factors | None:
        own = self.factors.get(name)
        return own if own and own.plain and name not in self.rest.names() else None

    def _weight(self, name: str) -> Tensor:
        own = known_as(name, self._weights)
        if own is None:
            raise InputError(f"{self.base.model} has no tensor {name}")
        return self._weights.read(own)

    @cached_property
    def _weights(self) -> TensorFolder:
        return TensorFolder(self.base.folder)
