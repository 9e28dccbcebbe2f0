"""The next token of each row: the most probable one, or a draw that only its own seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn."""

    temperature: float = 1.0
    """0 takes the most probable token; OpenAI's default is 1."""
    top_p: float = 1.0
    """Nucleus (Holtzman et al. 2020, section 3.1): the fewest most probable tokens that hold at
    least this probability; OpenAI's default is 1, all of them."""


def choose(logits: Tensor, rules: Sequence[Sampling], draws: Sequence[float]) -> list[int | None]:
    """A token for each row of logits `(b, V)`; None for a row whose logits are not finite.

    A draw is a number in [0, 1) that picks a token by the cumulated probabilities, so that a row's
    tokens depend on its draws and not on the rows beside it.
    """
    if logits.device.type == "mps":
        logits = logits.cpu()  # there is no float64 there
    best = logits.max(dim=-1)
    finite = best.values.isfinite().tolist()
    chosen: list[int | None] = best.indices.tolist()
    for nucleus in (False, True):
        drawn = [
            i
            for i, rule in enumerate(rules)
            if rule.temperature > 0 and (rule.top_p < 1) == nucleus and finite[i]
        ]
        if drawn:
            picked = _draw(
                logits[drawn].double(), [rules[i] for i in drawn], [draws[i] for i in drawn]
            )
            for i, token in zip(drawn, picked, strict=True):
                chosen[i] = token
    return [token if good else None for token, good in zip(chosen, finite, strict=True)]


def _draw(logits: Tensor, rules: list[Sampling], draws: list[float]) -> list[int]:
    column = {"dtype": torch.float64, "device": logits.device}
    heat = torch.tensor([[rule.temperature] for rule in rules], **column)
    share = (logits / heat).softmax(dim=-1)  # (b, V)
    order = None
    if rules[0].top_p < 1:
        top = torch.tensor([[rule.top_p] for rule in rules], **column)
        share, order = share.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it do not hold top_p yet; the first always does.
        before = share.cumsum(dim=-1) - share
        share = share.masked_fill((before >= top) & (before > 0), 0.0)
    total = share.cumsum(dim=-1)  # (b, V)
    wanted = torch.tensor([[draw] for draw in draws], **column) * total[:, -1:]
    place = torch.searchsorted(total, wanted, right=True).clamp_max(logits.shape[-1] - 1)
    if order is not None:
        place = order.gather(1, place)
    return place[:, 0].tolist()
