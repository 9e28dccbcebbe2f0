"""Tune every parameter with AdamW on the response tokens.

Paper: none; the recipe of Stanford Alpaca (Taori et al. 2023) with decoupled weight decay
(Loshchilov & Hutter 2019).

Loss: mean cross-entropy over the response tokens of the batch, -sum_t log p(y_t | y_<t, x) / T.

Differs: weights are held in float32 while they are tuned, also for a bfloat16 base, because steps
of lr * m / sqrt(v) vanish when rounded to bfloat16; the result has the base's own type.

Not covered: optimizer states in eight bits, tuning of chosen layers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from deltaloom.core.delta import Delta, describe, load
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import GradientTuner, train

if TYPE_CHECKING:
    from pathlib import Path

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Full(GradientTuner):
    """Full fine-tuning; the result is a whole model folder."""

    classifiers = True

    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate (Alpaca: 2e-5)."""

    def work(self, sizes: Sizes) -> Work:
        """Weights, gradients and Adam's two moments in float32; activations are not counted."""
        return Work(
            full_tokens=self.epochs * sizes.rows * sizes.row_tokens,
            memory_bytes=16.0 * sizes.parameters,
            disk_bytes=2 * 12.0 * sizes.parameters + sizes.weight_bytes,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes a model folder to `run.folder` and returns its dense Delta."""
        from transformers import set_seed

        set_seed(run.seed)  # decides a classifier's new head
        model = base.load(dtype="float32", new_head=True)
        model.train()
        model = train(model, base, data, run, self, self.train_settings(self.lr), evaluation)
        result = run.work / "result"
        save_model(model, result, base)
        run.publish(result)
        return load(run.folder, base)


def save_model(model: Any, folder: Path, base: Base) -> None:
    """Write a model folder in the base's own type, a dense Delta of it."""
    import torch

    stored = base.config().get("dtype") or base.config().get("torch_dtype") or "float32"
    model.to(getattr(torch, stored)).save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)
    describe(folder, "dense", base)
