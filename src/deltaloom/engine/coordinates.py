"""Coordinate check: do activations change alike in the first steps, whatever the width and depth?

Paper: Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466), appendix D.1: mean absolute value of
activations after each of a few steps, over models of growing size. Under a right parametrisation
the change from the first forward pass neither grows nor vanishes with the size; under a wrong one
it does, whatever a loss curve looks like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaloom.engine.parametrization import Parametrization
from deltaloom.engine.scaled_adam import ScaledAdamW
from deltaloom.engine.train import collate

PLACES = ("embedding", "last block", "logits")


@dataclass(frozen=True)
class Coordinate:
    """Activations of one place of one model after one step."""

    rule: str
    width: int
    """Hidden size."""
    layers: int
    step: int
    place: str
    size: float
    """Mean absolute value."""
    change: float
    """Mean absolute difference from before the first step."""


def coordinates(
    rules: Parametrization, rows: Sequence[Any], pad_id: int, lr: float, steps: int, seed: int
) -> list[Coordinate]:
    """Train a fresh model of `rules.config` for `steps` steps on one batch and look at it."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(rules.config, dtype=torch.float32)
    rules.initialize(model.eval())  # dropout would be a change, too
    optimizer = ScaledAdamW(rules.groups(model, lr))
    batch = collate(list(rows), pad_id)
    real = batch["attention_mask"].bool()
    found: list[Coordinate] = []
    first: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        layers = model.get_submodule(rules.family.layers)
        seen = _activations(model, layers, batch, optimizer if step < steps else None)
        for place, values in seen.items():
            kept = values[real]
            first.setdefault(place, kept)
            size, change = kept.abs().mean().item(), (kept - first[place]).abs().mean().item()
            found.append(
                Coordinate(
                    rules.depth,
                    rules.config.hidden_size,
                    rules.config.num_hidden_layers,
                    step,
                    place,
                    size,
                    change,
                )
            )
    return found


def slopes(found: Sequence[Coordinate], over: str = "width") -> dict[str, float]:
    """Place -> slope of log change after the last step in log `over`; 0 is flat, 1 grows alike.

    NaN where a change is zero or not finite at some size.
    """
    last = max(one.step for one in found)
    result = {}
    for place in PLACES:
        points = [
            (math.log(getattr(one, over)), one.change)
            for one in found
            if one.place == place and one.step == last
        ]
        if any(not 0 < change < math.inf for _, change in points):
            result[place] = math.nan
            continue
        x = torch.tensor([x for x, _ in points], dtype=torch.float64)
        y = torch.tensor([change for _, change in points], dtype=torch.float64).log()
        x, y = x - x.mean(), y - y.mean()
        result[place] = float((x * y).sum() / (x * x).sum())
    return result


def _activations(
    model: Any, layers: Any, batch: dict[str, torch.Tensor], optimizer: Any
) -> dict[str, torch.Tensor]:
    """Activations by place, each (b, T, width); then one step, with an optimizer."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda module, given: seen.update({"embedding": given[0].detach().clone()})
        ),
        layers[-1].register_forward_hook(
            lambda module, given, out: seen.update(
                {"last block": (out[0] if isinstance(out, tuple) else out).detach().clone()}
            )
        ),
    ]
    try:
        with torch.set_grad_enabled(optimizer is not None):
            out = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    seen["logits"] = out.logits.detach().clone()
    if optimizer is not None:
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return seen
