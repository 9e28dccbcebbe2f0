"""Clean routing while training: every row's loss, who looks clean, gates and the added loss.

What an epoch begins with is kept in one file an epoch, so that an epoch taken up in its middle has
the gates and targets it began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltaloom.core.atomic import new_file
from deltaloom.core.progress import progress, say
from deltaloom.engine.forward import (
    LOGITS_PER_BATCH,
    TOKENS_PER_BATCH,
    accepts_kept_logits,
    budgeted,
    device_of,
)
from deltaloom.engine.meter import count_forward
from deltaloom.engine.mixture import lower_component
from deltaloom.engine.objective import Objective
from deltaloom.engine.routing import Router, draw
from deltaloom.engine.train import collate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaloom.core.encoding import Encoded
    from deltaloom.core.run import Run

TRAINING, JUDGING = 0, 1
"""What gates are drawn for: a part of their seed."""


@dataclass(frozen=True)
class How:
    """The settings that decide routing; the fields of `tune clear` say what each means."""

    rule: str
    warm_up: int
    cap: float
    passes: int
    loss_momentum: float
    consistency: float
    temperature: float
    outcomes: int
    precision: str


@dataclass(frozen=True)
class Judgement:
    """What is known of all n rows when an epoch begins; together they have m predictions."""

    losses: Tensor
    """Smoothed losses (n,), float64."""
    clean: Tensor
    """Probability of a right label (n,), float64."""
    ids: Tensor
    """Outcomes that the targets tell apart (m, k), most probable first: classes or tokens."""
    targets: Tensor
    """Their probabilities (m, k); (m, k + 1) with that of all other outcomes together."""


class CleanRouting(Objective):
    """Gates for every batch, and the consistency loss; formulas in `tune/clear.py`."""

    def __init__(self, model: Any, how: How, run: Run) -> None:
        self.how, self.run = how, run
        self.router = Router(model)
        self._home = run.work / "judgements"
        self._now: Judgement | None = None

    def begin_training(self, rows: Sequence[Encoded], pad_id: int) -> None:
        """Take the rows; each has one prediction (classifier), or one a response token."""
        self.rows, self.pad_id = rows, pad_id
        counts = [1 if row.label is not None else sum(row.response_mask[1:]) for row in rows]
        self._starts = torch.tensor([0, *np.cumsum(counts)])

    def begin_epoch(self, model: Any, epoch: int, step: int, resumed: bool) -> None:
        """Judge the rows once the warm-up is over, and draw the epoch's gates (n, L)."""
        chances = np.ones(len(self.rows))
        if epoch >= self.how.warm_up:
            self._now = self._judged(model, epoch)
            chances = self._now.clean.numpy()
            if not resumed:
                say(f"epoch {epoch + 1}: {chances.mean():.0%} of the labels look right")
                # A line of the epoch's first step: a run taken up before it writes it again.
                self.run.log(step=step + 1, clean_share=float(chances.mean()))
        self._gates = self._drawn(chances, TRAINING, epoch)

    def begin_batch(self, rows: Tensor) -> None:
        """Set the gates of the rows with these numbers, (b,)."""
        if self.how.rule == "bypass":
            self.router.gates = self._gates[rows.cpu()].to(rows.device)

    def end_batch(self) -> None:
        """Whoever uses the model between batches has every module on."""
        self.router.gates = None

    def added_loss(self, logits: Tensor, labels: Tensor, rows: Tensor, items: Any) -> Tensor | None:
        """The consistency loss, over the same predictions as the loss itself; or what must be
        added to that loss for the mean over the rows that are kept."""
        if self._now is None:
            return None
        own, answers = predictions(logits, labels)
        if self.how.rule == "drop":
            counts = (self._starts[1:] - self._starts[:-1])[rows.cpu()]
            kept = torch.repeat_interleave(self._now.clean[rows.cpu()] > 0.5, counts)
            every = cross_entropy(own.float(), answers, reduction="none")
            left = every[kept.to(every.device)]
            mean = left.sum() / max(len(left), 1)
            return (mean * len(every) - every.sum()) / (len(every) if items is None else items)
        if not self.how.consistency:
            return None
        at = self._places(rows.tolist())
        ids, targets = (part[at].to(own.device) for part in (self._now.ids, self._now.targets))
        total = consistency_loss(own, ids, targets, self.how.temperature)
        return self.how.consistency * total / (len(own) if items is None else items)

    def last(self, model: Any) -> Judgement:
        """The latest judgement; one is made now if training ended in the warm-up."""
        made = [int(path.stem) for path in self._home.glob("*.safetensors")]
        return self._judged(model, max(made, default=self.how.warm_up))

    def first_outcomes(self, found: Judgement) -> list[int]:
        """The most probable outcome of each row's first prediction, (n,)."""
        return found.ids[self._starts[:-1], 0].tolist()

    def _judged(self, model: Any, epoch: int) -> Judgement:
        path = self._home / f"{epoch}.safetensors"
        if path.exists():
            return Judgement(**load_file(path))
        losses, ids, targets = self._looked(model, epoch)
        if epoch > self.how.warm_up:
            past = self._judged(model, epoch - 1).losses
            losses = self.how.loss_momentum * past + (1 - self.how.loss_momentum) * losses
        clean = torch.from_numpy(lower_component(losses.numpy()))
        found = Judgement(losses, clean, ids, targets)
        path.parent.mkdir(exist_ok=True)
        with new_file(path) as temporary:
            save_file(vars(found), temporary)
        return found

    def _looked(self, model: Any, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, outcomes and targets of all rows, by the mean logits of routed passes."""
        device = device_of(model)
        vocabulary = int(model.config.get_text_config().vocab_size)
        widths = [len(row.input_ids) for row in self.rows]
        order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
        everywhere = np.ones(len(widths))
        passes = [self._drawn(everywhere, JUDGING, epoch, k) for k in range(self.how.passes)]
        budget = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
        budget = min(budget, LOGITS_PER_BATCH // vocabulary)
        losses = torch.zeros(len(widths), dtype=torch.float64)
        places, ids, targets = [], [], []
        was_training = model.training
        model.eval()
        with torch.no_grad(), progress("judging labels", len(widths)) as advance:
            for batch in budgeted([widths[i] for i in order], budget):
                numbers = [order[k] for k in batch]
                inputs = collate([self.rows[i] for i in numbers], self.pad_id)
                inputs = {name: value.to(device) for name, value in inputs.items()}
                logits, labels = self._ensemble(model, inputs, [one[numbers] for one in passes])
                every = cross_entropy(logits, labels, reduction="none").double().cpu()
                losses[numbers] = self._means(every, numbers)
                # Classes are few; only tokens are told apart in part.
                most = logits.shape[1] if self.rows[0].label is not None else self.how.outcomes
                found, shares = targets_of(logits, self.how.temperature, most)
                places.append(self._places(numbers))
                ids.append(found.int().cpu())
                targets.append(shares.cpu())
                advance(len(numbers))
        model.train(was_training)
        self.router.gates = None
        count_forward(self.run, model, self.how.passes * sum(widths))
        back = torch.argsort(torch.cat(places))
        return losses, torch.cat(ids)[back], torch.cat(targets)[back]

    def _ensemble(
        self, model: Any, inputs: dict[str, Tensor], gates: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mean logits (p, V) over the passes, float32, and the labels (p,) of a batch."""
        labels = inputs.pop("labels")
        chosen: Any = ...
        cut: Tensor | None = None
        if labels.dim() == 2:
            labelled = labels[:, 1:] != -100
            kept = labelled.any(0).nonzero()[:, 0]
            chosen, labels = labelled[:, kept], labels[:, kept + 1]
            # Counted from the end, because virtual tokens may stand in front.
            kept = kept - inputs["input_ids"].shape[1]
            if accepts_kept_logits(model):
                inputs = {**inputs, "logits_to_keep": kept}
            else:
                cut = kept
        total: Any = 0.0
        for own in gates:
            self.router.gates = own.to(labels.device) if self.how.rule == "bypass" else None
            with torch.autocast(
                labels.device.type, torch.bfloat16, enabled=self.how.precision == "bfloat16"
            ):
                logits = model(**inputs).logits
            if cut is not None:
                logits = logits[:, cut]
            total = total + logits[chosen].float()
        return total / len(gates), labels[chosen]

    def _means(self, values: Tensor, numbers: Sequence[int]) -> Tensor:
        """Mean of each row's values; 0 where it has none."""
        counts = (self._starts[1:] - self._starts[:-1])[numbers]
        owner = torch.repeat_interleave(torch.arange(len(numbers)), counts)
        sums = torch.zeros(len(numbers), dtype=values.dtype).index_add_(0, owner, values)
        return sums / counts.clamp(min=1)

    def _places(self, numbers: Sequence[int]) -> Tensor:
        """Where the predictions of these rows stand among all m."""
        spans = [torch.arange(int(self._starts[i]), int(self._starts[i + 1])) for i in numbers]
        return torch.cat(spans)

    def _drawn(self, chances: NDArray[np.float64], *key: int) -> Tensor:
        gates = draw(self.how.cap * chances, self.router.layers, (self.run.seed, *key))
        return torch.from_numpy(gates)


def predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (p, V) that have a label, and those labels (p,), row after row.

    Of a classifier (labels (b,)) all; of a causal model (labels (b, T)) those before a label.
    """
    if labels.dim() == 1:
        return logits, labels
    labelled = labels[:, 1:] != -100
    return logits[:, :-1][labelled], labels[:, 1:][labelled]


def targets_of(logits: Tensor, temperature: float, outcomes: int) -> tuple[Tensor, Tensor]:
    """The most probable outcomes (p, k) of softmax(logits / temperature) and their probabilities.

    With more than `outcomes` of them, the probabilities (p, k + 1) end with that of the others.
    """
    chances = (logits / temperature).softmax(-1)
    top = chances.topk(min(outcomes, logits.shape[-1]))
    if top.indices.shape[1] == logits.shape[1]:
        return top.indices, top.values
    rest = (1 - top.values.sum(1, keepdim=True)).clamp(min=0)
    return top.indices, torch.cat([top.values, rest], dim=1)


def consistency_loss(logits: Tensor, ids: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Sum over rows of -sum_k targets_k log softmax(logits / temperature)_k, as `targets_of` gives
    outcomes and targets: with one target more than outcomes, the last is that of all others."""
    scaled = logits.float() / temperature
    total = scaled.logsumexp(1, keepdim=True)
    ids = ids.long()
    logs = scaled.gather(1, ids) - total
    if targets.shape[1] > ids.shape[1]:
        others = scaled.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
        logs = torch.cat([logs, others - total], dim=1)
    return -(targets.to(logs) * logs).sum()
