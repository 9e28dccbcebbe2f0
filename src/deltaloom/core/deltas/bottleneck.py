"""Bottleneck adapters: modules beside the base's, on disk as PEFT has them.

They can be applied, saved and measured; they change no tensor of the base that could be added,
scaled or compared, and say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import WEIGHTS
from deltaloom.core.deltas._writing import copy_adapter
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltaloom.core.base import Base


class Bottleneck(Delta):
    """A bottleneck adapter's folder."""

    kind = "bottleneck"

    def __init__(self, base: Base, folder: Path) -> None:
        super().__init__(base)
        self.folder = folder

    @classmethod
    def load(cls, folder: Path, base: Base) -> Self:
        """A folder that PEFT or `save` wrote; raises InputError when its weights are missing."""
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
        return cls(base, folder)

    def names(self) -> list[str]:
        """Raises InputError: an empty list would be merged as if nothing had been tuned."""
        self._refused()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InputError: no tensor changes."""
        self._refused()

    def to_dense(self, name: str) -> Any:
        """Raises InputError: no tensor changes."""
        self._refused()

    def __mul__(self, factor: float) -> Delta:
        return self if factor == 1.0 else self._refused()

    def __add__(self, other: Delta) -> Delta:
        self._refused()

    def dot(self, other: Delta) -> float:
        """Raises InputError: a module has no inner product."""
        self._refused()

    def save(self, folder: Path) -> None:
        """Copy the adapter folder."""
        copy_adapter(self.folder, folder)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the adapter attached by PEFT."""
        from peft import PeftModel

        import deltaloom.core.adapters  # noqa: F401  (makes the kind known to PEFT)

        return PeftModel.from_pretrained(base.load(new_head=True), self.folder).eval()  # pyright: ignore

    def _refused(self) -> NoReturn:
        raise InputError(
            f"{self.folder}: a {self.kind} adapter is no change of the base's tensors, so it "
            "cannot be merged, scaled or compared; use a LoRA adapter for that"
        )


class Composite(Bottleneck):
    """A composite adapter's folder: bottlenecks, low ranks and prefixes beside the base."""

    kind = "composite"
