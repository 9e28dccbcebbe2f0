"""Checkpoints that are whole or absent, and a trainer that writes no others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import WorkError

WHOLE = "whole.json"
"""Marker written last into a checkpoint: without it the checkpoint was interrupted."""


class Whole:
    """Put before a `transformers.Trainer`: stops at a loss that is not finite, and leaves no
    half-written checkpoint.
    """

    last_whole: Path | None = None
    args: Any
    state: Any

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See Trainer; raises WorkError for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise WorkError(
                f"the loss is {loss.item()} at step {step}; {self._fallback()}; "
                f"{self._remedy(step)}"
            )
        return loss

    def add_to(self, checkpoint: Path) -> None:
        """Write what else belongs into a checkpoint; it counts as whole only after this."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        goal = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self.add_to(goal)
            write_json(goal / WHOLE, {"step": self.state.global_step})
        except Exception as error:
            shutil.rmtree(goal, ignore_errors=True)
            raise WorkError(
                f"checkpoint {goal} could not be written ({error}); {self._fallback()}"
            ) from error
        self.last_whole = goal

    def _remedy(self, step: int) -> str:
        if step == 1:  # no rate can be to blame
            return (
                "nothing was changed yet, so the base's weights are no numbers or overflow; "
                "try base.dtype=float32, or download the base again"
            )
        return f"try a smaller lr (it is {self.args.learning_rate:g}) or float32"

    def _fallback(self) -> str:
        if self.last_whole is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.last_whole}"


def checkpoints(home: Path) -> list[Path]:
    """The whole ones, in order."""
    found = [path for path in home.glob("checkpoint-*") if (path / WHOLE).exists()]
    return sorted(found, key=step_of)


def last_whole(home: Path, before: int | None = None) -> Path | None:
    """The last whole one, of those before step `before` if that is given; those that are not whole
    and those from there on are removed.
    """
    whole = [path for path in checkpoints(home) if before is None or step_of(path) < before]
    for path in home.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def step_of(path: Path | None) -> int:
    """Optimizer steps before a checkpoint, 0 for none."""
    return int(path.name.rpartition("-")[2]) if path else 0
