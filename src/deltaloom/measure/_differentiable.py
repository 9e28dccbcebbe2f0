"""Which parameters a gradient is taken by: all, a fresh LoRA's, biases, or those of a pattern."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deltaloom.core.errors import InputError


@dataclass(frozen=True)
class Differentiable:
    """A model made ready, with the names of what to differentiate by and of what tuning changes."""

    model: Any
    names: list[str]
    trained: list[str]
    """As `names`, and LoRA's A, which has no gradient while B is zero."""


@contextmanager
def differentiable(model: Any, parameters: str, r: int, seed: int) -> Iterator[Differentiable]:
    """`model` in evaluation mode with only the chosen parameters to be trained, while inside.

    An adapter that the model carries is merged into a copy first. Raises InputError for a pattern
    that no parameter has or that is none, and for an adapter that cannot be merged.
    """
    if hasattr(model, "peft_config"):
        model = _merged(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval()
    try:
        if parameters == "lora":
            with _adapted(model, r, seed) as adapted:
                trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
                yield Differentiable(adapted, [n for n in trained if "lora_B" in n], trained)
        else:
            names = _matching(before, parameters)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
            yield Differentiable(model, names, names)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        model.eval()


def _merged(model: Any) -> Any:
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise InputError("prompts cannot be merged into the model; measure it without them")
    return copy.deepcopy(model).merge_and_unload()


def _matching(names: Any, parameters: str) -> list[str]:
    pattern = {"all": "", "bias": r"(^|[._])bias$"}.get(parameters, parameters)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise InputError(
            f"parameters = {parameters!r}: neither all, lora nor bias, and no regular expression "
            f"({error})"
        ) from None
    if not found:
        raise InputError(
            f"parameters = {parameters!r}: the model has no such parameter; its first is "
            f"{next(iter(names))}"
        )
    return found


@contextmanager
def _adapted(model: Any, r: int, seed: int) -> Iterator[Any]:
    """`model` with a fresh adapter on every linear module but the head, gone again afterwards."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
