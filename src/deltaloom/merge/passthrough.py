"""Copy one of the models, its float weights scaled when asked.

Paper: none; the `passthrough` of mergekit (Goddard et al., EMNLP 2024; arXiv 2403.13257).

Formula: theta = scale * theta_source.

Differs: an adapter is merged into the base on the way, so this is also how a LoRA becomes a model.

Not covered: stacks of layers of several models, scales that differ by tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.merge._rule import Block, ElementRule
from deltaloom.merge._streaming import Streaming


@final
class Passthrough(Streaming):
    """Writes one of the models out."""

    source: int = Field(default=0, ge=0)
    """Place of the model in the list, from 0."""
    scale: float = 1.0
    """Factor of every float weight (mergekit's default: none)."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """The one that is copied."""
        if self.source >= len(deltas):
            raise InputError(f"source {self.source} of {len(deltas)} deltas; they count from 0")
        return [deltas[self.source]]

    def rule(self, models: int, seed: int = 0) -> PassthroughRule:
        """See Streaming."""
        return PassthroughRule(self.scale)


class PassthroughRule(ElementRule):
    """Values times a factor."""

    form = "values"
    needs_base = False

    def __init__(self, scale: float):
        self.scale = scale
        self.keeps_base = scale == 1

    def write(self, block: Block) -> None:
        """See TensorRule."""
        block.out[:] = block.models[0]
        if self.scale != 1:
            block.out *= block.out.dtype.type(self.scale)
