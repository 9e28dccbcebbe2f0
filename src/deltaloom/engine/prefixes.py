"""Which sequences begin alike, and which models can go on from a beginning computed once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAVING = 0.25
"""Tokens that sharing must save, of a family's, to be worth its second pass. Ours."""


@dataclass(frozen=True, slots=True)
class Family:
    """Sequences that share their first `length` tokens, each with at least one of its own."""

    length: int
    members: tuple[int, ...]


def hosts(inputs: Sequence[list[int]]) -> dict[int, list[int]]:
    """Which sequences must be computed, and whom each serves: all whose input begins it.

    In lexicographic order an input that begins any other begins the next one.
    """
    order = sorted((i for i in range(len(inputs)) if inputs[i]), key=inputs.__getitem__)
    guests: dict[int, list[int]] = {}
    host = after = -1
    for here in reversed(order):
        if after < 0 or inputs[after][: len(inputs[here])] != inputs[here]:
            host = here
        guests.setdefault(host, []).append(here)
        after = here
    return guests


def families(inputs: Sequence[list[int]], chosen: Sequence[int]) -> list[Family]:
    """Families among the `chosen` inputs, none of which begins another; most are in none.

    Goes through them in lexicographic order, where those that begin alike stand together, and takes
    the next one in while that saves no fewer tokens than leaving it out.
    """
    found: list[Family] = []
    members: list[int] = []
    length = 0

    def close() -> None:
        tokens = sum(len(inputs[i]) for i in members)
        if length * (len(members) - 1) > SAVING * tokens:
            found.append(Family(length, tuple(members)))

    for here in sorted(chosen, key=inputs.__getitem__):
        alike = _common(inputs[members[-1]], inputs[here]) if members else 0
        shared = min(length, alike) if len(members) > 1 else alike
        if members and shared * len(members) >= length * (len(members) - 1) and shared:
            members.append(here)
            length = shared
        else:
            close()
            members, length = [here], 0
    close()
    return found


def can_share(model: Any) -> bool:
    """Whether a model's later tokens can be computed from a cache of its earlier ones.

    True for decoders that take positions and a cache of plain keys and values, alone or with LoRA;
    sliding windows, recurrent states, virtual tokens, routed adapters and models that always give
    all logits are computed whole.
    """
    adapters = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(one.peft_type, "value", one.peft_type)) for one in adapters.values()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = inspect.signature(inner.forward).parameters
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    return (
        "logits_to_keep" in named
        and kinds <= {"LORA"}
        and {"position_ids", "use_cache", "attention_mask"} <= set(named)
        and cache_name(model) is not None
        and getattr(config, "sliding_window", None) is None
        and all(kind == "full_attention" for kind in layers)
        and not getattr(config, "is_encoder_decoder", False)
    )


def cache_name(model: Any) -> str | None:
    """The name under which the model takes a cache; transformers has two."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = inspect.signature(inner.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in named), None)


def is_plain(cache: Any) -> bool:
    """Whether a cache is keys and values of every token and nothing else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(type(one) is DynamicLayer for one in cache.layers)


def selected(cache: Any, rows: torch.Tensor) -> Any:
    """A plain cache of its own with these rows of another."""
    from transformers.cache_utils import DynamicCache

    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[rows], layer.values[rows], number)
    return copy


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    size = min(len(a), len(b))
    return next((k for k in range(size) if a[k] != b[k]), size)
