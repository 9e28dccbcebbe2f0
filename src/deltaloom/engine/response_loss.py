"""The response tokens' mean cross-entropy of a batch, forward only and for both signs at once.

The batch, its padding and its attention are those of training by gradient (`train.collate`), and so
is the value. Logits are made at response positions only, a block of positions at a time, where the
output layer is the last thing the model does to them; that is checked once, on the first row. With
both signs in one batch a step reads the weights once where two passes read them twice, which
decides for few tokens; many tokens run one sign after the other, which needs half the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltaloom.core.encoding import Encoded
from deltaloom.engine.forward import device_of
from deltaloom.engine.perturb import BOTH, Directed
from deltaloom.engine.train import collate

TOGETHER = {"cpu": 512, "other": 8192}
"""Padded tokens of a batch up to which both signs run as one. Ours, measured on CPUs: at 1,024
tokens two passes of one sign take the same time and less memory."""
LOGITS_PER_BLOCK = {"cpu": 2**21, "other": 2**22}
"""Logits made at once, 8 and 16 MiB in float32, and as much again for their loss. Ours."""
PROBED = 8
"""Tokens of the row on which the output layer is checked."""


class ResponseLoss:
    """Mean loss over the response tokens of rows, with parameters moved by each sign."""

    def __init__(
        self, model: Any, rows: Sequence[Encoded], pad_id: int, micro_batch: int | None = None
    ) -> None:
        self.model, self.rows, self.pad_id = model, rows, pad_id
        self.micro_batch = micro_batch
        self.device = device_of(model)
        kind = "cpu" if self.device.type == "cpu" else "other"
        self.together, self.logits = TOGETHER[kind], LOGITS_PER_BLOCK[kind]
        self.head = model.get_output_embeddings()
        self._last: bool | None = None

    @torch.inference_mode()
    def __call__(self, moved: Directed, chosen: Sequence[int]) -> tuple[float, float, int]:
        """Loss at plus and at minus, and tokens put through the model for them."""
        size = self.micro_batch or len(chosen)
        batches = [
            collate([self.rows[i] for i in chosen[start : start + size]], self.pad_id)
            for start in range(0, len(chosen), size)
        ]
        if self._last is None:
            self._last = self._head_is_last(batches[0])
        sums = [0.0, 0.0]
        if moved.together:
            for batch in batches:
                for at, value in enumerate(self._both(moved, batch)):
                    sums[at] += value
        else:
            for at, sign in enumerate(BOTH):
                with moved.signed((sign,)):
                    sums[at] = sum(self._one(moved, batch) for batch in batches)
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) or 1
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return sums[0] / count, sums[1] / count, 2 * tokens

    def _both(self, moved: Directed, batch: dict[str, Tensor]) -> list[float]:
        rows, width = batch["input_ids"].shape
        if rows * width > self.together:
            found = []
            for sign in BOTH:
                with moved.signed((sign,)):
                    found.append(self._one(moved, batch))
            return found
        doubled = {key: torch.cat([value, value]) for key, value in batch.items()}
        with moved.signed(BOTH, 2 * rows):
            states = self._states(doubled)
        found = []
        for sign, half in zip(BOTH, states.split(rows), strict=True):
            with moved.signed((sign,)):
                found.append(self._sum(moved, half, batch["labels"]))
        return found

    def _one(self, moved: Directed, batch: dict[str, Tensor]) -> float:
        return self._sum(moved, self._states(batch), batch["labels"])

    def _states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the output layer is given, (b, T, d), or the logits where it is not the last."""
        inputs = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        width = inputs["input_ids"].shape[1]
        if not self._last:
            return self.model(**inputs, use_cache=False).logits[:, -width:]
        return self._before_head(inputs)[:, -width:]

    def _before_head(self, inputs: dict[str, Tensor]) -> Tensor:
        def stop(module: Any, given: tuple[Tensor, ...]) -> None:
            raise _Reached(given[0])

        handle = self.head.register_forward_pre_hook(stop)
        try:
            self.model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise AssertionError("the output layer was not called")

    def _sum(self, moved: Directed, states: Tensor, labels: Tensor) -> float:
        """Summed loss of the labels (b, T) that are not -100."""
        wanted = labels[:, 1:].to(states.device)
        at = wanted != -100
        picked, targets = states[:, :-1][at], wanted[at]  # (n, d), (n,)
        size = max(1, len(picked))
        if self._last and not moved.is_swapped(self.head):
            size = max(1, self.logits // self.head.weight.shape[0])
        total = 0.0
        for part, target in zip(picked.split(size), targets.split(size), strict=True):
            logits = self.head(part) if self._last else part
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = functional.cross_entropy(logits, target.to(logits.device), reduction="none")
            total += float(losses.double().sum())
        return total

    def _head_is_last(self, batch: dict[str, Tensor]) -> bool:
        """Whether the logits are what the output layer gives, without scaling or capping."""
        if self.head is None:
            return False
        inputs = {
            key: batch[key][:1, :PROBED].to(self.device) for key in ("input_ids", "attention_mask")
        }
        logits = self.model(**inputs, use_cache=False).logits
        try:
            found = self.head(self._before_head(inputs))
        except AssertionError:
            return False
        return found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-4)


class _Reached(Exception):
    """The output layer was reached."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
