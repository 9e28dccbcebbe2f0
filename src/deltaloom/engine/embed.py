"""Hidden-state embeddings of rows: one forward pass without logits, pooled over real tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import InputError
from deltaloom.engine.forward import TOKENS_PER_BATCH, budgeted, device_of

Pooling = Literal["mean", "weighted", "last"]
"""Weight of token i of T, counted from 1: 1 / T; i / (1 + ... + T), as RDS+ has it; only T's."""
Tokens = Literal["all", "response"]


def embeddings(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    pooling: Pooling = "mean",
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """One vector per row: the decoder's last hidden states (after its final norm), pooled.

    Pooling is in float32 whatever the model's type. A value depends on the other rows, their
    order and the batch size by rounding only; the same call gives the same bytes.

    Args:
        model: Causal language model or PeftModel, in evaluation mode; virtual prompt tokens are
            allowed for and not pooled.
        rows: Encoded rows; prompt and response tokens count alike.
        pad_id: Any valid token id; padding is on the right and masked.
        pooling: How a row's tokens are weighted.
        tokens_per_batch: Rows x width of a batch at most; one longer row goes alone. None is
            `forward.TOKENS_PER_BATCH` for the model's device.
        on_batch: Called after each batch with the number of rows in it and of tokens computed
            in it (without padding).

    Returns:
        float32 `(n, h)`, in input order.

    Raises:
        ValueError: A row has no tokens, or `pooling` is none of the three.
    """
    decoder = _Decoder(model)
    counted = [np.ones(len(row.input_ids), bool) for row in rows]
    taps = [_Tap(decoder.inner)]
    width = embedding_width(model)
    return _pooled(decoder, taps, width, rows, counted, pad_id, pooling, tokens_per_batch, on_batch)


def layer_embeddings(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    pooling: Pooling = "mean",
    tokens: Tokens = "all",
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Every layer's hidden states of each row in one pass, pooled as `embeddings` does.

    What goes into the first block, what comes out of each, and what the final norm makes of that,
    side by side: float32 `(n, sum of layer_widths(model))`. Only pooled states are held. `tokens`
    = "response" pools the response's tokens alone.

    Raises:
        ValueError: As `embeddings` does; also for a row without a counted token.
        InputError: The model has no stack of as many blocks as its config says.
    """
    decoder = _Decoder(model)
    masks = [row.response_mask if tokens == "response" else row.input_ids for row in rows]
    counted = [np.array(mask, bool) | (tokens == "all") for mask in masks]
    blocks = blocks_of(decoder.inner)
    taps = [_Tap(blocks[0], before=True), *map(_Tap, blocks), _Tap(decoder.inner)]
    width = sum(layer_widths(model))
    return _pooled(decoder, taps, width, rows, counted, pad_id, pooling, tokens_per_batch, on_batch)


def layer_widths(model: Any) -> list[int]:
    """Width of each part of `layer_embeddings`: before the blocks, after each, after the norm."""
    config = model.config.get_text_config()
    return [int(config.hidden_size)] * (config.num_hidden_layers + 1) + [embedding_width(model)]


def embedding_width(model: Any) -> int:
    """h: how wide the model's embeddings are."""
    config = model.config.get_text_config()
    # Some models (OPT) project the last states to the width of their word embeddings.
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))


def blocks_of(decoder: Any) -> torch.nn.ModuleList:
    """The stack of blocks of a decoder; raises InputError when there is none of its depth."""
    count = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(decoder).__name__} has no stack of {count} blocks")


def _pooled(
    decoder: _Decoder,
    taps: Sequence[_Tap],
    width: int,
    rows: Sequence[Encoded],
    counted: Sequence[NDArray[np.bool_]],
    pad_id: int,
    pooling: Pooling,
    tokens_per_batch: int | None,
    on_batch: Callable[[int, int], None] | None,
) -> NDArray[np.float32]:
    """(n, width) pooled over the tokens that `counted` marks, (T,) for each row."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling = {pooling!r}: must be one of {', '.join(get_args(Pooling))}")
    for row, mask in zip(rows, counted, strict=True):
        if not mask.any():
            raise ValueError(f"row {row.id!r} has no tokens")
    lengths = np.array([len(mask) for mask in counted], dtype=np.int64)  # (n,)
    # Longest first, as too large a batch should fail at once.
    order = np.argsort(-lengths, kind="stable")
    kind = "cpu" if decoder.device.type == "cpu" else "other"
    found = np.zeros((len(rows), width), np.float32)
    for batch in budgeted(lengths[order].tolist(), tokens_per_batch or TOKENS_PER_BATCH[kind]):
        numbers = order[batch]
        own = lengths[numbers]  # (b,)
        ids = np.full((len(batch), own.max()), pad_id)  # (b, T)
        marked = np.zeros(ids.shape, bool)
        for line, mark, number in zip(ids, marked, numbers, strict=True):
            line[: lengths[number]] = rows[number].input_ids
            mark[: lengths[number]] = counted[number]
        found[numbers] = decoder.pooled(ids, own, _weights(marked, pooling), taps)
        if on_batch is not None:
            on_batch(len(batch), int(own.sum()))
    return found


def _weights(real: NDArray[np.bool_], pooling: Pooling) -> NDArray[np.float32]:
    """(b, T) weights that sum to 1 over each row's real tokens and are 0 on all others."""
    place = real.cumsum(axis=1) * real  # (b, T), 1 to the row's length
    if pooling == "mean":
        raw = real
    elif pooling == "weighted":
        raw = place
    else:
        raw = place == place.max(axis=1, keepdims=True)
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)


class _Decoder:
    """The part of a language model below its output layer."""

    def __init__(self, model: Any) -> None:
        self.device = device_of(model)
        adapted = hasattr(model, "get_base_model")
        causal = model.get_base_model() if adapted else model
        self.inner = causal.get_decoder() if hasattr(causal, "get_decoder") else causal.base_model
        # Virtual prompt tokens are put in front by the PeftModel, so that must be called itself.
        virtual = adapted and model.active_peft_config.is_prompt_learning
        self.outer = model if virtual else self.inner
        accepted = inspect.signature((causal if virtual else self.inner).forward).parameters
        wanted = {"use_cache": False, **({"logits_to_keep": 1} if virtual else {})}
        self.options = {key: value for key, value in wanted.items() if key in accepted}

    def pooled(
        self,
        ids: NDArray[Any],
        lengths: NDArray[Any],
        weights: NDArray[np.float32],
        taps: Sequence[_Tap],
    ) -> NDArray[np.float32]:
        """(b, h1 + h2 + ...) of the taps, for the rows `ids` (b, T) padded on the right."""
        width = ids.shape[1]
        real = np.arange(width) < lengths[:, None]  # (b, T)
        found: list[torch.Tensor] = []

        def pool(hidden: torch.Tensor) -> None:
            hidden = hidden[:, -width:].float()  # (b, T, h)
            share = torch.from_numpy(weights).to(hidden.device)
            found.append((share[:, :, None] * hidden).sum(1).cpu())

        handles = [tap.hook(pool) for tap in taps]
        try:
            with torch.inference_mode():
                self.outer(
                    input_ids=torch.from_numpy(ids).to(self.device),
                    attention_mask=torch.from_numpy(real.astype(np.int64)).to(self.device),
                    **self.options,
                )
            return torch.cat(found, dim=1).numpy()
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Tap:
    """Where hidden states are read: what comes out of a module, or what goes in."""

    module: torch.nn.Module
    before: bool = False

    def hook(self, pool: Callable[[torch.Tensor], None]) -> Any:
        """Call `pool` with the states whenever the module runs; gives the hook's handle."""
        if self.before:
            return self.module.register_forward_pre_hook(
                lambda _, given, named: pool(given[0] if given else named["hidden_states"]),
                with_kwargs=True,
            )
        return self.module.register_forward_hook(
            lambda _, __, made: pool(made if isinstance(made, torch.Tensor) else made[0])
        )
