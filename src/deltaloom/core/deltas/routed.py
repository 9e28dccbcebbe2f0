"""Routed deltas: experts and the routers that choose between them by the input, a PEFT adapter.

Of a delta's algebra this has names, `save`, `load` and `apply`: which change a weight gets depends
on the input, so there is no dense change, no sum, no multiple and no inner product.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import WEIGHTS, known_as
from deltaloom.core.deltas._writing import copy_adapter
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

EXPERT = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.routed_experts\.\d+"
    r"(?P<tensor>(\.[^.]+)*?)(\.(a|b|scale)|\.(?P<whole>[^.]+))$"
)


class Routed(Delta):
    """A routed model's adapter folder."""

    kind = "routed"

    def __init__(self, base: Base, folder: Path) -> None:
        super().__init__(base)
        self.folder = folder
        """The adapter folder this is."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> Routed:
        """A folder that PEFT or `save` wrote; raises InputError when it does not fit the base."""
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
        found = cls(base, folder)
        with TensorFolder(base.folder) as own:
            absent = [name for name in found.names() if known_as(name, own) is None]
        if absent:
            raise InputError(
                f"{folder}: routes {absent[0]}, which {base.model} does not have; "
                "name the base that its experts were tuned from"
            )
        return found

    def names(self) -> list[str]:
        """Tensors of the base that an expert changes or replaces."""
        with TensorFolder(self.folder / WEIGHTS) as stored:
            matches = [match for key in stored if (match := EXPERT.match(key))]
        return sorted({f"{m['module']}{m['tensor']}.{m['whole'] or 'weight'}" for m in matches})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        with TensorFolder(self.base.folder) as own:
            stored = known_as(name, own)
            if stored is None:
                raise KeyError(name)
            return own[stored].shape

    def to_dense(self, name: str) -> Tensor:
        """Refused with InputError."""
        raise self._refusal("turned into a change of weights")

    def __mul__(self, factor: float) -> Routed:
        if factor == 1.0:
            return self
        raise self._refusal(f"multiplied by {factor}")

    def __add__(self, other: Delta) -> Delta:
        raise self._refusal("added to another delta")

    def save(self, folder: Path) -> None:
        """Copy the adapter folder's config and weights."""
        copy_adapter(self.folder, folder)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with its modules routed, a PeftModel."""
        from peft import PeftModel

        import deltaloom.core.adapters  # noqa: F401  (makes the kind known to PEFT)

        return PeftModel.from_pretrained(base.load(), self.folder).eval()  # pyright: ignore

    def _refusal(self, what: str) -> InputError:
        return InputError(
            f"{self.folder}: a routed delta chooses between its experts by the input, so it cannot "
            f"be {what}; merge the deltas that it was made of"
        )
