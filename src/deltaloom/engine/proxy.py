"""A smaller model of the same architecture, from its config alone."""

from __future__ import annotations

import copy
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.engine.decoders import head_size


def resized(config: Any, width: float = 1.0, depth: float = 1.0) -> Any:
    """`config` with hidden and inner size and heads times `width`, layers times `depth`.

    Heads keep their size, as muP's authors advise, and their number is rounded; key and value heads
    divide the others. Raises InputError where that leaves nothing.
    """
    new = copy.deepcopy(config)
    hidden = round(config.hidden_size * width)
    layers = round(config.num_hidden_layers * depth)
    heads = max(1, round(config.num_attention_heads * width))
    if hidden < 2 or layers < 1:
        raise InputError(
            f"a proxy {width:g} times as wide and {depth:g} times as deep has hidden size {hidden} "
            f"and {layers} layers; choose smaller factors"
        )
    new.hidden_size, new.num_attention_heads = hidden, heads
    if hasattr(config, "n_inner"):  # GPT-2, where None is four times the hidden size
        new.n_inner = config.n_inner and max(1, round(config.n_inner * width))
    else:
        new.intermediate_size = max(1, round(config.intermediate_size * width))
    if hasattr(config, "num_key_value_heads"):
        shared = config.num_attention_heads // (
            config.num_key_value_heads or config.num_attention_heads
        )
        most = max(1, heads // shared)
        new.num_key_value_heads = max(n for n in range(1, most + 1) if heads % n == 0)
        new.head_dim = head_size(config)
    elif hidden != heads * head_size(config):
        raise InputError(
            f"a proxy {width:g} times as wide has hidden size {hidden}, no multiple of the size "
            f"{head_size(config)} of a head, as {config.model_type} needs; choose another factor"
        )
    new.num_hidden_layers = layers
    for key in ("layer_types", "no_rope_layers"):
        each = getattr(config, key, None)
        if each is not None:
            setattr(new, key, [each[number % len(each)] for number in range(layers)])
    if getattr(config, "max_window_layers", None) is not None:
        new.max_window_layers = min(config.max_window_layers, layers)
    return new
