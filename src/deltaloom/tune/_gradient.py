"""What tuning by gradient has in common: its settings, and rows to a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Method, Tuner

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.train import TrainSettings

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class GradientSettings(Method):
    """Abstract, for any verb: AdamW on the response tokens' mean cross-entropy."""

    epochs: Positive = 3.0
    """Passes over the data (Alpaca's recipe: 3)."""
    batch_size: Count = 16
    """Rows per optimizer step, over all accumulation (ours; QLoRA, table 9, uses 16)."""
    micro_batch: Count | None = None
    """Rows per forward pass; must divide batch_size. Smaller saves memory and changes nothing
    else: gradients are accumulated and weighted by tokens."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning rate over the steps (linear: LESS's and transformers' default)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises (Alpaca, LESS and QLoRA: 0.03)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay (Alpaca, LESS and QLoRA: 0)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm, 0 for none (transformers' default: 1)."""
    max_length: Count | None = None
    """Tokens per row at most; None takes the model's context. Longer rows lose prompt first."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast and keeps the trained weights in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints to resume from; None makes ten in a run."""

    @model_validator(mode="after")
    def _micro_divides(self) -> GradientSettings:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size}"
            )
        return self

    def train_settings(self, lr: float, **changes: Any) -> TrainSettings:
        """These fields as the engine takes them."""
        from deltaloom.engine.train import TrainSettings

        names = TrainSettings.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return TrainSettings(**{**{n: getattr(self, n) for n in names}, "lr": lr, **changes})


class GradientTuner(GradientSettings, Tuner):
    """Abstract: a tuner by gradient, which may stop early."""

    patience: Count = 3
    """Evaluations without a better one before stopping, when `evaluate` is given (ours)."""


def rows_for(
    base: Base, tokenizer: Any, data: Examples, max_length: int | None, run: Run
) -> list[Any]:
    """Encode `data` for `base`; counts of rows, tokens and truncations go to the run's notes."""
    from deltaloom.core.encoding import encode, encode_labelled
    from deltaloom.core.progress import say

    limit = min(max_length or base.max_length, base.max_length)
    if base.labels:
        rows = encode_labelled(data, tokenizer, limit, base.labels)
    else:
        rows = encode(data, tokenizer, limit)
    cut = sum(row.truncated for row in rows)
    run.note(
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        response_tokens=sum(sum(row.response_mask) for row in rows),
        truncated_rows=cut,
        max_length=limit,
    )
    if cut:
        say(f"{cut} of {len(rows)} rows are longer than {limit} tokens and were cut")
    return rows


def train(
    model: Any,
    base: Base,
    data: Examples,
    run: Run,
    method: GradientSettings,
    settings: TrainSettings,
    evaluation: Evaluation | None,
    **how: Any,
) -> Any:
    """Encode, fit (given `how`) and record; returns the trained model."""
    from deltaloom.engine.forward import padding_token
    from deltaloom.engine.train import fit

    tokenizer = base.tokenizer()
    rows = rows_for(base, tokenizer, data, method.max_length, run)
    if not rows:
        raise InputError(f"{data.name}: holds no rows to tune on")
    fitted = fit(
        model,
        rows,
        padding_token(tokenizer),
        settings,
        run,
        tokenizer=tokenizer,
        evaluation=evaluation,
        **how,
    )
    run.note(steps=fitted.steps)
    if fitted.best is not None:
        run.note(best_evaluation=fitted.best)
    return fitted.model
