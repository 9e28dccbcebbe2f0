"""Per-example gradients of ragged rows: whole, or sketched to a few thousand numbers on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import WorkError
from deltaloom.engine.forward import accepts_kept_logits, budgeted, device_of
from deltaloom.engine.preconditioning import Precondition
from deltaloom.engine.projection import Projection
from deltaloom.engine.taps import Rows, Taps
from deltaloom.engine.train import collate

TOKENS = {"cpu": 2048, "other": 16384}
"""Padded tokens per batch at most. On CPUs 1,024 to 4,096 are alike and 8,192 is a quarter slower
(measured); the other is ours."""
FLOATS = 2**24
"""Gradient entries of one parameter, over a batch's rows, at most: 64 MiB in float32."""

Loss = Callable[[Any, dict[str, Tensor]], Tensor]
"""Takes the model and a batch (`input_ids`, `attention_mask`, `labels`, all (b, T), labels -100
where nothing is learned) and gives each row's loss (b,)."""


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Each row's mean cross-entropy over its labelled tokens, (b,)."""
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return summed_loss(model, batch) / counts


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Each row's cross-entropy summed over its labelled tokens, (b,)."""
    logits, labels = _predictions(model, batch)
    return _summed(logits, labels)


def sampled_loss(generator: torch.Generator) -> Loss:
    """As `summed_loss`, of labels drawn from the model's own predictions, one per labelled token.

    The rows' tokens stay what each token is predicted from.
    """

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = _predictions(model, batch)
        chances = logits.detach().softmax(-1).flatten(0, 1)  # (b kept, V)
        drawn = torch.multinomial(chances, 1, generator=generator).view(labels.shape)
        return _summed(logits, torch.where(labels == -100, labels, drawn))

    return loss


def _predictions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (b, kept, V), float32 or more, at positions that predict some row's label; labels."""
    labels = batch["labels"][:, 1:]  # (b, T - 1)
    options: dict[str, Any] = {"use_cache": False}
    kept = torch.arange(labels.shape[1], device=labels.device)
    if accepts_kept_logits(model):  # the output layer is dear, and many tokens are prompt
        kept = (labels != -100).any(0).nonzero()[:, 0]
        options["logits_to_keep"] = kept
        labels = labels[:, kept]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
    ).logits[:, : len(kept)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(1)


def per_example(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    names: Sequence[str] | None = None,
    loss: Loss = mean_loss,
    checkpointing: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (row numbers, gradients (b, D) in float32) batch by batch.

    D is the parameters `names` end to end (default: all that require gradients, in the model's
    order). The model is put into evaluation mode. Raises InputError as `Taps` does, WorkError
    naming the row whose gradient is not finite.
    """
    with Taps(model, names, checkpointing=checkpointing) as taps:
        for numbers, values in _losses(model, taps, taps.size, rows, pad_id, loss):
            found: dict[str, Tensor] = {}
            taps.backward(values, partial(_keep, found))
            whole = torch.cat([found[name] for name in taps.shapes], dim=1)
            _check(whole, [rows[i] for i in numbers])
            yield numbers, whole


def sketched(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    projection: Projection,
    *,
    precondition: Precondition | None = None,
    names: Sequence[str] | None = None,
    loss: Loss = mean_loss,
    checkpointing: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (row numbers, projected gradients (b, dim) in float32), never holding a whole one.

    As `per_example`, with each parameter's gradients preconditioned and projected as soon as the
    backward pass makes them.
    """
    with Taps(model, names, checkpointing=checkpointing) as taps:
        largest = max(shape.numel() for shape in taps.shapes.values())
        for numbers, values in _losses(model, taps, largest, rows, pad_id, loss):
            out = torch.zeros(len(numbers), projection.dim, device=values.device)
            taps.backward(values, partial(_project, projection, precondition, out))
            _check(out, [rows[i] for i in numbers])
            yield numbers, out


def _keep(found: dict[str, Tensor], name: str, rows: Rows) -> None:
    found[name] = rows.whole().flatten(1).float()


def _project(
    projection: Projection, precondition: Precondition | None, out: Tensor, name: str, rows: Rows
) -> None:
    projection.add(name, rows, out, precondition)


def _losses(
    model: Any, taps: Taps, entries: int, rows: Sequence[Encoded], pad_id: int, loss: Loss
) -> Iterator[tuple[list[int], Tensor]]:
    """Row numbers, shortest rows first, and their losses (b,) with the graph behind them."""
    model.eval()
    device = device_of(model)
    tokens = TOKENS["cpu" if device.type == "cpu" else "other"]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
    most = max(1, FLOATS // entries)
    for wide in budgeted([len(rows[i].input_ids) for i in order], tokens):
        for start in range(0, len(wide), most):
            numbers = [order[k] for k in wide[start : start + most]]
            batch = collate([rows[i] for i in numbers], pad_id)
            yield numbers, loss(model, {key: value.to(device) for key, value in batch.items()})


def _check(gradients: Tensor, rows: Sequence[Encoded]) -> None:
    finite = torch.isfinite(gradients).all(dim=1)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]
        raise WorkError(
            f"row {row.id!r} has a gradient that is not finite; look at that row, or use a "
            "float32 model"
        )


def mean_squares(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    names: Sequence[str],
    *,
    loss: Loss = summed_loss,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Per parameter the mean over the rows of the squared gradient of each row's loss.

    Float64 for float64 parameters, else float32, in the parameter's shape and on the model's
    device: as much memory as the parameters in that type, beside one parameter's gradients for a
    batch. `on_batch` gets rows and tokens. Raises as `per_example` does.
    """
    with Taps(model, names) as taps:
        sums = {
            name: torch.zeros(shape, dtype=torch.promote_types(kind, torch.float32), device=where)
            for name, shape in taps.shapes.items()
            for kind, where in [_home(model.get_parameter(name))]
        }
        largest = max(shape.numel() for shape in taps.shapes.values())

        def add(name: str, found: Rows) -> None:
            own = found.whole().to(sums[name].dtype)
            sums[name] += own.square_().sum(0)  # in place, as nobody else has them

        for numbers, values in _losses(model, taps, largest, rows, pad_id, loss):
            taps.backward(values, add)
            if not torch.isfinite(values).all():
                row = rows[numbers[int((~torch.isfinite(values)).nonzero()[0])]]
                raise WorkError(f"row {row.id!r} has a loss that is not finite")
            if on_batch is not None:
                on_batch(len(numbers), sum(len(rows[i].input_ids) for i in numbers))
    return {name: total.div_(len(rows)) for name, total in sums.items()}


def _home(parameter: Tensor) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
