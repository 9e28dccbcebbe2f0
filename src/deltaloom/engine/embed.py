"""Hidden-state embeddings of rows: one forward pass without logits, pooled over real tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from deltaloom.core.encoding import Encoded
from deltaloom.engine.forward import TOKENS_PER_BATCH, budgeted, device_of

Pooling = Literal["mean", "weighted", "last"]
"""Weight of token i of T, counted from 1: 1 / T; i / (1 + ... + T), as RDS+ has it; only T's."""


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
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling = {pooling!r}: must be one of {', '.join(get_args(Pooling))}")
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)  # (n,)
    if not lengths.all():
        raise ValueError(f"row {rows[int(lengths.argmin())].id!r} has no tokens")
    # Longest first, as too large a batch should fail at once.
    order = np.argsort(-lengths, kind="stable")
    decoder = _Decoder(model)
    kind = "cpu" if decoder.device.type == "cpu" else "other"
    found = np.zeros((len(rows), embedding_width(model)), np.float32)
    for batch in budgeted(lengths[order].tolist(), tokens_per_batch or TOKENS_PER_BATCH[kind]):
        numbers = order[batch]
        own = lengths[numbers]  # (b,)
        ids = np.full((len(batch), own.max()), pad_id)  # (b, T)
        for line, number in zip(ids, numbers, strict=True):
            line[: lengths[number]] = rows[number].input_ids
        found[numbers] = decoder.pooled(ids, own, pooling)
        if on_batch is not None:
            on_batch(len(batch), int(own.sum()))
    return found


def embedding_width(model: Any) -> int:
    """h: how wide the model's embeddings are."""
    config = model.config.get_text_config()
    # Some models (OPT) project the last states to the width of their word embeddings.
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))


def _weights(real: NDArray[np.bool_], pooling: Pooling) -> NDArray[np.float32]:
    """(b, T) weights that sum to 1 over each row's real tokens and are 0 on padding."""
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
        self, ids: NDArray[Any], lengths: NDArray[Any], pooling: Pooling
    ) -> NDArray[np.float32]:
        """(b, h) for the rows `ids` (b, T) padded on the right."""
        width = ids.shape[1]
        real = np.arange(width) < lengths[:, None]  # (b, T)
        kept: list[torch.Tensor] = []
        handle = self.inner.register_forward_hook(lambda *call: kept.append(call[-1][0]))
        try:
            with torch.inference_mode():
                self.outer(
                    input_ids=torch.from_numpy(ids).to(self.device),
                    attention_mask=torch.from_numpy(real.astype(np.int64)).to(self.device),
                    **self.options,
                )
                hidden = kept[-1][:, -width:].float()  # (b, T, h)
                weights = torch.from_numpy(_weights(real, pooling)).to(hidden.device)
                return (weights[:, :, None] * hidden).sum(1).cpu().numpy()
        finally:
            handle.remove()
