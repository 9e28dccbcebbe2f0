"""Sparse deltas: a few elements per tensor, by flat index and value.

Sums hold the union of both supports, so they are exact and stay sparse; an element that cancels
stays as a zero. On disk one safetensors file holds `NAME.indices` (int32, int64 from 2^31 elements
on) and `NAME.values` (float32): eight bytes an element, with the shapes in the file's metadata.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas.dense import Dense, add_to_model
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

STORED = "sparse.safetensors"


@dataclass(frozen=True)
class Elements:
    """The changed elements of one tensor."""

    indices: Tensor
    """(n,) int64, flat and row-major, rising, each once."""
    values: Tensor
    """(n,) float32."""
    shape: tuple[int, ...]
    """Shape of the base's tensor."""

    def dense(self) -> Tensor:
        """The change in the base's shape, float32."""
        import torch

        flat = torch.zeros(math.prod(self.shape))
        flat[self.indices] = self.values
        return flat.reshape(self.shape)

    def joined(self, other: Elements) -> Elements:
        """Both changes, over the union of their elements."""
        import torch

        both = torch.cat([self.indices, other.indices])
        indices, places = torch.unique(both, return_inverse=True)  # sorted
        values = torch.zeros(len(indices))
        mine = len(self.indices)
        values[places[:mine]] = self.values
        values[places[mine:]] += other.values
        return Elements(indices, values, self.shape)

    def dot(self, other: Elements) -> float:
        """Inner product over the elements that both change, in float64."""
        import torch

        if len(self.indices) == 0 or len(other.indices) == 0:
            return 0.0
        places = torch.searchsorted(other.indices, self.indices).clamp_max(len(other.indices) - 1)
        both = other.indices[places] == self.indices
        return float((self.values[both].double() * other.values[places[both]].double()).sum())


class Sparse(Delta):
    """Changed elements per tensor of the base."""

    kind = "sparse"

    def __init__(self, base: Base, elements: dict[str, Elements]) -> None:
        super().__init__(base)
        self.elements = elements

    @classmethod
    def load(cls, folder: Path, base: Base) -> Sparse:
        """The delta that `save` wrote; raises InputError when it is broken or does not fit."""
        file = folder / STORED
        with TensorFolder(file) as tensors, TensorFolder(base.folder) as own:
            try:
                shapes = {
                    str(name): tuple(int(side) for side in shape)
                    for name, shape in json.loads(tensors.metadata["shapes"]).items()
                }
                pairs = {
                    name: (tensors.read(f"{name}.indices").long(), tensors.read(f"{name}.values"))
                    for name in shapes
                }
            except (KeyError, ValueError, TypeError, AttributeError):
                raise InputError(f"{file}: is not a sparse delta; write it again") from None
            found = {}
            for name, (indices, values) in pairs.items():
                if name in own and own[name].shape != shapes[name]:
                    raise InputError(
                        f"{file}: {name} has shape {list(shapes[name])}, the base {base.model} "
                        f"{list(own[name].shape)}; name the base it was made from"
                    )
                found[name] = Elements(indices, values.float(), shapes[name])
                _check(file, name, found[name])
        return cls(base, found)

    def names(self) -> list[str]:
        """Tensors with changed elements."""
        return sorted(self.elements)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.elements[name].shape

    def to_dense(self, name: str) -> Tensor:
        """The change in the base's shape, float32, zero elsewhere."""
        return self.elements[name].dense()

    def __mul__(self, factor: float) -> Sparse:
        scaled = {n: replace(own, values=own.values * factor) for n, own in self.elements.items()}
        return Sparse(self.base, scaled)

    def __add__(self, other: Delta) -> Delta:
        self.same_base(other)
        if not isinstance(other, Sparse):
            return Dense(self.base, ((1.0, self),)) + other
        both = {**self.elements, **other.elements}
        for name in self.elements.keys() & other.elements.keys():
            both[name] = self.elements[name].joined(other.elements[name])
        return Sparse(self.base, both)

    def dot(self, other: Delta) -> float:
        """Inner product, in float64; only the other's elements at this support are looked at."""
        self.same_base(other)
        total = 0.0
        for name in sorted({*self.names()} & {*other.names()}):
            own = self.elements[name]
            if isinstance(other, Sparse):
                total += own.dot(other.elements[name])
            else:
                theirs = other.to_dense(name).flatten()[own.indices].double()
                total += float((own.values.double() * theirs).sum())
        return total

    def save(self, folder: Path) -> None:
        """Write indices and values to `sparse.safetensors`, beside `delta.json`."""
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, own in self.elements.items():
            wide = math.prod(own.shape) > torch.iinfo(torch.int32).max
            tensors[f"{name}.indices"] = own.indices if wide else own.indices.int()
            tensors[f"{name}.values"] = own.values.contiguous()
        shapes = {name: list(own.shape) for name, own in sorted(self.elements.items())}
        with new_file(folder / STORED) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "shapes": json.dumps(shapes)})
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the change added in float32."""
        return add_to_model(base, self)


def _check(file: Path, name: str, own: Elements) -> None:
    indices = own.indices
    rising = len(indices) < 2 or bool((indices[1:] > indices[:-1]).all())
    inside = len(indices) == 0 or (indices[0] >= 0 and indices[-1] < math.prod(own.shape))
    if len(own.values) != len(indices) or not (rising and inside):
        raise InputError(
            f"{file}: the indices of {name} are not rising, outside {list(own.shape)}, or not as "
            "many as its values; copy the file again"
        )
