"""Sequence classifiers in measures: what their outputs are called, and the outputs of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.core.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.core.encoding import Encoded
    from deltaloom.core.run import Run


def classes_of(model: Any) -> list[str] | None:
    """The names of a sequence classifier's outputs in order; None for any other model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__name__.endswith("ForSequenceClassification"):
        return None
    names = inner.config.id2label
    return [str(names[number]) for number in sorted(names)]


def class_logits(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], run: Run
) -> tuple[list[NDArray[np.float32]], dict[str, float]]:
    """Outputs (C,) of every row, float32, and what they cost, entered in the run's ledger."""
    import torch

    from deltaloom.engine.forward import TOKENS_PER_BATCH, budgeted, device_of, padding_token
    from deltaloom.engine.meter import count_forward
    from deltaloom.engine.train import collate

    device, pad_id = device_of(model), padding_token(tokenizer)
    widths = [len(row.input_ids) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-widths[i], i))
    budget = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
    found: dict[int, NDArray[np.float32]] = {}
    model.eval()
    with torch.inference_mode(), progress("choice", len(rows)) as advance:
        for batch in budgeted([widths[i] for i in order], budget):
            numbers = [order[k] for k in batch]
            inputs = collate([rows[i] for i in numbers], pad_id)
            del inputs["labels"]
            logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
            found.update(zip(numbers, logits.float().cpu().numpy(), strict=True))
            advance(len(numbers))
    cost = count_forward(run, model, sum(widths))
    return [found[i] for i in range(len(rows))], cost
