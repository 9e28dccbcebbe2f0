"""What a method adds to training by gradient, without a training loop of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from deltaloom.core.encoding import Encoded


class Objective:
    """What a method adds to training by gradient, batch by batch. Does nothing by itself."""

    def begin_training(self, rows: Sequence[Encoded], pad_id: int) -> None:
        """Called once, with all rows."""

    def begin_epoch(self, model: Any, epoch: int, step: int, resumed: bool) -> None:
        """Called before an epoch (from 0), after `step` optimizer steps; `resumed` when an
        earlier process has done a part of it."""

    def begin_batch(self, rows: torch.Tensor) -> None:
        """Called before the forward pass on the rows of these numbers, (b,)."""

    def added_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, items: Any
    ) -> torch.Tensor | None:
        """A term to add to the loss, which is a sum over the batch divided by `items`."""

    def end_batch(self) -> None:
        """Called after the backward pass."""


class BeforeEpoch(TrainerCallback):
    """Tells an objective that an epoch of `steps` optimizer steps begins, or is taken up."""

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective, self.steps = objective, steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        epoch, done = divmod(state.global_step, self.steps)
        self.objective.begin_epoch(kwargs["model"], epoch, state.global_step, done > 0)
