"""Forward passes over many sequences: bucketed by length, and no work that nobody asked for.

`token_logprobs` is log-likelihood scoring. Against one padded batch of everything it saves the
tokens after the last scored one, sequences whose input is the beginning of another's (choices of
one token share their prompt's pass), beginnings that several sequences share (choices of several
tokens go on from a cache of their prompt), most padding, and the logits that no scored token needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaloom.engine.prefixes import can_share, families, hosts

TOKENS_PER_BATCH = {"cpu": 1024, "other": 8192}
"""Padded tokens in one batch. Ours: on a CPU more is slower (measured at 1,024 to 16,384)."""
LOGITS_PER_BATCH = 2**28
"""Logits held at once, 0.5 GiB in bfloat16. Ours; one sequence alone may need more."""
LOGITS_PER_BLOCK = 2**24
"""Logits held in float32 at once, 64 MiB. Ours."""

Masked = tuple[Sequence[int], Sequence[int]]
"""Token ids and, for each, whether it is scored."""


def token_logprobs(
    model: Any,
    sequences: Sequence[Masked],
    pad_id: int,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.float32]]:
    """Log-probability in nats of every masked token given all tokens before it.

    The first token of a sequence has nothing before it: it is never scored, so a mask that starts
    with 1 gives one value fewer than it has ones (`unscored` counts them; begin with `start_token`
    where that matters). The softmax is float32 whatever the model's type. A value depends on the
    other sequences, their order and the batch size by rounding only: about 1e-5 in float32, some
    0.1 in bfloat16. The same call gives the same bytes.

    Args:
        model: Causal language model or PeftModel, in evaluation mode; virtual prompt tokens are
            allowed for.
        sequences: `(ids, mask)` per sequence, both of length T.
        pad_id: Any valid token id; padding is on the right and masked.
        tokens_per_batch: Rows x width of a batch at most; one longer sequence goes alone. None
            is `TOKENS_PER_BATCH` for the model's device.
        on_batch: Called after each batch with the number of sequences answered by it and of
            tokens computed in it (without padding).

    Returns:
        Per sequence, in input order, a float32 array `(scored,)`; empty where nothing is scored.

    Raises:
        ValueError: A mask is not as long as its ids.
    """
    from deltaloom.engine._scoring import Jobs, Runner, together

    needed = [_predicting(ids, mask) for ids, mask in sequences]
    inputs = [
        list(ids[: int(at[-1]) + 1]) if len(at) else []
        for (ids, _), at in zip(sequences, needed, strict=True)
    ]
    guests = hosts(inputs)
    shared = families(inputs, list(guests)) if can_share(model) else []
    apart = guests.keys() - {member for family in shared for member in family.members}
    # Longest first, as too large a batch should fail at once; then by where scoring starts.
    order = sorted(apart, key=lambda i: (-len(inputs[i]), min(needed[g][0] for g in guests[i]), i))
    results = [np.zeros(0, np.float32) for _ in sequences]
    runner = Runner(model, pad_id)
    kind = "cpu" if runner.device.type == "cpu" else "other"
    budget = tokens_per_batch or TOKENS_PER_BATCH[kind]
    jobs = Jobs(sequences, needed, guests)
    for batch in budgeted([len(inputs[i]) for i in order], budget):
        chosen = [order[k] for k in batch]
        cells = jobs.cells(chosen)
        jobs.give(results, chosen, runner.score([inputs[i] for i in chosen], cells))
        if on_batch is not None:
            on_batch(jobs.served(chosen), sum(len(inputs[i]) for i in chosen))
    shared.sort(key=lambda family: (-family.length, family.members))
    for batch in budgeted([family.length for family in shared], budget):
        for chosen, values, computed in together(
            runner, [shared[k] for k in batch], inputs, jobs, budget
        ):
            jobs.give(results, chosen, values)
            if on_batch is not None:
                on_batch(jobs.served(chosen), computed)
    return results


def unscored(sequences: Sequence[Masked]) -> int:
    """How many masked tokens have nothing before them and so no log-probability."""
    return sum(1 for _, mask in sequences if len(mask) and mask[0])


def budgeted(widths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Consecutive indices in batches with rows x (largest width) within `tokens_per_batch`.

    A width above the budget gets a batch of its own. Sort by width first to save padding.
    """
    batch: list[int] = []
    largest = 0
    for index, width in enumerate(widths):
        largest = max(largest, width)
        if batch and (len(batch) + 1) * largest > tokens_per_batch:
            yield batch
            batch, largest = [], width
        batch.append(index)
    if batch:
        yield batch


def start_token(tokenizer: Any) -> int | None:
    """The token before an empty context: BOS, else EOS (lm-eval's `prefix_token_id`), else None."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def padding_token(tokenizer: Any) -> int:
    """An id to pad with: the pad token, else EOS, else 0. Padding is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def context_length(model: Any) -> int:
    """Tokens that the loaded model takes at once, less its virtual prompt tokens if it has any.

    Reads the config (`max_position_embeddings` and its older names); 2048 where it says nothing,
    as lm-eval assumes.
    """
    config = model.config.get_text_config()
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length - virtual
    return 2048 - virtual


def device_of(model: Any) -> torch.device:
    """Where the model takes its input."""
    return next(model.parameters()).device


def accepts_kept_logits(model: Any) -> bool:
    """Whether the model takes `logits_to_keep` as an index of positions."""
    # An index tensor cannot be on every device of a model that is spread over several.
    spread = len(set((getattr(_inner(model), "hf_device_map", None) or {}).values())) > 1
    return "logits_to_keep" in accepted(model) and not spread


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted(model: Any) -> Mapping[str, Any]:
    """The parameters that the model's `forward` takes."""
    return inspect.signature(_inner(model).forward).parameters


def _predicting(ids: Sequence[int], mask: Sequence[int]) -> NDArray[np.int64]:
    """Positions whose next token is scored."""
    if len(ids) != len(mask):
        raise ValueError(f"a sequence of {len(ids)} tokens has a mask of {len(mask)}")
    return np.flatnonzero(np.asarray(mask[1:], dtype=bool)).astype(np.int64)
