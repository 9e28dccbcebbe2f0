"""Where a loaded model came from, so that another process can load it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.base import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Origin:
    """A base, alone or with a delta on it."""

    base: Base
    delta: str | None = None
    """Folder or hub id."""

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model in evaluation mode, and its tokenizer."""
        if self.delta is None:
            return self.base.load(), self.base.tokenizer()
        from deltaloom.core.delta import load

        delta = load(self.delta, self.base)
        return delta.apply(self.base), delta.tokenizer(self.base)
