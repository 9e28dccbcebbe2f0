"""Training by gradient: `transformers.Trainer` with checked masks, whole checkpoints and a ledger.

There is no training loop here. What is added to the Trainer: labels from the response mask, a
stop at the first loss that is not finite, checkpoints that are whole or absent, resumption from
the last whole one, early stopping on a measurement passed in, and the cost ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from deltaloom.core.encoding import Encoded
from deltaloom.core.method import Evaluation
from deltaloom.core.run import Run
from deltaloom.engine._checkpoints import Whole, checkpoints, last_whole, step_of
from deltaloom.engine._watching import EarlyStop, Ledger, Pause
from deltaloom.engine.forward import device_of
from deltaloom.engine.objective import BeforeEpoch, Objective


@dataclass(frozen=True)
class TrainSettings:
    """What `fit` needs to know; the tuners' fields say what each means and where it is from."""

    epochs: float
    lr: float
    batch_size: int
    micro_batch: int | None = None
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_steps: int | None = None
    """Optimizer steps between checkpoints; 0 means an epoch, None a tenth of the run."""
    keep: int | None = 2
    patience: int = 3
    trainable: Literal["all", "adapter"] = "all"


@dataclass
class Fitted:
    """What came of it."""

    model: Any
    steps: int
    best: dict[str, float] | None = None
    checkpoints: list[Path] = field(default_factory=list)


class Paused(Exception):
    """Training has come to where `Run.until` lets it; the same call goes on from there."""

    def __init__(self, model: Any, tokens: int, trainable: Literal["all", "adapter"]) -> None:
        super().__init__("training is paused")
        self.model, self.tokens = model, tokens
        """The model as it is; the tokens trained since the beginning, without padding."""
        self.trainable: Literal["all", "adapter"] = trainable


class Companion(TrainerCallback):
    """A callback that brings the optimizer and has a part in every checkpoint."""

    def optimizer(self, model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
        """What updates the model's trained parameters."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write this one's state to a checkpoint; it counts as whole only after this."""

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote, before training resumes."""


def fit(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    settings: TrainSettings,
    run: Run,
    *,
    tokenizer: Any = None,
    evaluation: Evaluation | None = None,
    folder: str = "checkpoints",
    after_epoch: Callable[[Trainer, int], None] | None = None,
    objective: Objective | None = None,
    companion: Companion | None = None,
    earlier: int = 0,
) -> Fitted:
    """Train `model` in place on `rows`; resumes from `run.work / folder` when it holds work.

    `after_epoch(trainer, epoch)` is called before the checkpoint that ends an epoch is written, so
    that what it leaves is there wherever training resumes; checkpoints must be epochs apart then
    (`save_steps` 0). `objective` adds to the loss. `earlier` is the number of steps that an earlier
    phase of the same run logged. Raises WorkError when the loss stops being finite or a checkpoint
    cannot be written, and Paused after the part of the steps that `run.until` says; a pause that is
    asked for again is reached again, from the checkpoint before it.
    """
    set_seed(run.seed)
    home = run.work / folder
    batches = math.ceil(len(rows) / settings.batch_size)
    total = math.ceil(batches * settings.epochs)
    stop = None if run.until is None else math.ceil(round(run.until * total, 6))
    # The Trainer would go on after an end inside an epoch: that end is reached again.
    last = last_whole(home, stop or (total if total % batches else None))
    run.rewind(earlier + step_of(last))
    every = batches if settings.save_steps == 0 else settings.save_steps or math.ceil(total / 10)
    device = device_of(model).type
    given = training_arguments(settings, home, total, every, run.seed, device)
    arguments = on_one_device(TrainingArguments(**given))
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows),
        data_collator=lambda batch: collate(batch, pad_id),
    )
    trainer.last_whole = last
    if any(row.label is not None for row in rows):
        # The loss of `_Trainer` is, whatever the classifier's own takes.
        trainer.model_accepts_loss_kwargs = True
    if objective is not None:
        numbers = {row.id: number for number, row in enumerate(rows)}
        trainer.data_collator = lambda batch: {
            **collate(batch, pad_id),
            "rows": torch.tensor([numbers[row.id] for row in batch]),
        }
        objective.begin_training(rows, pad_id)
        trainer.objective = objective
        trainer.add_callback(BeforeEpoch(objective, batches))
    trainer.companion, trainer.settings = companion, settings
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Ledger(run, settings.trainable, total, step_of(last), earlier))
    if companion is not None:
        trainer.add_callback(companion)
        if last is not None:
            companion.load(last)
    watcher = None
    trainer.after_epoch, trainer.per_epoch = after_epoch, batches
    if evaluation is not None:
        watcher = EarlyStop(tokenizer, evaluation, run, settings.patience, batches, earlier)
        trainer.add_callback(watcher)
    if stop is not None:
        trainer.add_callback(Pause(stop))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop is not None:
        raise Paused(model, int(trainer.state.num_input_tokens_seen), settings.trainable)
    if watcher is not None:
        watcher.restore(model)
    return Fitted(
        model, trainer.state.global_step, watcher.best if watcher else None, checkpoints(home)
    )


def collate(batch: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right; labels are -100 wherever the response mask is 0. All (b, T).

    Rows of a sequence classifier have their classes as labels, (b,).
    """
    width = max(len(row.input_ids) for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    attention = torch.zeros((len(batch), width), dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for i, row in enumerate(batch):
        length = len(row.input_ids)
        own = torch.tensor(row.input_ids)
        ids[i, :length] = own
        attention[i, :length] = 1
        labels[i, :length] = own.masked_fill(torch.tensor(row.response_mask) == 0, -100)
    classes = [row.label for row in batch if row.label is not None]
    if classes:
        labels = torch.tensor(classes)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class _Trainer(Whole, Trainer):
    """Labels and losses of rows and of classifiers, and what a method adds."""

    objective: Objective | None = None
    companion: Companion | None = None
    settings: TrainSettings
    after_epoch: Callable[[Trainer, int], None] | None = None
    per_epoch: int

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        rows = inputs.pop("rows", None)
        if self.objective is not None:
            self.objective.begin_batch(rows)
        labels = inputs["labels"]
        if labels.dim() == 1:
            # Classifiers of transformers divide by the batch's rows, whatever they are told.
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**inputs)
            loss = cross_entropy(outputs.logits.float(), labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        else:
            found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss, outputs = found
        if self.objective is not None:
            added = self.objective.added_loss(outputs.logits, labels, rows, num_items_in_batch)
            loss = loss if added is None else loss + added
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.companion is not None and self.optimizer is None:
            self.optimizer = self.companion.optimizer(self.model, self.settings)
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.objective is not None:
            self.objective.end_batch()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        epochs, inside = divmod(self.state.global_step, self.per_epoch)
        if self.after_epoch is not None and not inside:
            self.after_epoch(self, epochs)
        super()._save_checkpoint(*args, **kwargs)

    def add_to(self, checkpoint: Path) -> None:
        if self.companion is not None:
            self.companion.save(checkpoint)


def training_arguments(
    settings: TrainSettings, home: Path, total: int, every: int, seed: int, device: str
) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`, for `total` steps with a checkpoint `every` so many.

    `device` is the model's; the Trainer takes a GPU where it sees one unless it is told not to.
    """
    micro = settings.micro_batch or settings.batch_size
    # A logged loss is the mean since the last one: windows must not reach over a checkpoint.
    window = max(n for n in range(1, max(1, total // 100) + 1) if every % n == 0)
    return {
        "output_dir": str(home),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro,
        "lr_scheduler_type": settings.schedule,
        # Rounded down: rounded up, a run of few steps would make its first one with lr 0.
        "warmup_steps": int(settings.warmup * total),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "bf16": settings.precision == "bfloat16",
        "activation_checkpointing": settings.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": settings.keep,
        "logging_steps": window,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "seed": seed,
        "data_seed": seed,
        "dataloader_pin_memory": device != "cpu" and torch.cuda.is_available(),
        "use_cpu": device == "cpu",
    }


def on_one_device(arguments: Any) -> Any:
    """The same; the Trainer would copy a model to all GPUs and give each a batch of its own."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
