"""Prompt deltas: PEFT adapters of virtual tokens (soft prompts, prefixes), on disk unchanged.

A prompt changes no tensor of the base. As a vector it lives over its own tensors, so prompts of one
form add and scale (an average of prompts is a prompt); with a change of weights it does not add.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Prompt(Delta):
    """Virtual tokens before the input, or before the keys and values of every layer."""

    kind = "prompt"

    def __init__(
        self, base: Base, tensors: dict[str, Tensor], like: Path, folder: Path | None = None
    ) -> None:
        super().__init__(base)
        self.tensors = tensors
        self.like = like
        """A folder whose `adapter_config.json` holds for this prompt."""
        self.folder = folder
        """The adapter folder this is, unchanged; None once arithmetic made it another."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> Prompt:
        """Read a PEFT adapter of virtual tokens; raises InputError when its weights are missing."""
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
        with TensorFolder(folder / WEIGHTS) as stored:
            return cls(base, {name: stored.read(name) for name in stored}, folder, folder)

    def names(self) -> list[str]:
        """The prompt's own tensors."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self.tensors[name].shape)

    def to_dense(self, name: str) -> Tensor:
        """One of the prompt's own tensors, float32."""
        return self.tensors[name].float()

    def __mul__(self, factor: float) -> Prompt:
        if factor == 1.0:
            return self
        scaled = {name: factor * tensor.float() for name, tensor in self.tensors.items()}
        return Prompt(self.base, scaled, self.like)

    def __add__(self, other: Delta) -> Prompt:
        """The sum of two prompts of one form; raises InputError for anything else."""
        self.same_base(other)
        forms = {name: self.shape(name) for name in self.names()}
        if not isinstance(other, Prompt) or forms != {n: other.shape(n) for n in other.names()}:
            raise InputError(
                "a prompt changes no tensor of the base, so it only adds to prompts of the same "
                "kind and length"
            )
        total = {name: self.to_dense(name) + other.to_dense(name) for name in forms}
        return Prompt(self.base, total, self.like)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the virtual tokens attached by PEFT."""
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder or Path(scratch)
            if self.folder is None:
                self._write(folder)
            return PeftModel.from_pretrained(base.load(new_head=True), folder).eval()  # pyright: ignore

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if (self.folder or self.like).resolve() == folder.resolve():
            return
        with new_file(folder / CONFIG) as temporary:
            shutil.copyfile(self.like / CONFIG, temporary)
        with new_file(folder / WEIGHTS) as temporary:
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, temporary)
