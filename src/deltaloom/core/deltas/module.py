"""Adapters that are no change of the base's tensors: prefixes and bottlenecks.

They are PEFT adapter folders on disk, unchanged. They can be applied, saved and measured; they have
no tensors to add, scale or compare, and say so.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deltaloom.core.atomic import new_file
from deltaloom.core.delta import Delta, describe
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltaloom.core.base import Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"PREFIX_TUNING": None, "BOTTLENECK": "deltaloom.core.adapters.bottleneck"}
"""PEFT's kinds that are such modules, and what must be imported before PEFT knows them."""


class Module(Delta):
    """A PEFT adapter as it is."""

    kind = "module"

    def __init__(self, base: Base, folder: Path) -> None:
        super().__init__(base)
        self.folder = folder

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
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.folder.resolve():
            for name in (WEIGHTS, CONFIG):
                with new_file(folder / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the adapter attached by PEFT."""
        from peft import PeftModel

        needed = KINDS[adapter_kind(self.folder)]
        if needed is not None:
            importlib.import_module(needed)
        return PeftModel.from_pretrained(base.load(new_head=True), self.folder).eval()  # pyright: ignore

    def _refused(self) -> NoReturn:
        raise InputError(
            f"{self.folder}: a {adapter_kind(self.folder)} adapter is no change of the base's "
            "tensors, so it cannot be merged, scaled or compared; use a LoRA adapter for that"
        )


def adapter_kind(folder: Path) -> str:
    """The `peft_type` of an adapter folder; empty where the config cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return ""
    return str(config.get("peft_type", "")) if isinstance(config, dict) else ""
