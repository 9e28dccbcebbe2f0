"""Attention to the user's tokens: how much each response gives them, and steering it to them.

Shares are read from the weights that the model's own eager attention makes, one layer at a time, so
that soft caps, sinks and windows are in them. Steering adds log(alpha) to the scores of all keys
that are not the user's: Att'(x, y) = Att(x, y) / Z for y of the user, alpha Att(x, y) / Z for
others, the same in every layer and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from deltaloom.core.errors import InputError
from deltaloom.engine.embed import blocks_of
from deltaloom.engine.forward import TOKENS_PER_BATCH, accepts_kept_logits, budgeted, device_of

STEERABLE = ("eager", "sdpa")
"""Attention functions that add a mask to the scores."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A row whose attention is read."""

    ids: Sequence[int]
    user: Sequence[int]
    """1 for each key whose weight counts, (T,)."""
    groups: Sequence[Sequence[int]]
    """Positions of the queries, one group per response."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The attention of one group of queries."""

    heads: NDArray[np.float32]
    """Mean over the queries of their weight on the user's tokens, (layers, heads)."""
    dependency: NDArray[np.float32]
    """Mean over the queries of the largest such weight of any head, (layers,)."""


def middle_layer(depth: int) -> int:
    """The block that the paper reads, 15 (from 0) of TinyLlama's 22, in a model of `depth`."""
    return depth * 15 // 22


def user_shares(
    model: Any,
    rows: Sequence[Watched],
    pad_id: int,
    layers: Sequence[int] | None = None,
    alpha: float = 1.0,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[Shares]]:
    """What each group of each row gives to the user's tokens, in the order of the rows.

    One forward pass of each row with eager attention, whose weights (rows x heads x T x T) are held
    for one layer at a time; the model's own attention function is put back afterwards. A value
    depends on the other rows of a batch by rounding only.

    Args:
        model: Causal language model or PeftModel, in evaluation mode.
        rows: The rows, each with at least one token and no empty group.
        pad_id: Any valid token id; padding is on the right and masked.
        layers: Numbers of the blocks to read; None reads all.
        alpha: Steers as `steered` does; 1 does not.
        tokens_per_batch: Rows x width of a batch at most; one longer row goes alone. None is
            `forward.TOKENS_PER_BATCH` for the model's device.
        on_batch: Called after each batch with the number of rows in it and of tokens computed in
            it (without padding).

    Raises:
        InputError: A block has no attention whose weights can be read, or steering as `steered`.
    """
    inner = _inner(model)
    blocks = blocks_of(inner.get_decoder() if hasattr(inner, "get_decoder") else inner)
    chosen = list(range(len(blocks))) if layers is None else list(layers)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    device = device_of(model)
    kind = "cpu" if device.type == "cpu" else "other"
    budget = tokens_per_batch or TOKENS_PER_BATCH[kind]
    found: list[list[Shares]] = [[] for _ in rows]
    with _implementation(inner, "eager"):
        for batch in budgeted([len(rows[i].ids) for i in order], budget):
            own = [rows[order[k]] for k in batch]
            read = _read(model, own, [blocks[k] for k in chosen], pad_id, alpha)
            for k, shares in zip(batch, read, strict=True):
                found[order[k]] = shares
            if on_batch is not None:
                on_batch(len(own), sum(len(row.ids) for row in own))
    return found


@contextmanager
def steered(model: Any, user: Sequence[Sequence[int]], alpha: float) -> Iterator[None]:
    """Weight every key that is not the user's by `alpha` before the softmax's sum is divided out.

    For the forward passes, or the one generation, of one batch inside the block. Tokens beyond
    `user`, which are generated ones, are not the user's. All models of the process are steered
    meanwhile: run nothing else beside it.

    Args:
        model: Causal language model or PeftModel with eager or sdpa attention; a model with
            another runs with sdpa inside the block.
        user: 1 for each token of the user, rows of one length T, padded as the batch is.
        alpha: Above 0; 1 leaves everything as it is.

    Raises:
        InputError: The model makes its attention masks itself, so nothing was steered.
    """
    inner = _inner(model)
    flags = torch.tensor([list(row) for row in user], dtype=torch.bool)  # (b, T)
    virtual = _virtual_tokens(model)
    made = 0

    def mask(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        plain = eager_mask(*args, **options)  # (b, 1, q, kv)
        at = torch.arange(plain.shape[-1]) + int(options.get("kv_offset", 0)) - virtual
        inside = (at >= 0) & (at < flags.shape[1])
        own = flags[:, at.clamp(0, flags.shape[1] - 1)] & inside  # (b, kv)
        bias = torch.where(own, 0.0, math.log(alpha)).to(plain)[:, None, None, :]
        # What may not be attended to keeps the smallest number there is.
        return torch.where(plain < 0, plain, bias)

    current = inner.config._attn_implementation
    name = current if current in STEERABLE else "sdpa"
    with _implementation(inner, name), _mask_function(name, mask):
        yield
    if not made:
        raise InputError(
            f"{type(inner).__name__} makes its attention masks itself and cannot be steered; "
            "measure it with alpha=1"
        )


def _read(
    model: Any, rows: Sequence[Watched], blocks: Sequence[Any], pad_id: int, alpha: float
) -> list[list[Shares]]:
    """Shares of every group of a batch."""
    width = max(len(row.ids) for row in rows)
    device = device_of(model)
    ids = torch.full((len(rows), width), pad_id)  # (b, T)
    real, user = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        real[i, : len(row.ids)] = 1
        user[i, : len(row.ids)] = torch.tensor(row.user)
    options = {"logits_to_keep": 1} if accepts_kept_logits(model) else {}
    layers: list[torch.Tensor] = []

    def reduce(_: Any, __: Any, made: Any) -> None:
        weights = made[1] if isinstance(made, tuple) and len(made) > 1 else None
        if torch.is_tensor(weights) and weights.dim() == 4:
            keys = weights[..., -width:].float()  # virtual tokens stand in front
            flags = user.to(keys)
            layers.append(torch.einsum("bhqk,bk->bhq", keys, flags)[..., -width:].cpu())

    handles = [
        child.register_forward_hook(reduce) for block in blocks for child in block.children()
    ]
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if alpha != 1:
            stack.enter_context(steered(model, user.tolist(), alpha))
        stack.enter_context(torch.inference_mode())
        model(input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False, **options)
    if len(layers) != len(blocks):
        raise InputError(
            f"{type(_inner(model)).__name__} shows the attention weights of {len(layers)} of "
            f"{len(blocks)} blocks; use a model whose every block has eager attention"
        )
    return [
        [_shares([layer[i][:, list(group)] for layer in layers]) for group in row.groups]
        for i, row in enumerate(rows)
    ]


def _shares(layers: Sequence[torch.Tensor]) -> Shares:
    """Of one group, from each layer's (heads, queries)."""
    heads = torch.stack([layer.mean(1) for layer in layers])
    dependency = torch.stack([layer.max(0).values.mean() for layer in layers])
    return Shares(heads.numpy(), dependency.numpy())


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _virtual_tokens(model: Any) -> int:
    config = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", None) or 0)


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    """Let `model` run with another attention function."""
    before = model.config._attn_implementation
    if before != name:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)


@contextmanager
def _mask_function(name: str, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let transformers make the masks for the attention `name` by `function`."""
    before = ALL_MASK_ATTENTION_FUNCTIONS[name]
    ALL_MASK_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = before
