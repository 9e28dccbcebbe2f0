"""TRL's trainers with our checkpoints, ledger and early stopping."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, set_seed
from trl import (  # TRL names its exports in a table that type checkers do not read
    DPOConfig,  # pyright: ignore[reportPrivateImportUsage]
    DPOTrainer,  # pyright: ignore[reportPrivateImportUsage]
    KTOConfig,  # pyright: ignore[reportPrivateImportUsage]
    KTOTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from deltaloom.core.errors import InputError
from deltaloom.core.progress import say
from deltaloom.engine._checkpoints import Whole, last_whole, step_of
from deltaloom.engine._watching import EarlyStop, Ledger
from deltaloom.engine.train import TrainSettings, on_one_device, training_arguments
from deltaloom.tune._preferences import Judged, Pair, Text, unpaired

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.method import Evaluation
    from deltaloom.core.run import Run
    from deltaloom.tune.lora import Lora
    from deltaloom.tune.prefer import Prefer

FOLDER = "checkpoints"


class _Kto(Whole, KTOTrainer):
    """KTO, stopped and saved as all training here."""


class _Dpo(Whole, DPOTrainer):
    """DPO and its kin, likewise."""


def train(
    base: Base,
    pairs: Sequence[Pair],
    judged: Sequence[Judged],
    method: Prefer,
    lora: Lora | None,
    settings: TrainSettings,
    run: Run,
    evaluation: Evaluation | None,
) -> Any:
    """The tuned model (a PeftModel with `lora`); resumes from `run.work` when it holds work."""
    import datasets

    tokenizer = base.tokenizer()
    limit = min(method.max_length or base.max_length, base.max_length)
    if method.unpaired:
        rows: list[dict[str, Any]] = [
            {"prompt": one.prompt, "completion": one.completion, "label": one.label}
            for one in unpaired(pairs, judged)
        ]
        # Neighbours lend each other their completions for the estimate of KL: rows of one pair
        # must not be neighbours by rule.
        random.Random(f"preferences {run.seed}").shuffle(rows)
    else:
        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    kept = [row for row in rows if _fits(row, tokenizer, limit)]
    run.note(rows=len(kept), too_long_rows=len(rows) - len(kept), max_length=limit)
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} of {len(rows)} rows are longer than {limit} tokens: left out")
    if not kept:
        raise InputError(f"every row is longer than {limit} tokens; raise max_length")
    micro = settings.micro_batch or settings.batch_size
    if method.loss == "kto" and micro < 2:
        raise InputError("tune prefer: kto compares rows of a batch; make micro_batch at least 2")
    trainer, last, total = _trainer(base, kept, method, lora, settings, tokenizer, run, datasets)
    trainer.pop_callback(PrinterCallback)
    trained = "all" if lora is None else "adapter"
    passes = 3 if method.loss == "kto" else 1
    trainer.add_callback(Ledger(run, trained, total, step_of(last), 0, passes))
    watcher = None
    if evaluation is not None:
        batches = math.ceil(len(kept) / settings.batch_size)
        watcher = EarlyStop(tokenizer, evaluation, run, settings.patience, batches, 0)
        trainer.add_callback(watcher)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if watcher is not None:
        watcher.restore(trainer.model)
        run.note(best_evaluation=watcher.best)
    run.note(steps=trainer.state.global_step)
    return trainer.model


def _trainer(
    base: Base,
    rows: list[dict[str, Any]],
    method: Prefer,
    lora: Lora | None,
    settings: TrainSettings,
    tokenizer: Any,
    run: Run,
    datasets: Any,
) -> tuple[Any, Any, int]:
    """A trainer, its last whole checkpoint and its number of steps."""
    home = run.work / FOLDER
    last = last_whole(home)
    run.rewind(step_of(last))
    total = math.ceil(math.ceil(len(rows) / settings.batch_size) * settings.epochs)
    every = settings.save_steps or math.ceil(total / 10)
    device = base.resolved_device()
    given = training_arguments(settings, home, total, every, run.seed, device)
    # These rows are TRL's to tokenise: its columns are dropped by it, and checkpointing has its
    # own default there.
    given |= {
        "remove_unused_columns": True,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": None,
        "beta": method.beta,
    }
    for key in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        given.pop(key)
    set_seed(run.seed)
    if method.unpaired:
        arguments: Any = KTOConfig(
            **given,
            loss_type=method.loss,
            desirable_weight=method.desirable_weight,
            undesirable_weight=method.undesirable_weight,
        )
        kind: Any = _Kto
    else:
        loss = "sigmoid" if method.loss == "dpo" else method.loss
        smoothing = method.label_smoothing
        arguments = DPOConfig(**given, loss_type=[loss], label_smoothing=smoothing)
        kind = _Dpo
    dtype = "float32" if lora is None else None
    how: dict[str, Any] = {"peft_config": lora.config(base)} if lora is not None else {}
    if lora is None:
        how["ref_model"] = base.load(dtype=dtype).eval()
    with _quiet(datasets):
        trainer = kind(
            model=base.load(dtype=dtype) if dtype else base.load(),
            args=on_one_device(arguments),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            **how,
        )
    trainer.last_whole = last
    return trainer, last, total


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars for a moment's work on the rows; whoever wanted them has them afterwards."""
    off = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            datasets.enable_progress_bars()


def _fits(row: dict[str, Any], tokenizer: Any, limit: int) -> bool:
    answers = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    return all(_length(row["prompt"], one, tokenizer) <= limit for one in answers)


def _length(prompt: Text, answer: Text, tokenizer: Any) -> int:
    if isinstance(prompt, list) and isinstance(answer, list):
        if not tokenizer.chat_template:
            raise InputError(
                "rows are conversations and the tokenizer has no chat template; use rows with "
                "'prompt' as a text, or a base whose tokenizer has one"
            )
        text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return len(tokenizer(f"{prompt}{answer}")["input_ids"]) + 1
